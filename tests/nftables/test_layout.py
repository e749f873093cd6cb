"""What is written is what nft shows, what it loads again, and what is read back."""

from __future__ import annotations

import re

import pytest

from kproxy.dataplane.base import Change, diff
from kproxy.dataplane.nftables.containers import CONTAINERS
from kproxy.dataplane.nftables.expressions import rule
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, SetKey, TableKey
from kproxy.model import Family
from tests.conftest import MakeNetns
from tests.lab.namespaces import Namespace
from tests.nftables.conftest import WITHOUT_OWNER, OpenKernel
from tests.nftables.samples import (
    BOTH,
    NOT_LOADABLE_BY_NFT_1_0_6,
    affinity_rules,
    empty_layout,
    everything,
    rules,
)

DECLARED_IPV4 = {
    "set cluster-ips": "typeof ip daddr",
    "set nodeport-ips": "typeof ip daddr",
    "set firewalled": "typeof ip daddr . meta l4proto . th dport",
    "set source-ranges": "typeof ip daddr . meta l4proto . th dport . ip saddr; flags interval",
    "set hairpin": "typeof ip saddr . ip daddr . meta l4proto . th dport",
    "map policies": "typeof ip daddr . meta l4proto . th dport : verdict",
    "map services": "typeof ip daddr . meta l4proto . th dport : verdict; counter",
    "map local-services": "typeof ip daddr . meta l4proto . th dport : verdict; counter",
    "map endpoints": ("typeof ip daddr . meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; counter"),
    "map local-endpoints": (
        "typeof ip daddr . meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; counter"
    ),
    "map nodeport-policies": "typeof meta l4proto . th dport : verdict",
    "map nodeports": "typeof meta l4proto . th dport : verdict; counter",
    "map local-nodeports": "typeof meta l4proto . th dport : verdict; counter",
    "map nodeport-endpoints": "typeof meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; counter",
    "map local-nodeport-endpoints": (
        "typeof meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; counter"
    ),
    "map no-endpoints": "typeof ip daddr . meta l4proto . th dport : verdict",
    "map no-endpoint-nodeports": "typeof meta l4proto . th dport : verdict",
    "map affinity": (
        "typeof ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst : ip daddr . th dport"
        "; size 1048576; flags dynamic,timeout"
    ),
    "map learn": "typeof ct original ip daddr . meta l4proto . ct original proto-dst : verdict",
    "map learn-nodeports": "typeof meta l4proto . ct original proto-dst : verdict",
}


def listed(namespace: Namespace) -> dict[str, list[str]]:
    """What `nft list ruleset` prints: `ip map services` → its lines."""
    blocks: dict[str, list[str]] = {}
    table = name = ""
    for line in namespace.command("nft", "list", "ruleset").stdout.splitlines():
        depth, text = len(line) - len(line.lstrip("\t")), line.strip()
        if depth == 0 and text.startswith("table"):
            table = text.split()[1]
        elif depth == 1 and text.endswith("{"):
            name = f"{table} {text.removesuffix(' {')}"
            blocks[name] = []
        elif depth == 2 or text.startswith("table"):
            blocks[name].append(text)
        elif depth > 2:  # elements go on
            blocks[name][-1] += " " + text
    return blocks


@pytest.mark.parametrize("family", BOTH)
def test_nft_shows_sets_and_maps_as_they_are_declared(kernel: NftablesKernel, netns: Namespace, family: Family):
    kernel.apply(diff(empty_layout(family), {}))
    word = "ip" if family is Family.IPv4 else "ip6"
    shown = {name: "; ".join(lines) for name, lines in listed(netns).items()}
    assert shown == {
        f"{word} {name}": re.sub(r"\bip (?=[sd]addr)", f"{word} ", declared) for name, declared in DECLARED_IPV4.items()
    }


@pytest.mark.parametrize("family", BOTH)
def test_nft_shows_rules_by_their_text(kernel: NftablesKernel, netns: Namespace, family: Family):
    written = [*rules(family), *affinity_rules(family)]
    # a comment is shown behind the rule
    texts = [f'{r.text} comment "{r.comment}"' if r.comment else r.text for r in written]
    wanted = everything(family) | {ChainKey(family, "every-rule"): Chain(None, tuple(written))}
    kernel.apply(diff(wanted, {}))
    assert listed(netns)[f"{'ip' if family is Family.IPv4 else 'ip6'} chain every-rule"] == texts


