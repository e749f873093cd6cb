"""A packet's way in nftables mode."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

import msgspec

from kproxy.explain.terms import Action, Explanation, Node, Packet, translated
from kproxy.model import Family, FrontendKind, Outcome, Route, join_host_port


def explain(packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
    """What happens to a packet on a node where these are all the routes."""
    cluster_ips = set()
    at_address: tuple[Route, FrontendKind] | None = None
    at_node_port: Route | None = None
    for route in routes:
        for kind, frontend in route.frontends:
            if kind is FrontendKind.CLUSTER_IP:
                cluster_ips.add(frontend.address)
            if (frontend.family, frontend.protocol, frontend.port) != (packet.family, packet.protocol, packet.port):
                continue
            if frontend.address == packet.destination:
                at_address = route, kind
            elif kind is FrontendKind.NODE_PORT and _takes_node_ports(node, packet.destination):
                at_node_port = route
    balancing = _Balancing(packet, node, packet.destination in cluster_ips)
    by_node_port = balancing.to_frontend(at_node_port, FrontendKind.NODE_PORT) if at_node_port else None
    if at_address is None:
        return by_node_port or _to_nothing(packet, cluster_ips, node)
    route, kind = at_address
    if by_node_port and by_node_port.action is Action.DNAT and balancing.leaves_to_node_port(route, kind):
        reason = f"{kind} of service port {route.service_port.name} has no endpoint, but there is a node port"
        return msgspec.structs.replace(by_node_port, reasons=(reason, *by_node_port.reasons))
    return balancing.to_frontend(route, kind)


def _takes_node_ports(node: Node, address: str) -> bool:
    if ip_address(address).is_loopback or address not in node.addresses:
        return False
    chosen = node.facts.node_port_addresses.get(Family.of(address))
    return chosen is None or address in chosen


def _to_nothing(packet: Packet, cluster_ips: set[str], node: Node) -> Explanation:
    # What comes in for the node itself is neither forwarded nor sent by it; only there are service addresses guarded.
    guarded = packet.destination not in node.addresses or not packet.interface
    if guarded and packet.destination in cluster_ips:
        reason = f"{packet.destination} is a cluster IP, but no service has {packet.protocol} port {packet.port} on it"
        return Explanation(Action.REJECT, (reason,))
    for cidr in node.facts.service_cidrs.get(packet.family, ()):
        if guarded and ip_address(packet.destination) in ip_network(cidr):
            return Explanation(Action.DROP, (f"{packet.destination} is in service range {cidr}; no service has it",))
    where = join_host_port(packet.destination, packet.port)
    return Explanation(Action.PASS, (f"{where}/{packet.protocol} is no service's address or node port",))


class _Balancing(msgspec.Struct, frozen=True):
    """What the policies of a service port make of a packet."""

    packet: Packet
    node: Node
    to_cluster_ip: bool  # the address is some Service's cluster IP, whoever has the port

    def to_frontend(self, route: Route, kind: FrontendKind) -> Explanation:
        """The packet's fate at a frontend of the route."""
        port, source = route.service_port, self.packet.source
        reasons = [f"{kind} of service port {port.name} ({port.name.protocol})"]
        if not self._admits(route, kind):
            reasons.append(f"{source} is in none of {', '.join(port.source_ranges)}")
            return Explanation(Action.DROP, tuple(reasons), service_port=port)
        if kind is FrontendKind.CLUSTER_IP:
            return self._balance(route, route.internal, self._masquerades_by_address(reasons), reasons)
        if not route.has_any:
            return self._balance(route, Outcome.REJECT, False, reasons)
        if not port.external_local:
            reasons.append("masqueraded: externalTrafficPolicy Cluster")
            return self._balance(route, Outcome.CLUSTER, True, reasons)
        masquerades = self._masquerades_by_address(reasons)
        if self.node.is_pod(self.packet):
            reasons.append("externalTrafficPolicy Local, but from a pod: every endpoint")
            return self._balance(route, Outcome.CLUSTER, masquerades, reasons)
        if self.node.is_own(source):
            reasons.append("externalTrafficPolicy Local, but from this node: every endpoint, masqueraded")
            return self._balance(route, Outcome.CLUSTER, True, reasons)
        reasons.append("externalTrafficPolicy Local: endpoints of this node")
        return self._balance(route, route.external, masquerades, reasons)

    def leaves_to_node_port(self, route: Route, kind: FrontendKind) -> bool:
        """Whether a node port of the same number gets what this frontend has no endpoint for.

        Not so with externalTrafficPolicy Local where endpoints exist elsewhere: that is a decision, and it is to drop.
        """
        if not self._admits(route, kind):
            return False
        if kind is FrontendKind.CLUSTER_IP:
            return route.internal in (Outcome.DROP, Outcome.REJECT)
        return not route.has_any

    def _admits(self, route: Route, kind: FrontendKind) -> bool:
        port = route.service_port
        if kind is not FrontendKind.LOAD_BALANCER or not port.source_ranges:
            return True
        networks = [ip_network(cidr) for cidr in port.source_ranges]
        if any(ip_address(self.packet.source) in network for network in networks):
            return True
        node_ip = ip_address(self.node.facts.node_ip(port.family))
        return self.packet.source in port.load_balancer_ips and any(node_ip in network for network in networks)

    def _masquerades_by_address(self, reasons: list[str]) -> bool:
        """Whether the source is replaced because of the address, and not because of a policy."""
        if not self.to_cluster_ip:
            return False
        if self.node.facts.masquerade_all:
            reasons.append("masqueraded: masqueradeAll")
            return True
        if self.node.facts.detector(self.packet.family) and not self.node.is_pod(self.packet):
            reasons.append(f"masqueraded: {self.packet.source} is not a pod's address")
            return True
        return False

    def _balance(self, route: Route, outcome: Outcome, masquerade: bool, reasons: list[str]) -> Explanation:
        port = route.service_port
        match outcome:
            case Outcome.REJECT:
                return Explanation(Action.REJECT, (*reasons, "no endpoint is ready"), service_port=port)
            case Outcome.DROP:
                reason = "endpoints exist, but none on this node, and the policy is Local"
                return Explanation(Action.DROP, (*reasons, reason), service_port=port)
            case Outcome.CLUSTER | Outcome.LOCAL:
                return translated(
                    self.packet,
                    route,
                    local=outcome is Outcome.LOCAL,
                    masquerade=masquerade,
                    only_local_hairpin=True,
                    reasons=reasons,
                )
