"""Real UDP clients that keep their source port, through real NAT: where does their next datagram arrive?"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct

import pytest

from kproxy.conntrack import Conntrack, ConntrackError, UDPService
from kproxy.model import Endpoint, Family, Frontend, Protocol
from tests.node.udp_node import CLIENT, CLIENT_PORT, UDPNode

VIP = {Family.IPv4: "10.96.0.10", Family.IPv6: "fd00:96::a"}
POD_1 = {Family.IPv4: "10.244.0.1", Family.IPv6: "fd00:244::1"}
POD_2 = {Family.IPv4: "10.244.0.2", Family.IPv6: "fd00:244::2"}
ELSEWHERE = "203.0.113.7"
BOTH = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.name)


def udp_service(address: str, port: int, *endpoints: tuple[str, int], family: Family = Family.IPv4) -> UDPService:
    frontend = Frontend(family, address, Protocol.UDP, port)
    return UDPService((frontend,), tuple(Endpoint(ip, pod_port) for ip, pod_port in endpoints))


@BOTH
def test_a_client_with_a_fixed_source_port_follows_its_service_to_the_new_pod(node: UDPNode, family: Family):
    old, new = node.listen(POD_1[family], 5353), node.listen(POD_2[family], 5353)
    client = node.client(family)
    node.balance((VIP[family], 53, POD_1[family], 5353))
    client.sendto(b"1", (VIP[family], 53))
    assert old.recv(9) == b"1"
    node.balance((VIP[family], 53, POD_2[family], 5353))
    client.sendto(b"2", (VIP[family], 53))
    assert old.recv(9) == b"2", "without a clean-up the flow stays where it was"

    deleted = node.netns.run(
        Conntrack().reconcile, [udp_service(VIP[family], 53, (POD_2[family], 5353), family=family)]
    )

    client.sendto(b"3", (VIP[family], 53))
    assert new.recv(9) == b"3"
    assert deleted == 1


@BOTH
def test_a_flow_older_than_the_rules_is_balanced_once_there_are_endpoints(node: UDPNode, family: Family):
    sink, pod = node.listen(VIP[family], 53), node.listen(POD_1[family], 5353)
    client = node.client(family)
    client.sendto(b"1", (VIP[family], 53))
    assert sink.recv(9) == b"1"
    node.balance((VIP[family], 53, POD_1[family], 5353))

    node.netns.run(Conntrack().reconcile, [udp_service(VIP[family], 53, (POD_1[family], 5353), family=family)])

    client.sendto(b"2", (VIP[family], 53))
    assert pod.recv(9) == b"2"


@BOTH
def test_a_service_that_lost_its_last_endpoint_refuses_its_old_clients_too(node: UDPNode, family: Family):
    pod = node.listen(POD_1[family], 5353)
    client = node.client(family)
    client.connect((VIP[family], 53))
    node.balance((VIP[family], 53, POD_1[family], 5353))
    client.send(b"1")
    assert pod.recv(9) == b"1"
    node.refuse((VIP[family], 53))

    node.netns.run(Conntrack().reconcile, [udp_service(VIP[family], 53, family=family)])

    with contextlib.suppress(PermissionError):  # how a local sender hears of the filter; the ICMP error comes beside it
        client.send(b"2")
    with pytest.raises(ConnectionRefusedError):
        client.recv(9)


def test_a_flow_to_a_serving_endpoint_is_left_alone(node: UDPNode):
    pod = node.listen("10.244.0.1", 5353)
    node.balance(("10.96.0.10", 53, "10.244.0.1", 5353))
    node.client().sendto(b"1", ("10.96.0.10", 53))
    assert pod.recv(9) == b"1"
    before = node.flows()

    deleted = node.netns.run(
        Conntrack().reconcile, [udp_service("10.96.0.10", 53, ("10.244.0.1", 5353), ("10.244.0.2", 5353))]
    )

    assert deleted == 0
    assert len(node.flows()) == len(before) == 1


def test_of_two_endpoints_with_one_address_only_the_port_that_left_loses_its_flows(node: UDPNode):
    gone, stays = node.listen("10.244.0.1", 5001), node.listen("10.244.0.1", 5002)
    node.balance(("10.96.0.10", 53, "10.244.0.1", 5001))
    node.client(port=40001).sendto(b"1", ("10.96.0.10", 53))
    assert gone.recv(9) == b"1"
    node.balance(("10.96.0.10", 53, "10.244.0.1", 5002))
    node.client(port=40002).sendto(b"2", ("10.96.0.10", 53))
    assert stays.recv(9) == b"2"

    deleted = node.netns.run(Conntrack().reconcile, [udp_service("10.96.0.10", 53, ("10.244.0.1", 5002))])

    assert deleted == 1
    assert [flow for flow in node.flows() if "sport=40002" in flow] == node.flows() != []


def test_node_port_flows_go_but_not_those_through_the_node_to_the_same_port_elsewhere(node: UDPNode):
    old, other_host = node.listen("10.244.0.1", 5353), node.listen(ELSEWHERE, 30053)
    node.client(port=40001).sendto(b"out", (ELSEWHERE, 30053))
    assert other_host.recv(9) == b"out"
    node.balance((CLIENT[Family.IPv4], 30053, "10.244.0.1", 5353))
    node.client(port=40002).sendto(b"in", (CLIENT[Family.IPv4], 30053))
    assert old.recv(9) == b"in"
    conntrack = Conntrack()
    services = [udp_service("", 30053, ("10.244.0.2", 5353))]

    assert node.netns.run(conntrack.reconcile, services, {CLIENT[Family.IPv4]}) == 1
    assert "dst=" + ELSEWHERE in node.flows()[0]
    # As kube-proxy does where the addresses of the node are not known:
    assert node.netns.run(conntrack.reconcile, services) == 1
    assert node.flows() == []


@pytest.mark.parametrize(("address", "port"), [("10.96.0.10", 53), ("", 30053)], ids=["cluster IP", "node port"])
def test_a_removed_frontend_loses_its_translated_flows_once(node: UDPNode, address: str, port: int):
    destination = address or CLIENT[Family.IPv4]
    pod = node.listen("10.244.0.1", 5353)
    conntrack = Conntrack()
    node.netns.run(conntrack.reconcile, [udp_service(address, port, ("10.244.0.1", 5353))])
    node.balance((destination, port, "10.244.0.1", 5353))
    node.client(port=40001).sendto(b"1", (destination, port))
    assert pod.recv(9) == b"1"

    assert node.netns.run(conntrack.reconcile, []) == 1
    assert node.flows() == []

    # What is translated later is somebody else's.
    node.client(port=40002).sendto(b"2", (destination, port))
    assert pod.recv(9) == b"2"
    assert node.netns.run(conntrack.reconcile, []) == 0
    assert len(node.flows()) == 1


def test_a_removed_frontend_keeps_the_flows_that_were_never_translated(node: UDPNode):
    server = node.listen(ELSEWHERE, 53)
    conntrack = Conntrack()
    node.netns.run(conntrack.reconcile, [udp_service(ELSEWHERE, 53)])
    node.client().sendto(b"1", (ELSEWHERE, 53))
    assert server.recv(9) == b"1"

    assert node.netns.run(conntrack.reconcile, []) == 0
    assert len(node.flows()) == 1


def test_tcp_connections_outlive_their_endpoint(node: UDPNode):
    with (
        node.netns.run(socket.create_server, ("10.244.0.1", 5353)) as listener,
        node.netns.run(socket.socket) as client,
    ):
        node.balance(("10.96.0.10", 53, "10.244.0.1", 5353))
        client.connect(("10.96.0.10", 53))
        server, _ = listener.accept()
        tcp = UDPService((Frontend(Family.IPv4, "10.96.0.10", Protocol.TCP, 53),), ())

        assert node.netns.run(Conntrack().reconcile, [tcp, udp_service("10.96.0.10", 53)]) == 0

        with server:
            client.sendall(b"still here")
            assert server.recv(99) == b"still here"


@pytest.mark.parametrize("zone", ["ct zone set 7", "ct original zone set 7"], ids=["both ways", "one way"])
def test_entries_of_other_zones_are_not_ours(node: UDPNode, zone: str):
    """Open vSwitch tracks a pod's flow to a service in a zone of its own, before it is translated."""
    rule = f"type filter hook output priority -300; udp sport 40001 {zone};"
    node.netns.command("nft", "-f", "-", stdin=f"table inet raw {{ chain out {{ {rule} }}\n}}\n")
    server = node.listen("10.96.0.10", 53)
    for port in (40001, 40002):
        node.client(port=port).sendto(b"1", ("10.96.0.10", 53))
        assert server.recv(9) == b"1"

    assert node.netns.run(Conntrack().reconcile, [udp_service("10.96.0.10", 53, ("10.244.0.1", 5353))]) == 1
    assert all("sport=40001" in flow for flow in node.flows())
    assert node.flows()


