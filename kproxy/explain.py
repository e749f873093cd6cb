"""Walks the routes for one packet, as the kernel will: which Service, which policy, which endpoints, and why.

This is the plan's own account of itself, and the oracle that packets through the real kernel are tested against.
It speaks of the first packet of a connection, from a client that no affinity is known of.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from ipaddress import ip_address, ip_network

import msgspec

from kproxy.model import (
    Endpoint,
    Family,
    FrontendKind,
    LocalDetector,
    NodeFacts,
    Outcome,
    Protocol,
    Route,
    join_host_port,
)


class Packet(msgspec.Struct, frozen=True):
    """The first packet of a connection. `interface` is where it enters the node; "" for one of the node's own."""

    source: str
    destination: str
    port: int
    protocol: Protocol = Protocol.TCP
    interface: str = ""

    @property
    def family(self) -> Family:
        """Family of both addresses."""
        return Family.of(self.destination)


class Action(StrEnum):
    """What becomes of a packet."""

    DNAT = "dnat"
    DROP = "drop"
    REJECT = "reject"
    PASS = "pass"  # noqa: S105 - not a password: nothing of ours touches it


class Explanation(msgspec.Struct, frozen=True):
    """The fate of a packet. Each of `endpoints` is equally likely."""

    action: Action
    reasons: tuple[str, ...]
    endpoints: tuple[Endpoint, ...] = ()
    masquerade: bool = False  # whichever endpoint is chosen
    hairpin: tuple[Endpoint, ...] = ()  # masqueraded if one of these is chosen

    def is_masqueraded(self, endpoint: Endpoint) -> bool:
        """Whether the source is replaced when this endpoint is chosen."""
        return self.masquerade or endpoint in self.hairpin


class Node(msgspec.Struct, frozen=True):
    """The node as a packet meets it: its facts, and every address it has."""

    facts: NodeFacts
    addresses: frozenset[str] = frozenset()

    def is_pod(self, packet: Packet) -> bool:
        """Whether the local detector takes the packet for one of a pod."""
        return _detects(self.facts.detector(packet.family), packet)

    def takes_node_ports(self, address: str) -> bool:
        """Whether node ports are open on an address."""
        if ip_address(address).is_loopback or address not in self.addresses:
            return False
        chosen = self.facts.node_port_addresses.get(Family.of(address))
        return chosen is None or address in chosen


def _detects(detector: LocalDetector, packet: Packet) -> bool:
    if detector.cidr:
        return ip_address(packet.source) in ip_network(detector.cidr)
    if detector.interface:
        return packet.interface == detector.interface
    return bool(detector.interface_prefix) and packet.interface.startswith(detector.interface_prefix)


def explain(packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
    """What happens to a packet on a node where these are all the routes (nftables mode)."""
    cluster_ips = set()
    node_port: Route | None = None
    for route in routes:
        port = route.service_port
        if port.family is not packet.family:
            continue
        for kind, frontend in route.frontends:
            if kind is FrontendKind.CLUSTER_IP:
                cluster_ips.add(frontend.address)
            if (frontend.protocol, frontend.port) != (packet.protocol, packet.port):
                continue
            if frontend.address == packet.destination:
                return _to_frontend(packet, route, kind, node)
            if kind is FrontendKind.NODE_PORT and node.takes_node_ports(packet.destination):
                node_port = route
        cluster_ips.add(port.cluster_ip)
    if node_port:
        return _to_frontend(packet, node_port, FrontendKind.NODE_PORT, node)
    return _to_nothing(packet, cluster_ips, node.facts)


def _to_nothing(packet: Packet, cluster_ips: set[str], facts: NodeFacts) -> Explanation:
    if packet.destination in cluster_ips:
        reason = f"{packet.destination} is a cluster IP, but no service has {packet.protocol} port {packet.port} on it"
        return Explanation(Action.REJECT, (reason,))
    for cidr in facts.service_cidrs.get(packet.family, ()):
        if ip_address(packet.destination) in ip_network(cidr):
            return Explanation(Action.DROP, (f"{packet.destination} is in service range {cidr}; no service has it",))
    where = join_host_port(packet.destination, packet.port)
    return Explanation(Action.PASS, (f"{where}/{packet.protocol} is no service's address or node port",))


def _to_frontend(packet: Packet, route: Route, kind: FrontendKind, node: Node) -> Explanation:
    port = route.service_port
    reasons = [f"{kind} of service port {port.name} ({port.name.protocol})"]
    if kind is FrontendKind.LOAD_BALANCER and port.source_ranges and not _admitted(packet, route, node):
        return Explanation(Action.DROP, (*reasons, f"{packet.source} is in none of {', '.join(port.source_ranges)}"))
    if kind is FrontendKind.CLUSTER_IP:
        return _balance(packet, route, route.internal, _masquerades_cluster_ip(packet, node, reasons), reasons)
    if not route.has_any:
        return _balance(packet, route, Outcome.REJECT, False, reasons)
    if not port.external_local:
        reasons.append("externalTrafficPolicy Cluster: masqueraded")
        return _balance(packet, route, Outcome.CLUSTER, True, reasons)
    if node.is_pod(packet):
        reasons.append("externalTrafficPolicy Local, but from a pod: every endpoint, source kept")
        return _balance(packet, route, Outcome.CLUSTER, False, reasons)
    if packet.source in node.addresses:
        reasons.append("externalTrafficPolicy Local, but from this node: every endpoint, masqueraded")
        return _balance(packet, route, Outcome.CLUSTER, True, reasons)
    reasons.append("externalTrafficPolicy Local: endpoints of this node, source kept")
    return _balance(packet, route, route.external, False, reasons)


def _admitted(packet: Packet, route: Route, node: Node) -> bool:
    port = route.service_port
    if any(ip_address(packet.source) in ip_network(cidr) for cidr in port.source_ranges):
        return True
    node_ip = node.facts.node_ip(port.family)
    node_admitted = any(ip_address(node_ip) in ip_network(cidr) for cidr in port.source_ranges)
    return node_admitted and packet.source in port.load_balancer_ips


def _masquerades_cluster_ip(packet: Packet, node: Node, reasons: list[str]) -> bool:
    if node.facts.masquerade_all:
        reasons.append("masqueraded: masqueradeAll")
        return True
    if node.facts.detector(packet.family) and not node.is_pod(packet):
        reasons.append(f"masqueraded: {packet.source} is not a pod's address")
        return True
    return False


def _balance(packet: Packet, route: Route, outcome: Outcome, masquerade: bool, reasons: list[str]) -> Explanation:
    match outcome:
        case Outcome.REJECT:
            return Explanation(Action.REJECT, (*reasons, "no endpoint is ready"))
        case Outcome.DROP:
            return Explanation(
                Action.DROP, (*reasons, "endpoints exist, but none on this node, and the policy is Local")
            )
        case Outcome.CLUSTER:
            endpoints = route.cluster
            if route.topology_reason:
                reasons.append(f"topology: {route.topology_reason}")
        case Outcome.LOCAL:
            endpoints = route.local
    if route.service_port.affinity_seconds:
        reasons.append(f"sticks to the chosen endpoint for {route.service_port.affinity_seconds} s (ClientIP)")
    return Explanation(
        Action.DNAT,
        tuple(reasons),
        endpoints,
        masquerade,
        tuple(e for e in endpoints if e.local and e.address == packet.source),
    )
