"""What kube-proxy's own tests recorded of its ipvs mode: the same objects in, the same kernel state out."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import Entries, diff
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey
from kproxy.dataplane.ipvs.addresses import usable
from kproxy.dataplane.ipvs.chains import chain_entries
from kproxy.dataplane.ipvs.entries import (
    AddressKey,
    DeviceKey,
    MemberKey,
    RealServer,
    RealServerKey,
    SetKey,
    SetKind,
    SetType,
    VirtualServer,
    VirtualServerKey,
)
from kproxy.dataplane.ipvs.fixed import render_base
from kproxy.dataplane.ipvs.names import DEVICE, set_name
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.render import render_route
from kproxy.model import Family, LocalDetector, NodeFacts, Protocol, canonical_address
from tests.conformance import recorded
from tests.iptables.tables import read_tables
from tests.ipvs.tools import forget, read, readable, write
from tests.lab.namespaces import Namespace

IPVS = recorded.read("ipvs.json")

# kube-proxy's tests keep what was not quoted, and build their proxy without a mark.
UNQUOTED = re.compile(r"--comment (kube(?:rnetes|-proxy) [^\"]*?) -j")
MARK = "0x4000"
WITHOUT_MARK = (
    ("--mark /", f"--mark {MARK}/{MARK}"),
    ("--xor-mark", f"--xor-mark {MARK}"),
    ("--or-mark", f"--or-mark {MARK}"),
)
SET_NAME = re.compile(r"(?<=--match-set )\S+")

# Where kproxy does otherwise unless it is told to do as kube-proxy: a policy Local has no endpoint on this node, and
# kube-proxy sends the traffic elsewhere. The virtual servers, and the endpoints that they do not have.
WITHOUT_FALLBACK = {
    "ipvs/TestNoEndpointsMetric/internalTrafficPolicy_is_set_and_there_are_no_local_endpoints": {
        ("172.20.1.1", "10.0.1.1"),
        ("172.20.1.1", "10.0.1.2"),
        ("172.20.1.1", "10.0.1.3"),
    },
}


class Scenario:
    """The life of one recorded proxier."""

    def __init__(self, config: Mapping[str, Any], *, stock_local_fallback: bool) -> None:
        self.config = dict(config)
        self.family = Family[config["ip_family"]]
        self.state: ClusterState = recorded.new_state(config["node_name"], [self.family])
        self.stock_local_fallback = stock_local_fallback

    def advance(self, step: Mapping[str, Any]) -> None:
        self.config |= step.get("config_change", {})
        recorded.drop(self.state, *step["delete"])
        recorded.put(self.state, *step["apply"])

    @property
    def facts(self) -> NodeFacts:
        config, detect, family = self.config, self.config["detect_local"], self.family
        chosen = None if config["node_port_addresses_match_all"] else tuple(config["node_port_ips"])
        return NodeFacts(
            name=config["node_name"],
            families=(family,),
            ips={family: config["node_ip"]} if config["node_ip"] else {},
            detectors={family: LocalDetector(cidr=detect.get("cidr", ""))},
            node_port_addresses={family: chosen},
            addresses={family: tuple(config["node_addresses"])},
            masquerade_all=config["masquerade_all"],
        )

    def entries(self) -> Entries:
        options = Options(
            scheduler=self.config["scheduler"],
            random_fully=self.config["masquerade_random_fully"],
            stock_local_fallback=self.stock_local_fallback,
        )
        entries = render_base(self.facts, options)
        for service in self.state.services():
            for route in self.state.routes(service):
                entries |= render_route(route, self.facts, options)
        return entries


def scenarios() -> list[Any]:
    return [pytest.param(s, id=s["id"].partition("/")[2]) for s in IPVS["scenarios"]]


def expected(recording: Mapping[str, Any], family: Family) -> Entries:
    """What was recorded, as entries. The text of set members is put in place by `comparable`."""
    entries: Entries = {DeviceKey(): EXISTS}
    for server in recording["virtual_servers"]:
        key = VirtualServerKey(family, server["address"], Protocol(server["protocol"]), server["port"])
        entries[key] = VirtualServer(server["scheduler"], server["flags"], server["timeout"])
        for real in server["real_servers"]:
            entries[RealServerKey(*key, real["address"], real["port"])] = RealServer(real["weight"])
    for address in recording["dummy_addresses"]:
        entries[AddressKey(family, address)] = EXISTS
    for name, known in recording["ipsets"].items():
        # In IPv6, too, kube-proxy's tests use the names and the family of IPv4.
        real_name = set_name(name, family)
        entries[SetKey(real_name)] = SetType(SetKind(known["type"]), family)
        for member in known["entries"]:
            entries[MemberKey(real_name, member)] = EXISTS
    entries |= chain_entries(family, read_tables(corrected(recording["iptables_save"], family), family))
    return entries


def corrected(lines: list[str], family: Family) -> Iterator[str]:
    """What the real tool would have saved."""
    for line in lines:
        text = UNQUOTED.sub(r'--comment "\1" -j', line)
        for without, with_mark in WITHOUT_MARK:
            text = text.replace(without, with_mark)
        yield SET_NAME.sub(lambda found: set_name(found[0], family), text)


def with_a_port(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """The same with port 80 where Services have port 0: the API refuses those, and so does kproxy."""
    changed: dict[str, Any] = copy.deepcopy(dict(scenario))
    for step in changed["steps"]:
        recording = step["expected"]
        ports = [port for item in step["apply"] if item["kind"] == "Service" for port in item["spec"]["ports"]]
        for having_port in (*ports, *recording["virtual_servers"]):
            having_port["port"] = having_port["port"] or 80
        for known in recording["ipsets"].values():
            known["entries"] = [re.sub(":0$", ":80", member) for member in known["entries"]]
    return changed


def comparable(entries: Entries) -> Entries:
    """With set members as text, as they were recorded."""
    return {
        MemberKey(key.set_name, str(key.member)) if isinstance(key, MemberKey) else key: value
        for key, value in entries.items()
    }


def complaints(wanted: Entries, actual: Entries) -> list[str]:
    return [f"{c.key}\n  kube-proxy: {c.old}\n  kproxy:     {c.new}" for c in diff(wanted, actual)]


@pytest.mark.parametrize("scenario", scenarios())
def test_everything_of_every_step(scenario: dict[str, Any]) -> None:
    given = Scenario(scenario["config"], stock_local_fallback=True)

    for step in with_a_port(scenario)["steps"]:
        given.advance(step)

        assert complaints(comparable(given.entries()), expected(step["expected"], given.family)) == []


@pytest.mark.parametrize("scenario", scenarios())
def test_without_the_fallback_only_real_servers_elsewhere_are_missing(scenario: dict[str, Any]) -> None:
    given = Scenario(scenario["config"], stock_local_fallback=False)
    missing: set[tuple[str, str]] = set()

    for step in with_a_port(scenario)["steps"]:
        given.advance(step)
        for change in diff(comparable(given.entries()), expected(step["expected"], given.family)):
            assert isinstance(change.key, RealServerKey)
            assert change.new is None
            missing.add((change.key.address, change.key.endpoint_address))

    assert missing == WITHOUT_FALLBACK.get(scenario["id"], set())


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_kernel_gives_back_every_set_and_rule(variant: str, netns: Namespace) -> None:
    """All steps, one after the other, through the real tools: what is saved is what was written, letter for letter."""
    written = 0
    for scenario in IPVS["scenarios"]:
        given = Scenario(scenario["config"], stock_local_fallback=True)
        for step in with_a_port(scenario)["steps"]:
            given.advance(step)
            entries = given.entries()
            write(netns, variant, entries, given.family)

            assert diff(readable(entries, given.family), read(netns, variant, given.family)) == []
            forget(netns, variant, given.family)
            written += 1
    assert written


@pytest.mark.parametrize("case", IPVS["clean_up"], ids=lambda case: case["test"])
def test_what_stays_after_clean_up(case: dict[str, Any]) -> None:
    before, after = (
        read_tables(corrected(case[when], Family.IPv4), Family.IPv4) for when in ("before", "expected_after")
    )

    ours = chain_entries(Family.IPv4, before)

    for table, chains in before.items():
        for chain, rules in chains.items():
            jumps = [rule for key, rule in ours.items() if isinstance(key, JumpKey) and key[1:3] == (table, chain)]
            if ChainKey(Family.IPv4, table, chain) in ours:
                assert chain not in after[table]
            else:
                assert [rule for rule in rules if rule not in jumps] == after[table][chain]


@pytest.mark.parametrize("case", IPVS["node_addresses"], ids=lambda case: str(case["case"]))
def test_the_nodes_addresses(case: dict[str, Any]) -> None:
    devices = dict(case["devices"])
    on_device = devices.pop(DEVICE, [])
    others = [address for own in devices.values() for address in own]

    found = usable(others, Family[case["ip_family"]])

    # To kube-proxy an address that is also on the device is none of the node's; so it depends on what was there first.
    # kproxy takes it from the device instead.
    assert {address for address in found if address not in on_device} == set(case["expected_node_ips"])


@pytest.mark.parametrize("case", IPVS["address_usable"], ids=lambda case: f"{case['ip']} {case['ip_family']}")
def test_which_addresses_count(case: dict[str, Any]) -> None:
    assert bool(usable([canonical_address(case["ip"])], Family[case["ip_family"]])) is case["expected"]