def test_nft_shows_elements_and_chains(kernel: NftablesKernel, netns: Namespace):
    kernel.apply(diff(everything(*BOTH), {}))
    shown = listed(netns)
    assert '10.0.0.1 . udp . 53 . 10.0.1.0/24 comment "office"' in shown["ip set source-ranges"][-1]
    assert "10.0.0.1 . udp . 53 . 10.0.3.0" in shown["ip set source-ranges"][-1]
    assert 'fd00::1 . udp . 53 . fd00::100/120 comment "office"' in shown["ip6 set source-ranges"][-1]
    assert 'tcp . 80 counter packets 0 bytes 0 comment "default/web:http" : goto masq' in shown["ip map nodeports"][-1]
    assert "10.0.0.1 . sctp . 443 : drop" in shown["ip map no-endpoints"][-1]
    assert "fd00::1 . tcp . 80 . 1 counter packets 0 bytes 0 : fd00::1:2 . 8081" in shown["ip6 map endpoints"][-1]
    assert shown["ip chain postrouting"] == [
        "type nat hook postrouting priority srcnat; policy accept;",
        "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random",
    ]


def test_what_was_written_is_read_back(kernel: NftablesKernel):
    wanted = everything(*BOTH)
    for family in BOTH:
        wanted[ChainKey(family, "affinity-rules")] = Chain(None, tuple(affinity_rules(family)))
    kernel.apply(diff(wanted, {}))
    assert diff(wanted, kernel.read()) == []


def test_a_listing_that_nft_loads_is_the_same_to_us(open_kernel: OpenKernel, netns: Namespace, make_netns: MakeNetns):
    """Except what nft 1.0.6 cannot parse, and one conversion that it adds and that converts nothing."""
    wanted = {
        key: value
        for key, value in everything(*BOTH).items()
        if not (isinstance(key, SetKey) and key.name in NOT_LOADABLE_BY_NFT_1_0_6)
        and not (isinstance(key, bytes) and CONTAINERS[key[0]].name in NOT_LOADABLE_BY_NFT_1_0_6)
    }
    for family in BOTH:
        # `byteorder` of the one-byte protocol, which nft 1.0.6 puts before a look-up in an interval set
        kept = tuple(r for r in rules(family) if "@source-ranges" not in r.text)
        wanted[ChainKey(family, "every-rule")] = Chain(None, kept)
    open_kernel(features=WITHOUT_OWNER).apply(diff(wanted, {}))
    other = make_netns()
    other.command("nft", "-f", "-", stdin=netns.command("nft", "list", "ruleset").stdout)
    assert diff(wanted, open_kernel(other).read()) == []


def test_changes_and_removals_leave_exactly_what_is_wanted(kernel: NftablesKernel):
    before = everything(*BOTH)
    kernel.apply(diff(before, {}))
    # given every element with another value, every other rule gone, a hook moved and a chain removed
    after = {}
    for key, value in before.items():
        match key, value:
            case bytes(), (_, _):
                after[key] = ("accept", "changed")
            case bytes(), str():
                after[key] = "changed"
            case bytes(), bytes():
                after[key] = bytes(reversed(value[:4])) + value[4:]
            case ChainKey(), Chain(hook=None, rules=old):
                after[key] = Chain(None, old[::2])
            case ChainKey(name="output"), _:
                continue
            case ChainKey(), Chain(hook=hook, rules=old):
                after[key] = Chain(type(hook)(hook.type, hook.name, hook.priority + 1), old)
            case _:
                after[key] = value
    kernel.apply(diff(after, kernel.read()))
    assert diff(after, kernel.read()) == []
    # and back to nothing but the layout, then to nothing
    layout = empty_layout(*BOTH)
    kernel.apply(diff(layout, kernel.read()))
    assert kernel.read() == layout
    kernel.apply(diff({}, kernel.read()))
    assert kernel.read() == {}


def test_two_rules_of_different_effect_differ(kernel: NftablesKernel):
    family = Family.IPv4
    every = rules(family)
    assert len(set(every)) == len(every)
    wanted = everything(family)
    kernel.apply(diff(wanted, {}))
    key = ChainKey(family, "every-rule")
    kernel.apply([Change(key, wanted[key], Chain(None, (every[0],)))])
    assert kernel.read()[key] != wanted[key]
    assert kernel.read()[key] == Chain(None, (every[0],))


def test_a_comment_alone_is_a_difference():
    plain, noted = (rule(*[], comment=c) for c in ("", "x"))
    assert plain != noted


def test_nothing_is_there_at_first(kernel: NftablesKernel, netns: Namespace):
    assert kernel.read() == {}
    kernel.probe()
    assert kernel.read() == {}
    assert netns.command("nft", "list", "ruleset").stdout == ""


def test_other_tables_are_not_ours(kernel: NftablesKernel, netns: Namespace):
    netns.command("nft", "add table ip other; add chain ip other c; add rule ip other c accept; add table inet kproxy")
    assert kernel.read() == {}
    kernel.apply(diff(everything(Family.IPv4), {}))
    assert {key.family for key in kernel.read() if isinstance(key, TableKey)} == {Family.IPv4}
    assert diff(everything(Family.IPv4), kernel.read()) == []
