"""What kube-proxy's own tests recorded of its rules: the same objects in, the same rules out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

from kproxy.cluster import ClusterState
from kproxy.cluster.size import LARGE
from kproxy.dataplane.base import Entries, diff
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.accounting import ensure_counters
from kproxy.dataplane.iptables.entries import ChainKey, entries_of, is_kubelets
from kproxy.dataplane.iptables.fixed import render_base
from kproxy.dataplane.iptables.localhost import ROUTE_LOCALNET
from kproxy.dataplane.iptables.options import INVALID_DROPPED, LOCALHOST_ACCEPTED, Options
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.render import render_route
from kproxy.dataplane.iptables.rule import AnyRule, Dnat, OpaqueRule
from kproxy.model import Family, LocalDetector, NodeFacts, ServiceName
from tests.conformance import recorded
from tests.iptables.tables import laid_out, read_tables, restore_text
from tests.lab.namespaces import Namespace

DUMPS = recorded.read("dumps-iptables.json")

# kube-proxy's tests keep what was not quoted.
UNQUOTED = re.compile(r"--comment (kubernetes [^\"]*?) -j")
DISPATCH_ORDER = (names.NODE_PORTS, names.SERVICES)


class Scenario:
    """The life of one recorded proxier."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.family = Family[config["ip_family"]]
        self.state: ClusterState = recorded.new_state(config["node_name"], [self.family])

    def advance(self, step: Mapping[str, Any]) -> None:
        self.config |= step.get("config_change", {})
        recorded.drop(self.state, *step["delete"])
        recorded.put(self.state, *step["apply"])

    @property
    def facts(self) -> NodeFacts:
        config, detect = self.config, self.config["detect_local"]
        detector = LocalDetector(
            cidr=detect.get("cidr", ""),
            interface=detect.get("bridge_interface", ""),
            interface_prefix=detect.get("interface_prefix", ""),
        )
        return NodeFacts(
            name=config["node_name"],
            families=(self.family,),
            ips={self.family: config["node_ip"]},
            detectors={self.family: detector},
            node_port_addresses={
                self.family: None if config["node_port_addresses_match_all"] else tuple(config["node_port_ips"])
            },
            masquerade_all=config["masquerade_all"],
            masquerade_bit=config["masquerade_bit"],
        )

    @property
    def options(self) -> Options:
        endpoints = sum(
            len(self.state.endpoints(port))
            for service in self.state.services()
            for port in self.state.service_ports(service)
        )
        return Options(
            random_fully=self.config["masquerade_random_fully"],
            drop_invalid=not self.config["conntrack_tcp_be_liberal"],
            localhost_node_ports=self.config["localhost_node_ports"],
            counters=frozenset(self.config["nfacct_counters"]),
            large_clusters=frozenset({self.family} if endpoints > LARGE else ()),
        )

    def entries(self) -> Entries:
        """All that is in force, but for the chains that only show that somebody flushed everything."""
        entries = render_base(self.facts, self.options) | self.entries_of_services(self.state.services())
        return {key: value for key, value in entries.items() if not is_canary(key) and key != ROUTE_LOCALNET}

    def entries_of_services(self, services: Iterable[ServiceName]) -> Entries:
        entries: Entries = {}
        for service in services:
            for route in self.state.routes(service):
                entries |= render_route(route, self.facts, self.options)
        return entries


def is_canary(key: object) -> bool:
    return isinstance(key, ChainKey) and key.chain == names.CANARY


def scenarios() -> list[Any]:
    return [pytest.param(s, id=s["id"].partition("/")[2]) for s in DUMPS["scenarios"]]


def quoted(lines: list[str]) -> list[str]:
    return [UNQUOTED.sub(r'--comment "\1" -j', line) for line in lines]


def complaints(wanted: Entries, actual: Entries) -> list[str]:
    return [f"{c.key}\n  kube-proxy: {shown(c.old)}\n  kproxy:     {shown(c.new)}" for c in diff(wanted, actual)]