def test_a_thousand_clients_of_a_pod_that_left_are_cleaned_in_one_go(node: UDPNode):
    clients = range(20000, 21000)
    node.balance(("10.96.0.10", 53, "10.244.0.1", 5353))
    for port in clients:
        with node.netns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((CLIENT[Family.IPv4], port))
            client.sendto(b"1", ("10.96.0.10", 53))
    node.client(port=CLIENT_PORT).sendto(b"1", ("10.96.0.11", 53))

    deleted = node.netns.run(Conntrack().reconcile, [udp_service("10.96.0.10", 53, ("10.244.0.2", 5353))])

    assert deleted == len(clients)
    assert len(node.flows()) == 1


def test_what_could_not_be_cleaned_is_cleaned_by_the_next_call(node: UDPNode):
    pod = node.listen("10.244.0.1", 5353)
    conntrack = Conntrack()
    node.netns.run(conntrack.reconcile, [udp_service("10.96.0.10", 53, ("10.244.0.1", 5353))])
    node.balance(("10.96.0.10", 53, "10.244.0.1", 5353))
    node.client().sendto(b"1", ("10.96.0.10", 53))
    assert pod.recv(9) == b"1"

    # The service goes while the proxy may not touch the table.
    with pytest.raises(ConntrackError, match=r"IPv4 UDP conntrack entries.*not permitted"):
        node.netns.run(_without_capabilities, conntrack)
    assert len(node.flows()) == 1

    assert node.netns.run(conntrack.reconcile, []) == 1
    assert node.flows() == []


def test_nothing_is_asked_of_the_kernel_where_no_service_uses_udp(node: UDPNode):
    # Without the right to look at the table, so that a question would be an error.
    node.netns.run(_without_capabilities, Conntrack())


def _without_capabilities(conntrack: Conntrack) -> int:
    """Reconcile with no services, while the calling thread has no capabilities in force."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, this thread
    present = ctypes.create_string_buffer(24)
    capget, capset = {"x86_64": (125, 126), "aarch64": (90, 91)}[os.uname().machine]
    assert syscall(capget, header, present) == 0
    low_effective, low_permitted, low_inheritable, high_effective, high_permitted, high_inheritable = struct.unpack(
        "=6I", present.raw[:24]
    )
    assert low_effective | high_effective
    none = struct.pack("=6I", 0, low_permitted, low_inheritable, 0, high_permitted, high_inheritable)
    assert syscall(capset, header, none) == 0
    try:
        return conntrack.reconcile([])
    finally:
        assert syscall(capset, header, present.raw) == 0
