"""What is asked and what is answered: a packet, a node, and the fate of the one on the other."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import ip_address, ip_network

import msgspec

from kproxy.model import Endpoint, Family, FrontendKind, LocalDetector, NodeFacts, Protocol, Route, ServicePort


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

    def kinds_at(self, route: Route) -> list[FrontendKind]:
        """What the destination is to a service port that has it, node ports aside, in kube-proxy's order."""
        port = route.service_port
        if port.port != self.port or not any(f.address == self.destination for _, f in route.frontends):
            return []
        addresses = (
            (FrontendKind.CLUSTER_IP, (port.cluster_ip,)),
            (FrontendKind.EXTERNAL_IP, port.external_ips),
            (FrontendKind.LOAD_BALANCER, port.load_balancer_ips),
        )
        return [kind for kind, among in addresses if self.destination in among]

    def is_at_node_port(self, route: Route) -> bool:
        """Whether it goes to the number of a service port's node port, whatever the address."""
        return any(kind is FrontendKind.NODE_PORT and f.port == self.port for kind, f in route.frontends)


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
    service_port: ServicePort | None = None  # which one takes the packet
    instead: Action | None = None  # two service ports refuse the packet, each in its way; either may come first

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

    def is_own(self, address: str) -> bool:
        """Whether an address is one of the node's: all of loopback is."""
        return address in self.addresses or is_loopback(address)


def is_loopback(address: str) -> bool:
    """Whether an address is one of loopback."""
    return ip_address(address).is_loopback


def _detects(detector: LocalDetector, packet: Packet) -> bool:
    if detector.cidr:
        return ip_address(packet.source) in ip_network(detector.cidr)
    if detector.interface:
        return packet.interface == detector.interface
    return bool(detector.interface_prefix) and packet.interface.startswith(detector.interface_prefix)


def translated(
    packet: Packet, route: Route, *, local: bool, masquerade: bool, only_local_hairpin: bool, reasons: list[str]
) -> Explanation:
    """The packet goes to one of the route's endpoints: those of this node, or all. `reasons` are those so far.

    `only_local_hairpin`: an endpoint on another node that has the packet's source is not taken for the client.
    """
    if not local and route.topology_reason:
        reasons = [*reasons, f"topology: {route.topology_reason}"]
    if seconds := route.service_port.affinity_seconds:
        reasons = [*reasons, f"sticks to the chosen endpoint for {seconds} s (ClientIP)"]
    endpoints = route.local if local else route.cluster
    itself = tuple(e for e in endpoints if e.address == packet.source and (e.local or not only_local_hairpin))
    return Explanation(Action.DNAT, tuple(reasons), endpoints, masquerade, itself, route.service_port)
