"""What is written into the kernel, what is left alone, and what is said when it refuses."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import ApplyError, Change, Entries, diff
from kproxy.dataplane.iptables.cleanup import leftovers, remove
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.rule import Jump, Nfacct, Rule
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.model import Family, Protocol
from tests.iptables.conftest import Host, OpenHost
from tests.iptables.services import BOTH, elaborate, entries, everything, plain
from tests.lab.namespaces import Namespace
from tests.lab.privileges import NEEDS_WIDE_BUFFERS

FOREIGN = (
    "*filter",
    ":INPUT ACCEPT [0:0]",
    ":FORWARD DROP [0:0]",
    ":OUTPUT ACCEPT [0:0]",
    ":DOCKER - [0:0]",
    ":DOCKER-USER - [0:0]",
    ":KUBE-KUBELET-CANARY - [0:0]",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -o docker0 -j DOCKER",
    '-A INPUT -p tcp -m multiport --dports 22,443 -m comment --comment "let\'s see" -j ACCEPT',
    '-A DOCKER-USER -m limit --limit 5/min -j LOG --log-prefix "odd "',
    "COMMIT",
    "*nat",
    ":PREROUTING ACCEPT [0:0]",
    ":INPUT ACCEPT [0:0]",
    ":OUTPUT ACCEPT [0:0]",
    ":POSTROUTING ACCEPT [0:0]",
    ":DOCKER - [0:0]",
    ":KUBE-KUBELET-CANARY - [0:0]",
    "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
    "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
    "COMMIT",
    "*mangle",
    ":PREROUTING ACCEPT [0:0]",
    ":INPUT ACCEPT [0:0]",
    ":FORWARD ACCEPT [0:0]",
    ":OUTPUT ACCEPT [0:0]",
    ":POSTROUTING ACCEPT [0:0]",
    ":KUBE-IPTABLES-HINT - [0:0]",
    ":KUBE-KUBELET-CANARY - [0:0]",
    "-A PREROUTING -i eth0 -j TTL --ttl-set 64",
    "COMMIT",
)


def test_what_was_written_is_read_back(host: Host) -> None:
    wanted = everything()
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []


@pytest.mark.parametrize("variant", list(Variant))
def test_reading_an_empty_host_makes_nothing(netns: Namespace, variant: Variant) -> None:
    kernel = netns.run(lambda: IptablesKernel(BOTH, variant, guards_localhost=True))
    assert netns.run(kernel.read) == {}
    assert netns.run(legacy_tables, Family.IPv4) == []
    assert netns.command("nft", "list", "ruleset").stdout == ""


def test_one_endpoint_more_changes_its_service_only(host: Host) -> None:
    before = entries(*(plain(Family.IPv4, n, n, n + 100) for n in range(1, 6)))
    host.bring_to(before)
    saved = host.saved()
    after = entries(*(plain(Family.IPv4, n, n, n + 100, *([77] if n == 3 else [])) for n in range(1, 6)))
    host.bring_to(after)
    assert diff(after, host.read()) == []
    gone = set(saved) - set(host.saved())
    assert gone
    assert all("svc-3" in line for line in gone)


def test_services_come_and_go_in_one_go_and_the_node_ports_stay_last(host: Host) -> None:
    host.bring_to(entries(*(plain(Family.IPv4, n, n) for n in range(1, 20))))
    after = entries(elaborate(Family.IPv4), *(plain(Family.IPv4, n, n) for n in range(10, 30)))
    host.bring_to(after)
    assert diff(after, host.read()) == []
    services = [line for line in host.saved() if line.startswith("-A KUBE-SERVICES ")]
    assert services[-1].endswith("-j KUBE-NODEPORTS")
    assert not any("svc-9" in line for line in host.saved())


@NEEDS_WIDE_BUFFERS
def test_thousands_of_rules_are_written_and_removed(host: Host) -> None:
    many = entries(*(plain(Family.IPv4, n, n, n + 1000, n + 2000) for n in range(300)))
    host.bring_to(many)
    assert diff(many, host.read()) == []
    none = entries()
    host.bring_to(none)
    assert diff(none, host.read()) == []
    assert not any("KUBE-S" in line and "KUBE-SERVICES" not in line for line in host.saved())


def test_affinity_and_protocols_change_in_place(host: Host) -> None:
    for protocol in Protocol:
        wanted = entries(*(elaborate(family, 1, protocol) for family in BOTH))
        host.bring_to(wanted)
        assert diff(wanted, host.read()) == []


def test_what_others_have_stays_byte_for_byte(host: Host) -> None:
    host.restore(*FOREIGN)
    theirs = host.saved()
    host.bring_to(everything())
    host.bring_to(entries(plain(Family.IPv4, 1, 7)))
    assert [line for line in host.saved() if line in theirs] == theirs
    host.bring_to({key: value for key, value in host.read().items() if _is_kubelets_firewall(key)})
    assert [line for line in host.saved() if "KUBE-FIREWALL" not in line] == theirs


def _is_kubelets_firewall(key: object) -> bool:
    return isinstance(key, ChainKey) and key.chain == "KUBE-FIREWALL"


def test_jumps_come_in_kube_proxys_order(host: Host) -> None:
    host.bring_to(entries())
    forward = [line.rpartition(" ")[2] for line in host.saved() if line.startswith("-A FORWARD")]
    assert forward == ["KUBE-PROXY-FIREWALL", "KUBE-FORWARD", "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"]


def _spoilt(wanted: Entries) -> tuple[Entries, ChainKey]:
    """With a rule in svc-2's chain that the kernel refuses: its counter does not exist."""
    key = next(
        key
        for key, value in wanted.items()
        if isinstance(key, ChainKey) and key.chain.startswith("KUBE-SVC") and "svc-2:" in str(value)
    )
    return {**wanted, key: (Rule((Nfacct("no-such-counter"),), Jump("RETURN")),)}, key


