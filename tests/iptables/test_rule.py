"""Rules as text: what iptables-save prints is understood, and printed the same."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kproxy.dataplane.iptables.accounting import ensure_counters
from kproxy.dataplane.iptables.legacy import InProcess
from kproxy.dataplane.iptables.options import INVALID_DROPPED, LOCALHOST_ACCEPTED
from kproxy.dataplane.iptables.parse import HOST_MASK, parse_rule
from kproxy.dataplane.iptables.restore import Command, Commit
from kproxy.dataplane.iptables.rule import (
    AddressType,
    AnyRule,
    Comment,
    Conntrack,
    Dnat,
    Interface,
    Jump,
    MarkMatch,
    Match,
    Network,
    Nfacct,
    NotBridged,
    OpaqueRule,
    Recent,
    Rule,
    SetMark,
    SetMatch,
    Statistic,
    Target,
    Transport,
    probability,
)
from kproxy.model import Family
from tests.conftest import MakeNetns
from tests.iptables.tables import read_tables, restore_text
from tests.lab.namespaces import Namespace

SETS = {Family.IPv4: "KUBE-LOOP-BACK", Family.IPv6: "KUBE-6-LOOP-BACK"}
FAMILIES = {Family.IPv4: "inet", Family.IPv6: "inet6"}
SAVED = [
    "",
    "-j RETURN",
    "-j MARK --set-xmark 0x4000/0x4000",
    "-j MARK --set-xmark 0x4000/0x0",
    "-m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-m mark --mark 0x1 -j ACCEPT",
    '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-m comment --comment plain-word_1 -j MASQUERADE",
    '-s 10.1.2.3/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ',
    "! -s 10.0.0.0/8 -d 10.96.0.1/32 -p sctp -m sctp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O",
    "-i cali+ -j KUBE-SVC-XPGD46QRK7WJZT7O",
    "! -i cni0 -j KUBE-MARK-MASQ",
    '-m comment --comment "a/b -> 10.0.0.1:80" -m statistic --mode random --probability 0.33333333349 -j KUBE-SEP-A',
    "-m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-A --mask 255.255.255.255 --rsource -j KUBE-SEP-A",
    "-p udp -m recent --set --name A --mask 255.255.255.255 --rsource -m udp -j DNAT --to-destination 10.0.0.1:53",
    "-p tcp -m addrtype --dst-type LOCAL -m tcp --dport 3001 -j REJECT --reject-with icmp-port-unreachable",
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    "-m conntrack --ctstate INVALID -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP",
    '-m comment --comment "it\\\'s \\"quoted\\" \\\\ twice"',
    '-m comment --comment "!"',
    "-p sctp -m set --match-set KUBE-NODE-PORT-SCTP-HASH dst,dst -j KUBE-MARK-MASQ",
    "-m set --match-set KUBE-EXTERNAL-IP dst,dst -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT",
    "-s 192.0.2.1/32 -m ipvs --vproto 6 --vaddr 192.0.2.1 --vport 80 -j DROP",
]


@pytest.mark.parametrize("text", SAVED)
def test_what_was_saved_is_understood_and_printed_the_same(text: str) -> None:
    rule = parse_rule(text, Family.IPv4)

    assert isinstance(rule, Rule)
    assert str(rule) == text


@pytest.mark.parametrize(
    ("given", "saved", "family"),
    [
        ("-j MARK --or-mark 0x004000", "-j MARK --set-xmark 0x4000/0x4000", Family.IPv4),
        ("-j MARK --xor-mark 0x004000", "-j MARK --set-xmark 0x4000/0x0", Family.IPv4),
        ("-j REJECT", "-j REJECT --reject-with icmp-port-unreachable", Family.IPv4),
        ("-j REJECT", "-j REJECT --reject-with icmp6-port-unreachable", Family.IPv6),
        (
            "-m comment --comment a/b:c -m tcp -p tcp -d fd00::41 --dport 80 ! -s fd00:10::/64 -j KUBE-MARK-MASQ",
            '! -s fd00:10::/64 -d fd00::41/128 -p tcp -m comment --comment "a/b:c" -m tcp --dport 80 -j KUBE-MARK-MASQ',
            Family.IPv6,
        ),
        (
            "-m recent --name KUBE-SEP-A --set -j ACCEPT",
            "-m recent --set --name KUBE-SEP-A --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource -j ACCEPT",
            Family.IPv6,
        ),
        (
            "-m statistic --mode random --probability 0.3333333333 -j RETURN",
            "-m statistic --mode random --probability 0.33333333349 -j RETURN",
            Family.IPv4,
        ),
        ("-p 6 -m tcp -j DROP", "-p tcp -m tcp -j DROP", Family.IPv4),
        ("-s ::ffff:10.0.0.1/128 -j DROP", "-s ::ffff:a00:1/128 -j DROP", Family.IPv6),
        (
            "-m ipvs --vaddr ::10.0.0.1 --vproto tcp --vport 80 -j DROP",
            "-m ipvs --vproto 6 --vaddr ::a00:1 --vport 80 -j DROP",
            Family.IPv6,
        ),
    ],
)
def test_what_is_given_is_the_same_rule_as_what_is_saved(given: str, saved: str, family: Family) -> None:
    assert str(parse_rule(given, family)) == saved
    assert parse_rule(given, family) == parse_rule(saved, family)


@pytest.mark.parametrize(
    "text",
    [
        "-p tcp -m multiport --dports 80,443 -j ACCEPT",
        "-p tcp -m tcp --dport 80:90 -j ACCEPT",
        "-p tcp -m tcp ! --dport 80 -j ACCEPT",
        "-p tcp -m tcp --sport 80 -j ACCEPT",
        "-p tcp -m tcp --dport 0 -j ACCEPT",
        "-p tcp -m tcp --dport 80 -m tcp --dport 81 --dport 82 -j ACCEPT",
        "-m tcp --dport 80 -j ACCEPT",
        "! -p tcp -j ACCEPT",
        "-p icmp -j ACCEPT",
        "-o eth0 -j KUBE-SERVICES",
        "-g KUBE-SERVICES",
        "-j DOCKER",
        '-m limit --limit 5/sec -j LOG --log-prefix "dropped: "',
        "-m recent --update --seconds 60 --name X --mask 255.255.255.255 --rsource -j DROP",
        "-m recent --rcheck --seconds 60 --reap --name X --mask 255.255.255.255 --rdest -j DROP",
        "-m recent --rcheck --seconds 60 --hitcount 4 --name X --mask 255.255.255.255 --rsource -j DROP",
        "-m statistic --mode nth --every 3 --packet 0 -j DROP",
        "-m addrtype ! --dst-type LOCAL -j DROP",
        "-m addrtype --dst-type LOCAL --limit-iface-in -j DROP",
        "-j DNAT --to-destination 10.0.0.1:80 --persistent",
        "-j DNAT --to-destination 10.0.0.1:80 --to-destination 10.0.0.2:80",
        "-j MASQUERADE --to-ports 1024-2048",
        "-s 10.0.0.0/255.0.255.0 -j DROP",
        "-m set ! --match-set KUBE-CLUSTER-IP dst,dst -j RETURN",
        "-m set --match-set KUBE-CLUSTER-IP dst,dst --return-nomatch -j RETURN",
        "-m set --match-set KUBE-CLUSTER-IP",
        "-m physdev --physdev-is-in -j RETURN",
        "-m physdev --physdev-in eth0 -j RETURN",
        "-m ipvs --ipvs -j RETURN",
        "-m ipvs --vproto 6 --vaddr 10.0.0.1 -j RETURN",
        "-m ipvs --vproto 6 --vaddr 10.0.0.0/8 --vport 80 -j RETURN",
        "-m ipvs --vproto 6 ! --vaddr 10.0.0.1 --vport 80 -j RETURN",
        "-m comment --comment",
        "-j",
        "!",
    ],
)
def test_anything_else_is_kept_as_it_is(text: str) -> None:
    assert parse_rule(text, Family.IPv4) == OpaqueRule(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1.00000000000"), (2, "0.50000000000"), (3, "0.33333333349"), (4, "0.25000000000"), (7, "0.14285714272")],
)
def test_the_chance_of_one_endpoint_among_several(count: int, text: str) -> None:
    assert str(Statistic(probability(count))) == f"-m statistic --mode random --probability {text}"


def test_rules_that_do_the_same_are_equal_and_have_one_hash() -> None:
    one, other = (parse_rule('-s 10.0.0.1/32 -m comment --comment "a b" -j DROP', Family.IPv4) for _ in range(2))

    assert one == other
    assert len({one, other, parse_rule("-j DROP", Family.IPv4)}) == 2


# What survives the kernel unchanged: comments of up to 255 bytes.
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60)
ports = st.integers(1, 65535)
marks = st.integers(1, 0xFFFFFFFF)
chains = st.sampled_from(["ACCEPT", "RETURN", "KUBE-SERVICES", "KUBE-SVC-XPGD46QRK7WJZT7O"])


def addresses(family: Family) -> st.SearchStrategy[str]:
    return st.ip_addresses(network="0.0.0.0/0" if family is Family.IPv4 else "2000::/3").map(str)


def networks(family: Family) -> st.SearchStrategy[Network]:
    hosts = addresses(family).map(lambda a: f"{a}/{family.bits}")
    prefixes = st.sampled_from(
        ["10.0.0.0/8", "192.0.2.128/25"] if family is Family.IPv4 else ["fd00::/8", "2001:db8::/127"]
    )
    return st.builds(Network, hosts | prefixes, st.booleans())


def rules(family: Family) -> st.SearchStrategy[Rule]:
    names = st.sampled_from(["KUBE-SEP-V2PECCYPB6X2GSCW", "KUBE-SEP-YIL6JZP7A3QYXJU2"])
    matches: st.SearchStrategy[Match] = st.one_of(
        st.builds(Comment, texts),
        st.builds(Conntrack, st.sampled_from(["NEW", "INVALID", "RELATED,ESTABLISHED"]), st.booleans()),
        st.builds(AddressType, source=st.just("LOCAL"), source_inverted=st.booleans()),
        st.builds(AddressType, destination=st.just("LOCAL")),
        st.builds(lambda value, rest, no: MarkMatch(value, value | rest, no), marks, marks, st.booleans()),
        st.builds(Statistic, st.integers(1, 5000).map(probability)),
        st.builds(Recent, names, st.just(HOST_MASK[family]), st.integers(0, 86400)),
        st.builds(Nfacct, st.sampled_from([INVALID_DROPPED, LOCALHOST_ACCEPTED])),
        st.builds(SetMatch, st.just(SETS[family]), st.sampled_from(["dst", "src,dst", "dst,dst,src"])),
        st.just(NotBridged()),
    )

    def to(address: str, port: int) -> Dnat:
        return Dnat(f"[{address}]:{port}" if family is Family.IPv6 else f"{address}:{port}")

    plain: st.SearchStrategy[Target | None] = st.none() | chains.map(Jump)

    def of(protocol: str) -> st.SearchStrategy[Rule]:
        needs: st.SearchStrategy[Target | None] = plain
        transport = st.just(())
        if protocol:
            needs = st.one_of(plain, st.builds(to, addresses(family), ports))
            transport = st.just((Transport(protocol),)) | ports.map(lambda port: (Transport(protocol, port),))
        return st.builds(
            lambda matches, transport, **others: Rule((*matches, *transport), protocol=protocol, **others),
            matches=st.lists(matches, max_size=3),
            transport=transport,
            target=needs,
            source=st.none() | networks(family),
            destination=st.none() | networks(family),
            in_interface=st.none() | st.builds(Interface, st.sampled_from(["eth0", "cali+"]), st.booleans()),
        )

    marking = st.builds(lambda value, mask: Rule((), SetMark(value, mask)), marks, marks)
    return st.sampled_from(["", "tcp", "udp", "sctp"]).flatmap(of) | marking


@given(st.sampled_from(Family).flatmap(lambda f: st.tuples(st.just(f), rules(f))))
def test_every_rule_can_be_read_back(case: tuple[Family, Rule]) -> None:
    family, rule = case

    assert parse_rule(str(rule), family) == rule


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("variant", ["legacy", "nft"])
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],  # each example is two processes: no shrinking
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_the_kernel_gives_back_what_was_written(
    data: st.DataObject, variant: str, family: Family, make_netns: MakeNetns
) -> None:
    command = f"{'iptables' if family is Family.IPv4 else 'ip6tables'}-{variant}"
    written = data.draw(st.lists(rules(family).filter(str), min_size=20, max_size=40))
    chains = {"KUBE-SERVICES": [], "KUBE-SVC-XPGD46QRK7WJZT7O": [], "KUBE-EXT-XPGD46QRK7WJZT7O": written}
    netns = make_netns()
    netns.run(ensure_counters, (INVALID_DROPPED, LOCALHOST_ACCEPTED))
    netns.command("ipset", "create", SETS[family], "hash:ip,port,ip", "family", FAMILIES[family])

    netns.command(f"{command}-restore", stdin=restore_text({"nat": chains}))

    saved = netns.command(f"{command}-save", "-t", "nat").stdout.splitlines()
    assert [line for line in saved if line.startswith("-A ")] == [
        f"-A KUBE-EXT-XPGD46QRK7WJZT7O {rule}" for rule in written
    ]
    assert read_tables(saved, family)["nat"]["KUBE-EXT-XPGD46QRK7WJZT7O"] == written


def test_kinds_that_iptables_mode_does_not_need_can_be_written_from_within_the_process(netns: Namespace) -> None:
    rules = [
        parse_rule("-p sctp -m set --match-set KUBE-LOOP-BACK dst,dst,src -j RETURN", Family.IPv4),
        parse_rule("-m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT", Family.IPv4),
    ]
    netns.command("ipset", "create", SETS[Family.IPv4], "hash:ip,port,ip")
    library = netns.run(InProcess, Family.IPv4)

    chain = "KUBE-SERVICES"
    written = [Command(":", chain, None), *(Command("-A", chain, None, rule) for rule in rules)]
    netns.run(library.write, [Commit("nat", written)])

    assert saved_rules(netns, chain) == rules
    netns.run(library.write, [Commit("nat", [Command("-D", chain, None, rule) for rule in rules])])
    assert saved_rules(netns, chain) == []


def saved_rules(netns: Namespace, chain: str) -> list[AnyRule]:
    saved = netns.command("iptables-legacy-save", "-t", "nat").stdout.splitlines()
    return read_tables(saved, Family.IPv4)["nat"][chain]
