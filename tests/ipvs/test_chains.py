"""What of the kernel's rules is ours in ipvs mode, and what counts as a difference."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import Change, Entries, diff
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.rule import AnyRule
from kproxy.dataplane.ipvs.chains import chain_entries, concerns_us, laid_out
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import STRAY, RuleKey
from kproxy.model import Family
from tests.iptables.tables import BUILT_IN, Tables
from tests.ipvs.samples import cluster, everything
from tests.ipvs.tools import read, readable, write
from tests.lab.namespaces import Namespace

V4 = Family.IPv4
BARRED = "-s 198.51.100.20/32 -m ipvs --vproto 6 --vaddr 198.51.100.20 --vport 80 -j DROP"


def of_tables(entries: Entries) -> Entries:
    return {key: entries[key] for key in entries if isinstance(key, ChainKey | RuleKey | JumpKey) and key.family is V4}


@pytest.fixture
def wanted() -> Entries:
    """Every rule that there can be."""
    return of_tables(everything())


@pytest.fixture
def tables(wanted: Entries) -> Tables:
    """As they are when all is well."""
    found: Tables = {table: {chain: [] for chain in chains} for table, chains in BUILT_IN.items()}
    for key, rules in laid_out(wanted).items():
        found[key.table][key.chain] = list(rules)
    for key, value in sorted(wanted.items(), key=lambda item: isinstance(item[0], JumpKey) and item[0].place):
        if isinstance(key, JumpKey):
            found[key.table][key.chain].append(value)
    return found


def changes(wanted: Entries, tables: Tables) -> list[Change]:
    return diff(wanted, chain_entries(V4, tables))


def rule(text: str) -> AnyRule:
    return parse_rule(text, V4)


def stray(chain: str, text: AnyRule, table: Table = "nat") -> RuleKey:
    return RuleKey(V4, table, chain, STRAY, str(text))


def test_all_is_well(wanted: Entries, tables: Tables) -> None:
    assert changes(wanted, tables) == []


def test_empty_tables_lack_everything(wanted: Entries) -> None:
    assert {change.key for change in changes(wanted, {})} == set(wanted)


def test_rules_of_sets_that_are_empty_now_are_differences(wanted: Entries, tables: Tables) -> None:
    fewer = of_tables(cluster())

    found = changes(fewer, tables)

    assert {change.key for change in found} == wanted.keys() - fewer.keys()
    assert all(change.new is None for change in found)


@pytest.mark.parametrize(
    ("table", "chain"),
    [
        ("nat", "KUBE-SERVICES"),
        ("nat", "KUBE-POSTROUTING"),
        ("nat", "KUBE-NODE-PORT"),
        ("nat", "KUBE-LOAD-BALANCER"),
        ("filter", "KUBE-FORWARD"),
        ("filter", "KUBE-SOURCE-RANGES-FIREWALL"),
        ("filter", "KUBE-IPVS-FILTER"),
    ],
)
def test_any_two_rules_in_the_other_order_are_a_difference(
    wanted: Entries, tables: Tables, table: Table, chain: str
) -> None:
    rules = tables[table][chain]
    assert len(rules) > 1
    for number in range(len(rules) - 1):
        swapped = [*rules[:number], rules[number + 1], rules[number], *rules[number + 2 :]]

        found = changes(wanted, {table: {chain: swapped}, **{t: c for t, c in tables.items() if t != table}})

        assert any(c.key[:3] == (V4, table, chain) and isinstance(c.key, RuleKey) for c in found), number


def test_the_order_of_barred_addresses_means_nothing(wanted: Entries, tables: Tables) -> None:
    assert len(tables["filter"]["KUBE-IPVS-OUT-FILTER"]) == 2
    tables["filter"]["KUBE-IPVS-OUT-FILTER"].reverse()

    assert changes(wanted, tables) == []


def test_a_barred_address_that_is_so_no_longer(wanted: Entries, tables: Tables) -> None:
    gone = rule(BARRED.replace("198.51.100.20", "198.51.100.29"))
    tables["filter"]["KUBE-IPVS-OUT-FILTER"].append(gone)

    key = RuleKey(V4, "filter", "KUBE-IPVS-OUT-FILTER", 0, "198.51.100.29:80/TCP")
    assert changes(wanted, tables) == [Change(key, (gone,), None)]


@pytest.mark.parametrize("place", [0, 2, 100])
@pytest.mark.parametrize("text", ["-p icmp -j DROP", "-j ACCEPT", "-m set --match-set MINE src -j KUBE-MARK-MASQ"])
def test_a_rule_of_somebody_else(wanted: Entries, tables: Tables, text: str, place: int) -> None:
    rules = tables["nat"]["KUBE-SERVICES"]
    rules.insert(place, rule(text))

    found = changes(wanted, tables)

    assert found == [Change(stray("KUBE-SERVICES", rule(text)), (rule(text),), None)]


def test_a_rule_of_somebody_else_among_barred_addresses(wanted: Entries, tables: Tables) -> None:
    tables["filter"]["KUBE-IPVS-OUT-FILTER"].insert(1, rule("-j ACCEPT"))

    found = changes(wanted, tables)

    assert found == [Change(stray("KUBE-IPVS-OUT-FILTER", rule("-j ACCEPT"), "filter"), (rule("-j ACCEPT"),), None)]


def test_a_rule_that_is_there_twice(wanted: Entries, tables: Tables) -> None:
    first, second = tables["nat"]["KUBE-SERVICES"][0], tables["nat"]["KUBE-LOAD-BALANCER"][0]
    tables["nat"]["KUBE-SERVICES"].insert(1, first)
    tables["nat"]["KUBE-LOAD-BALANCER"].append(second)
    tables["filter"]["KUBE-IPVS-OUT-FILTER"].append(rule(BARRED))

    assert set(map(str, changes(wanted, tables))) == {
        str(Change(RuleKey(V4, "nat", "KUBE-SERVICES", 0), (first, first), (first,))),
        str(Change(stray("KUBE-LOAD-BALANCER", second), (second,), None)),
        str(Change(stray("KUBE-IPVS-OUT-FILTER", rule(BARRED), "filter"), (rule(BARRED),), None)),
    }


def test_a_rule_that_was_edited(wanted: Entries, tables: Tables) -> None:
    good = tables["nat"]["KUBE-SERVICES"][2]
    edited = rule("-m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ")
    tables["nat"]["KUBE-SERVICES"][2] = edited

    assert changes(wanted, tables) == [Change(RuleKey(V4, "nat", "KUBE-SERVICES", 2), (edited,), (good,))]


def test_a_chain_that_was_deleted(wanted: Entries, tables: Tables) -> None:
    del tables["filter"]["KUBE-NODE-PORT"]

    assert {change.key for change in changes(wanted, tables)} == {
        ChainKey(V4, "filter", "KUBE-NODE-PORT"),
        RuleKey(V4, "filter", "KUBE-NODE-PORT", 0),
    }


def test_what_iptables_mode_left_in_a_chain_of_the_same_name(wanted: Entries, tables: Tables) -> None:
    left = rule(
        '-d 10.96.0.1/32 -p tcp -m comment --comment "a/b:c cluster IP" -m tcp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O'
    )
    tables["nat"]["KUBE-SERVICES"].append(left)
    tables["nat"]["KUBE-SVC-XPGD46QRK7WJZT7O"] = []

    assert [change.old for change in changes(wanted, tables)] == [(left,)]


def test_chains_of_others_are_not_ours(wanted: Entries, tables: Tables) -> None:
    tables["nat"] |= {"DOCKER": [rule("-j RETURN")], "KUBE-KUBELET-CANARY": [], "KUBE-NODEPORTS": []}
    tables["filter"] |= {"KUBE-FIREWALL": [rule("-j DROP")], "KUBE-SERVICES": []}

    assert changes(wanted, tables) == []
    assert not concerns_us("nat", "DOCKER")
    assert not concerns_us("filter", "KUBE-SERVICES")
    assert concerns_us("nat", "KUBE-SERVICES")
    assert concerns_us("filter", "OUTPUT")


def test_chains_as_they_are_to_be_written(wanted: Entries) -> None:
    key = ChainKey(V4, "nat", "KUBE-LOAD-BALANCER")
    first, second = RuleKey(V4, "nat", "KUBE-LOAD-BALANCER", 0), RuleKey(V4, "nat", "KUBE-LOAD-BALANCER", 1)

    assert laid_out({second: wanted[second], first: wanted[first]}) == {key: (*wanted[first], *wanted[second])}
    assert laid_out({key: EXISTS}) == {key: ()}


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_kernel_gives_back_every_set_and_rule(netns: Namespace, variant: str, family: Family) -> None:
    # The kernel here need not have IPVS, without which it takes no rule about virtual servers.
    entries = {key: value for key, value in everything(family).items() if "--vaddr" not in describe(key, value)}

    write(netns, variant, entries, family)

    assert diff(readable(entries, family), read(netns, variant, family)) == []


class TestJumps:
    def test_one_that_was_deleted_is_the_only_difference(self, wanted: Entries, tables: Tables) -> None:
        deleted = tables["filter"]["INPUT"].pop(1)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "filter", "INPUT", 1), None, deleted)]

    def test_they_may_stand_in_any_order_between_rules_of_others(self, wanted: Entries, tables: Tables) -> None:
        tables["filter"]["INPUT"].reverse()
        tables["filter"]["INPUT"].insert(1, rule("-i lo -j ACCEPT"))
        tables["filter"]["INPUT"].insert(0, rule("-j KUBE-FIREWALL"))

        assert changes(wanted, tables) == []

    def test_a_second_one_is_too_many(self, wanted: Entries, tables: Tables) -> None:
        jump = tables["nat"]["PREROUTING"][0]
        tables["nat"]["PREROUTING"].append(jump)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "PREROUTING", 1), jump, None)]

    def test_the_right_one_counts_even_behind_that_of_iptables_mode(self, wanted: Entries, tables: Tables) -> None:
        other = rule('-m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES')
        tables["nat"]["PREROUTING"].insert(0, other)

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "PREROUTING", 1), other, None)]

    def test_one_that_was_edited(self, wanted: Entries, tables: Tables) -> None:
        [jump], edited = tables["nat"]["OUTPUT"], rule("-s 10.0.0.0/8 -j KUBE-SERVICES")
        tables["nat"]["OUTPUT"] = [edited]

        assert changes(wanted, tables) == [Change(JumpKey(V4, "nat", "OUTPUT", 0), edited, jump)]
