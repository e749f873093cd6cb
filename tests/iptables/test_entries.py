"""What of the kernel's tables is ours, and what counts as a difference."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import Change, Entries, diff
from kproxy.dataplane.iptables.describe import describe, labels
from kproxy.dataplane.iptables.entries import EXISTS, BlockKey, ChainKey, JumpKey, entries_of, is_kubelets
from kproxy.dataplane.iptables.localhost import ROUTE_LOCALNET
from kproxy.dataplane.iptables.options import Options
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.rule import AnyRule
from kproxy.model import Family, ServiceName
from tests.iptables.samples import LOCAL, REMOTE, cluster, routed, service_port
from tests.iptables.tables import Tables, laid_out

V4 = Family.IPv4
SVC = "KUBE-SVC-XPGD46QRK7WJZT7O"
TAIL = BlockKey(V4, "nat", "KUBE-SERVICES", "", "")


@pytest.fixture
def wanted() -> Entries:
    """Two services, one of them in every dispatch chain."""
    full = service_port(
        node_port=30080,
        load_balancer_ips=("192.0.2.10",),
        external_ips=("198.51.100.1",),
        source_ranges=("203.0.113.0/24",),
        health_check_node_port=30999,
        external_local=True,
    )
    other = service_port("svc2", cluster_ip="10.96.0.31", node_port=30081)
    return cluster(routed(full, LOCAL, REMOTE), routed(other, REMOTE))


@pytest.fixture
def tables(wanted: Entries) -> Tables:
    """As they are when all is well."""
    return laid_out(wanted)


def changes(wanted: Entries, tables: Tables) -> list[Change]:
    return diff(wanted, entries_of(V4, tables, guards_localhost=False))


def rule(text: str) -> AnyRule:
    return parse_rule(text, V4)


def test_all_is_well(wanted: Entries, tables: Tables) -> None:
    assert changes(wanted, tables) == []


def test_another_order_of_rules_in_a_chain(wanted: Entries, tables: Tables) -> None:
    tables["nat"][SVC].reverse()

    assert [change.key for change in changes(wanted, tables)] == [ChainKey(V4, "nat", SVC)]


def test_another_order_of_services_is_none(wanted: Entries, tables: Tables) -> None:
    *services, last = tables["nat"]["KUBE-SERVICES"]
    services.sort(key=lambda r: "svc2" not in r.comment)
    tables["nat"]["KUBE-SERVICES"] = [*services, last]
    assert "svc2" in services[0].comment

    assert changes(wanted, tables) == []


def test_another_order_of_one_services_rules(wanted: Entries, tables: Tables) -> None:
    *services, last = tables["nat"]["KUBE-SERVICES"]
    tables["nat"]["KUBE-SERVICES"] = [*reversed(services), last]

    assert [c.key for c in changes(wanted, tables)] == [BlockKey(V4, "nat", "KUBE-SERVICES", "ns1/svc1:p80", "tcp")]


def test_a_service_behind_the_node_ports_is_not_where_it_belongs(wanted: Entries, tables: Tables) -> None:
    first, *others = tables["nat"]["KUBE-SERVICES"]
    tables["nat"]["KUBE-SERVICES"] = [*others, first]

    found = {change.key: change for change in changes(wanted, tables)}

    assert set(found) == {BlockKey(V4, "nat", "KUBE-SERVICES", "ns1/svc1:p80", "tcp"), TAIL}
    assert found[TAIL].old == (*found[TAIL].new, first)


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize(
    "text", ["-p icmp -j DROP", "-j RETURN", "-s 10.0.0.1/32 -m comment --comment mine -j DROP", "-g KUBE-NODEPORTS"]
)
def test_a_rule_of_somebody_else_in_a_shared_chain(wanted: Entries, tables: Tables, text: str, place: int) -> None:
    tables["nat"]["KUBE-SERVICES"].insert(place, rule(text))
    tables["filter"]["KUBE-SERVICES"].insert(place, rule(text))

    found = {change.key: change for change in changes(wanted, tables)}

    assert set(found) == {TAIL, BlockKey(V4, "filter", "KUBE-SERVICES", "", "")}
    assert rule(text) in found[TAIL].old
    assert found[BlockKey(V4, "filter", "KUBE-SERVICES", "", "")].new is None


def test_a_rule_that_was_edited_or_removed(wanted: Entries, tables: Tables) -> None:
    tables["nat"][SVC][1] = rule("-j RETURN")
    del tables["nat"]["KUBE-NODEPORTS"][0]

    found = {change.key: change for change in changes(wanted, tables)}

    assert set(found) == {ChainKey(V4, "nat", SVC), BlockKey(V4, "nat", "KUBE-NODEPORTS", "ns1/svc1:p80", "tcp")}


def test_a_chain_that_nobody_wants_any_more(wanted: Entries, tables: Tables) -> None:
    tables["nat"]["KUBE-SEP-AAAAAAAAAAAAAAAA"] = [rule("-j RETURN")]

    gone = ChainKey(V4, "nat", "KUBE-SEP-AAAAAAAAAAAAAAAA")
    assert changes(wanted, tables) == [Change(gone, (rule("-j RETURN"),), None)]


def test_empty_tables_lack_everything(wanted: Entries) -> None:
    assert {change.key for change in changes(wanted, laid_out({}))} == set(wanted)


class TestJumps:
    def test_one_that_was_deleted_is_the_only_difference(self, wanted: Entries, tables: Tables) -> None:
        deleted = tables["filter"]["INPUT"].pop(1)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "filter", "INPUT", 1), None, deleted)]

    def test_they_may_stand_in_any_order_between_rules_of_others(self, wanted: Entries, tables: Tables) -> None:
        for table, chain in (("filter", "INPUT"), ("nat", "PREROUTING")):
            tables[table][chain].reverse()
            tables[table][chain].insert(1, rule("-i lo -j ACCEPT"))
            tables[table][chain].insert(0, rule("-j DOCKER"))

        assert changes(wanted, tables) == []

    def test_a_second_one_is_too_many(self, wanted: Entries, tables: Tables) -> None:
        jump = tables["nat"]["PREROUTING"][0]
        tables["nat"]["PREROUTING"].append(jump)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "PREROUTING", 1), jump, None)]

    def test_one_that_was_edited(self, wanted: Entries, tables: Tables) -> None:
        jump, edited = tables["nat"]["PREROUTING"][0], rule("-s 10.0.0.0/8 -j KUBE-SERVICES")
        tables["nat"]["PREROUTING"] = [edited]

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "PREROUTING", 0), edited, jump)]

    def test_the_right_one_counts_even_behind_an_edited_one(self, wanted: Entries, tables: Tables) -> None:
        edited = rule("-s 10.0.0.0/8 -j KUBE-SERVICES")
        tables["nat"]["PREROUTING"].insert(0, edited)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "PREROUTING", 1), edited, None)]


def test_chains_of_others_are_not_ours(wanted: Entries, tables: Tables) -> None:
    tables["nat"] |= {"DOCKER": [rule("-j RETURN")], "KUBE-KUBELET-CANARY": [], "cali-PREROUTING": []}
    tables["filter"] |= {"KUBE-SVC-XPGD46QRK7WJZT7O": [rule("-j RETURN")], "DOCKER-USER": []}
    tables["mangle"]["KUBE-IPTABLES-HINT"] = []

    assert changes(wanted, tables) == []


class TestKubeletsFirewall:
    guard = "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"

    def test_its_rules_are_not_ours_where_localhost_is_not_routed(self, wanted: Entries, tables: Tables) -> None:
        tables["filter"]["KUBE-FIREWALL"] = [rule(self.guard)]

        assert changes(wanted, tables) == []

    def test_other_jumps_to_it_are_kubelets(self, wanted: Entries, tables: Tables) -> None:
        tables["filter"]["INPUT"] += [rule("-j KUBE-FIREWALL"), rule("-i eth0 -j KUBE-FIREWALL")]

        assert changes(wanted, tables) == []

    def test_but_the_chain_must_be_there(self, wanted: Entries, tables: Tables) -> None:
        del tables["filter"]["KUBE-FIREWALL"]

        assert changes(wanted, tables) == [Change(ChainKey(V4, "filter", "KUBE-FIREWALL"), None, EXISTS)]

    def test_where_localhost_is_routed_the_guard_must_be_there(self) -> None:
        wanted = cluster(options=Options(localhost_node_ports=True))
        tables = laid_out(wanted)
        guard = tuple(tables["filter"]["KUBE-FIREWALL"])
        tables["filter"]["KUBE-FIREWALL"] = []

        found = diff(wanted, {**entries_of(V4, tables, guards_localhost=True), ROUTE_LOCALNET: 1})

        assert found == [Change(ChainKey(V4, "filter", "KUBE-FIREWALL"), (), guard)]

    def test_chain_and_jumps_stay_when_all_else_goes(self, wanted: Entries) -> None:
        assert {key for key in wanted if is_kubelets(key)} == {
            ChainKey(V4, "filter", "KUBE-FIREWALL"),
            JumpKey(V4, "filter", "INPUT", 0),
            JumpKey(V4, "filter", "OUTPUT", 0),
        }


class TestForPeople:
    def test_one_line_for_each_entry(self) -> None:
        reject = rule("-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j REJECT")
        block = BlockKey(Family.IPv6, "filter", "KUBE-SERVICES", "a/b:c", "tcp")

        assert describe(ChainKey(V4, "nat", "KUBE-SVC-A"), (rule("-j KUBE-MARK-MASQ"), rule("-j KUBE-SEP-B"))) == (
            "iptables nat chain KUBE-SVC-A: -j KUBE-MARK-MASQ; -j KUBE-SEP-B"
        )
        assert describe(ChainKey(V4, "mangle", "KUBE-PROXY-CANARY"), ()) == (
            "iptables mangle chain KUBE-PROXY-CANARY: no rules"
        )
        assert describe(ChainKey(V4, "nat", "KUBE-SERVICES"), EXISTS) == "iptables nat chain KUBE-SERVICES"
        assert describe(block, (reject,)) == f"ip6tables filter chain KUBE-SERVICES: {reject}"
        assert describe(JumpKey(V4, "nat", "OUTPUT", 0), rule("-j KUBE-SERVICES")) == (
            "iptables nat chain OUTPUT: -j KUBE-SERVICES"
        )

    @pytest.mark.parametrize("large", [frozenset(), frozenset({V4})], ids=["small cluster", "large cluster"])
    def test_entries_know_their_service(self, large: frozenset[Family]) -> None:
        port = service_port(node_port=30080, load_balancer_ips=("192.0.2.10",), source_ranges=("203.0.113.0/24",))
        options = Options(large_clusters=large)
        fixed = cluster(options=options)
        entries = cluster(routed(port, LOCAL, REMOTE), options=options)

        assert labels(entries) == {key: ServiceName("ns1", "svc1") for key in entries if key not in fixed}