def test_a_refused_rule_is_shown_with_its_neighbours_and_nothing_is_in_force(host: Host) -> None:
    before = entries(plain(Family.IPv4, 1, 1), plain(Family.IPv4, 9))
    host.bring_to(before)
    saved = host.saved()
    wanted = entries(*(plain(Family.IPv4, n, n) for n in range(1, 4)), plain(Family.IPv4, 8))
    spoilt, culprit = _spoilt(wanted)
    with pytest.raises(ApplyError) as caught:
        host.bring_to(spoilt)
    assert not caught.value.transient
    if host.kernel.variant == "nft":  # legacy tables go to the kernel whole, and it says no more than no
        assert caught.value.culprits == (culprit,)
        shown = str(caught.value).splitlines()
        assert [line for line in shown if line.startswith(">") and "no-such-counter" in line]
        assert any(line.startswith("  ") and ": -A KUBE-S" in line for line in shown)
    assert sorted(host.saved()) == sorted(saved)
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []


@NEEDS_WIDE_BUFFERS
def test_many_services_can_be_cleaned_up(host: Host) -> None:
    host.bring_to(entries(*(plain(Family.IPv4, n, n, n + 1000) for n in range(150))))
    host.netns.run(remove, host.kernel.variant, BOTH, host.netns.run(leftovers, host.kernel.variant, BOTH))
    assert {line.split()[0] for line in host.saved() if line.startswith(":KUBE")} == {":KUBE-FIREWALL"}


@NEEDS_WIDE_BUFFERS
def test_of_a_bulk_load_that_is_refused_nothing_stays(host: Host) -> None:
    host.bring_to(entries())
    saved = host.saved()
    spoilt, culprit = _spoilt(entries(*(plain(Family.IPv4, n, n, n + 1000) for n in range(150))))
    with pytest.raises(ApplyError) as caught:
        host.bring_to(spoilt)
    if host.kernel.variant == "nft":
        assert caught.value.culprits == (culprit,)
    assert host.saved() == saved


def test_what_one_family_refuses_is_taken_back_in_the_other(host: Host) -> None:
    before = entries(plain(Family.IPv4, 1, 1), plain(Family.IPv6, 1, 1))
    host.bring_to(before)
    wanted = entries(*(plain(family, n, n) for family in BOTH for n in (1, 2)))
    wrong = ChainKey(Family.IPv6, "nat", "KUBE-SVC-AAAAAAAAAAAAAAAA")
    with pytest.raises(ApplyError) as caught:
        host.bring_to({**wanted, wrong: (Rule((), Jump("KUBE-SEP-BBBBBBBBBBBBBBBB")),)})
    assert caught.value.culprits == (wrong,)
    assert diff(before, host.read()) == []


def test_a_table_that_iptables_cannot_read_is_no_empty_table(open_host: OpenHost) -> None:
    host = open_host(Variant.NFT)
    host.bring_to(entries())
    host.netns.command("nft", "add rule ip nat PREROUTING meta mark set numgen random mod 2")
    with pytest.raises(OSError, match="table nat holds what iptables cannot understand"):
        host.read()


def test_a_chain_that_is_not_there_is_named(host: Host) -> None:
    host.bring_to(entries())
    key = ChainKey(Family.IPv4, "nat", "KUBE-SVC-AAAAAAAAAAAAAAAA")
    rules = (Rule((), Jump("KUBE-SEP-BBBBBBBBBBBBBBBB")),)
    with pytest.raises(ApplyError, match="KUBE-SEP-BBBBBBBBBBBBBBBB") as caught:
        host.netns.run(host.kernel.apply, [Change(key, None, rules)])
    assert caught.value.culprits == (key,)


def test_a_block_that_somebody_removed_is_noticed_when_it_is_to_go(host: Host) -> None:
    before = entries(plain(Family.IPv4, 1, 1))
    host.bring_to(before)
    host.iptables("-t", "nat", "-D", "KUBE-SERVICES", "1")
    changes = diff(entries(), before)
    with pytest.raises(ApplyError) as caught:
        host.netns.run(host.kernel.apply, changes)
    assert [key.chain for key in caught.value.culprits if isinstance(key, BlockKey)] == ["KUBE-SERVICES"]
    assert diff(before, host.read()) != []
    host.bring_to(entries())
    assert diff(entries(), host.read()) == []


def test_a_rule_edited_by_hand_is_put_right(host: Host) -> None:
    wanted = everything()
    host.bring_to(wanted)
    host.iptables("-R", "KUBE-FORWARD", "1", "-j", "LOG")
    host.iptables("-t", "nat", "-A", "KUBE-SERVICES", "-s", "192.0.2.77", "-j", "RETURN")
    host.iptables("-t", "nat", "-I", "OUTPUT", "-j", "KUBE-SERVICES")
    host.iptables("-t", "nat", "-F", "KUBE-POSTROUTING", family=Family.IPv6)
    assert len(diff(wanted, host.read())) == 4
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
