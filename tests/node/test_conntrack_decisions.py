"""Which entries are wrong: kube-proxy's recorded cases, and where kproxy decides otherwise."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kproxy.conntrack import Expectation, UDPService, socket_address
from kproxy.model import Endpoint, Family, Frontend, Protocol
from tests.conformance import recorded

NODE_IP = "192.168.7.1"


def recorded_services(case: dict[str, Any]) -> list[UDPService]:
    """The UDP service ports of a recorded case, by way of the cluster's state."""
    state = recorded.new_state(families=[Family.IPv4])
    recorded.put(state, *case["services"], *case["endpoint_slices"])
    return [
        UDPService(tuple(frontend for _, frontend in route.frontends), tuple(state.endpoints(route.service_port)))
        for service in state.services()
        for route in state.routes(service)
    ]


def recorded_verdict(expectation: Expectation, entry: dict[str, Any]) -> str:
    original, reply = entry["original"], entry["reply"]
    if original["protocol"] != "UDP":
        return "keep"  # never listed; see test_tcp_connections_outlive_their_endpoint
    destination = socket_address(original["dst_ip"] or NODE_IP, original["dst_port"])
    return "delete" if expectation.is_wrong(destination, socket_address(reply["src_ip"], reply["src_port"])) else "keep"


def test_stale_entries_of_a_service_with_endpoints_go_as_recorded():
    case = next(c for c in recorded.read("conntrack.json")["clean_up"] if c["test"] == "TestCleanStaleEntries")
    for node_addresses in (None, [NODE_IP]):
        expectation = Expectation(Family.IPv4, recorded_services(case), node_addresses=node_addresses)
        wrong = [e for e in case["entries"] if recorded_verdict(expectation, e) != e["expected"]]
        assert wrong == []


def test_entries_of_a_service_without_endpoints_go_though_kube_proxy_kept_them():
    """Recorded: keep both. They lead to endpoints that nobody serves from, and the client hears nothing for as long
    as it keeps sending; kube-proxy's users lost DNS for hours by it. So here they go, and the client is refused."""
    case = next(c for c in recorded.read("conntrack.json")["clean_up"] if c["test"] == "TestServiceWithoutEndpoints")
    expectation = Expectation(Family.IPv4, recorded_services(case))
    assert {e["expected"] for e in case["entries"]} == {"keep"}
    assert {recorded_verdict(expectation, e) for e in case["entries"]} == {"delete"}


def test_among_a_million_entries_only_those_to_the_service_port_go_as_recorded():
    (case,) = recorded.read("conntrack.json")["clean_up_many"]
    expectation = Expectation(Family.IPv4, recorded_services(case))
    assert [recorded_verdict(expectation, e) for e in case["entries"]] == [e["expected"] for e in case["entries"]]
    some = case["random_entries"]
    reply_source = socket_address(some["reply_src_ip"], some["reply_src_port"])
    ports = random.Random(1).choices(range(1, 65536), k=some["count"])
    deleted = [p for p in ports if expectation.is_wrong(socket_address(some["original_dst_ip"], p), reply_source)]
    assert deleted
    assert deleted == [port for port in ports if port == 8000]


def service(*frontends: tuple[str, int], endpoints: tuple[Endpoint, ...] = ()) -> UDPService:
    return UDPService(tuple(Frontend(Family.IPv4, ip, Protocol.UDP, port) for ip, port in frontends), endpoints)


@pytest.mark.parametrize(
    ("endpoint", "goes"),
    [
        (Endpoint("10.0.0.1", 53), False),
        (Endpoint("10.0.0.1", 53, ready=False, serving=True), False),
        (Endpoint("10.0.0.1", 53, ready=False, serving=True, terminating=True), False),
        (Endpoint("10.0.0.1", 53, ready=False, serving=False), True),
        (Endpoint("10.0.0.1", 54), True),
    ],
    ids=["ready", "not ready but serving", "terminating but serving", "not serving", "another port"],
)
def test_a_flow_stays_as_long_as_its_endpoint_serves(endpoint: Endpoint, goes: bool):
    expectation = Expectation(Family.IPv4, [service(("10.96.0.1", 53), endpoints=(endpoint,))])
    assert expectation.is_wrong(socket_address("10.96.0.1", 53), socket_address("10.0.0.1", 53)) is goes


def test_an_address_that_two_services_claim_keeps_the_flows_of_both():
    first = service(("203.0.113.1", 53), endpoints=(Endpoint("10.0.0.1", 53),))
    second = service(("203.0.113.1", 53), endpoints=(Endpoint("10.0.0.2", 53),))
    expectation = Expectation(Family.IPv4, [first, second])
    for pod, goes in (("10.0.0.1", False), ("10.0.0.2", False), ("10.0.0.3", True)):
        assert expectation.is_wrong(socket_address("203.0.113.1", 53), socket_address(pod, 53)) is goes


def test_a_node_port_with_an_endpoint_on_the_node_itself_is_not_taken_for_untranslated():
    """A host-network pod: the address stays, only the port is translated."""
    expectation = Expectation(
        Family.IPv4, [], retired=[Frontend(Family.IPv4, "", Protocol.UDP, 30053)], node_addresses=[NODE_IP]
    )
    assert expectation.is_wrong(socket_address(NODE_IP, 30053), socket_address(NODE_IP, 53))
    assert not expectation.is_wrong(socket_address(NODE_IP, 30053), socket_address(NODE_IP, 30053))


def test_other_families_and_protocols_ask_for_nothing():
    tcp = UDPService((Frontend(Family.IPv4, "10.96.0.1", Protocol.TCP, 53),), (Endpoint("10.0.0.1", 53),))
    ipv6 = UDPService((Frontend(Family.IPv6, "fd00::1", Protocol.UDP, 53),), (Endpoint("fd00::2", 53),))
    assert not Expectation(Family.IPv4, [tcp, ipv6])
    assert Expectation(Family.IPv6, [tcp, ipv6])