def shown(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("scenario", scenarios())
def test_all_rules_of_every_step(scenario: dict[str, Any]) -> None:
    given = Scenario(scenario["config"])

    for step in scenario["steps"]:
        given.advance(step)
        if "save" in step["observed"] and not step["sync_failed"]:
            tables = read_tables(quoted(step["observed"]["save"]), given.family)
            theirs = entries_of(given.family, tables, guards_localhost=given.options.guards_localhost(given.family))

            assert complaints(given.entries(), theirs) == []
            assert not any(isinstance(r, OpaqueRule) for chains in tables.values() for c in chains.values() for r in c)


@pytest.mark.parametrize("scenario", scenarios())
def test_what_each_step_changes(scenario: dict[str, Any]) -> None:
    """kube-proxy writes the chains of changed services and the shared ones; the others must not have changed."""
    given = Scenario(scenario["config"])
    before: Mapping[str, Any] = {}

    for step in scenario["steps"]:
        given.advance(step)
        ours = laid_out(given.entries())
        theirs = read_tables(
            (line for line in step["asserted"].get("restore_sorted", ()) if not line.startswith("-X")), given.family
        )
        for table, chains in theirs.items():
            gone = {line[3:] for line in step["asserted"]["restore_sorted"] if line.startswith("-X ")}
            assert gone.isdisjoint(ours[table])
            for chain, rules in chains.items():
                assert [str(r) for r in in_recorded_order(table, chain, ours[table].get(chain, []))] == [
                    str(r) for r in rules
                ], f"{table} {chain}"
            for chain in before.get(table, {}).keys() - chains.keys():
                assert ours[table].get(chain) == before[table][chain], f"{table} {chain} changed, and kube-proxy's not"
        before = ours


@pytest.mark.parametrize("scenario", scenarios())
def test_single_chains_and_numbers(scenario: dict[str, Any]) -> None:
    given = Scenario(scenario["config"])

    for step in scenario["steps"]:
        given.state.dirty.clear()
        given.advance(step)
        changed = list(given.state.services() if step["full_sync"] else given.state.dirty)
        ours = laid_out(given.entries())
        for expected in step["asserted"].get("chains", ()):
            lines = [f"*{expected['table']}", *expected["rules"]]
            theirs = read_tables(lines, given.family)[expected["table"]].get(expected["chain"], [])
            assert ours[expected["table"]][expected["chain"]] == theirs
        if counts := step["asserted"].get("rule_counts"):
            written = {
                table: sum(len(rules) for chain, rules in ours[table].items() if chain.startswith("KUBE-"))
                for table in ("filter", "nat")
            }
            assert written == {"filter": counts["filter_rules"], "nat": counts["nat_rules"]}
        for expected in step["asserted"].get("endpoint_rules", ()):
            dnats = list(endpoint_rules(laid_out(given.entries_of_services(changed))["nat"]))
            assert len(dnats) == expected["endpoint_rules"]
            assert sum(bool(rule.comment) for rule in dnats) == expected["with_comment"]
            if expected["rule"]:
                assert parse_rule(expected["rule"].partition(" KUBE-SEP-")[2].partition(" ")[2], given.family) in dnats
        if ingress := step["asserted"].get("load_balancer_ip"):
            handled = any(f"-d {ingress['ip']}/" in str(rule) for rule in ours["nat"][names.SERVICES])
            assert handled is ingress["handled_by_proxy"]


@pytest.mark.parametrize("case", DUMPS["clean_up"], ids=lambda case: case["test"])
def test_what_stays_after_clean_up(case: dict[str, Any]) -> None:
    before = read_tables(quoted(case["before"]), Family.IPv4)
    after = read_tables(quoted(case["expected_after"]), Family.IPv4)

    ours = entries_of(Family.IPv4, before, guards_localhost=True)

    leaves = {key for key in ours if not is_kubelets(key)}
    removed = laid_out({key: ours[key] for key in leaves})
    for table, chains in before.items():
        for chain, rules in chains.items():
            mine = removed.get(table, {}).get(chain, [])
            kept = [rule for rule in rules if rule not in mine]
            if chain in after[table]:
                assert kept == after[table][chain]
            else:
                assert kept == []
                assert ChainKey(Family.IPv4, table, chain) in leaves


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_kernel_gives_back_every_recorded_rule(variant: str, netns: Namespace) -> None:
    """All steps, one after the other, through the real tools: what is saved is what was written, letter for letter."""
    netns.run(ensure_counters, (INVALID_DROPPED, LOCALHOST_ACCEPTED))
    seen: set[str] = set()
    for scenario in DUMPS["scenarios"]:
        given = Scenario(scenario["config"])
        for step in scenario["steps"]:
            given.advance(step)
            entries = given.entries()
            tables = laid_out(entries)
            if restore_text(tables) in seen:
                continue
            seen.add(restore_text(tables))
            prefix = "iptables" if given.family is Family.IPv4 else "ip6tables"
            netns.command(f"{prefix}-{variant}-restore", stdin=restore_text(tables))

            saved = netns.command(f"{prefix}-{variant}-save").stdout

            lines = sorted(line for line in saved.splitlines() if line.startswith("-A "))
            wanted = (f"-A {chain} {r}" for chains in tables.values() for chain, rules in chains.items() for r in rules)
            assert lines == sorted(wanted)
            found = read_tables(saved.splitlines(), given.family)
            guarded = given.options.guards_localhost(given.family)
            assert complaints(entries, entries_of(given.family, found, guards_localhost=guarded)) == []
    assert seen


def endpoint_rules(chains: Mapping[str, list[AnyRule]]) -> Iterator[AnyRule]:
    for chain, rules in chains.items():
        if chain.startswith(names.ENDPOINT):
            yield from (rule for rule in rules if isinstance(rule.target, Dnat))


def in_recorded_order(table: str, chain: str, rules: list[AnyRule]) -> list[AnyRule]:
    """The recordings sort the rules of two chains by the Service's name, but for the rule that must be last."""
    if chain not in DISPATCH_ORDER:
        return rules
    last = [rule for rule in rules if "must be the last rule" in rule.comment]
    others = [rule for rule in rules if rule not in last]
    return [*sorted(others, key=lambda rule: re.split("[ :]", rule.comment)[0]), *last]
