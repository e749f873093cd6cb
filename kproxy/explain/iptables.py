"""A packet's way in iptables mode (kproxy/dataplane/iptables/README.md).

First the nat table, in which a rule that leads nowhere returns to the ones after it: an external address without an
endpoint of this node leaves the packet to a node port of the same number. Only what no rule translated meets the filter
table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network

import msgspec

from kproxy.explain.terms import Action, Explanation, Node, Packet, is_loopback, translated
from kproxy.model import Family, FrontendKind, Outcome, Route, join_host_port

_REFUSALS = {Outcome.REJECT: Action.REJECT, Outcome.DROP: Action.DROP}
_WHY = {
    Outcome.REJECT: "no endpoint is ready",
    Outcome.DROP: "endpoints exist, but none on this node, and the policy is Local",
}


def explain(packet: Packet, routes: Iterable[Route], node: Node, *, localhost_node_ports: bool) -> Explanation:
    """What happens to a packet on a node where these are all the routes.

    `localhost_node_ports`: IPv4 node ports answer on 127.0.0.0/8, which is guarded from others.
    """
    walk = _Walk(packet, node, localhost_node_ports)
    concerned = [
        route
        for route in routes
        if (route.service_port.family, route.service_port.name.protocol) == (packet.family, packet.protocol)
    ]
    return walk.nat(concerned) or walk.filter(concerned) or walk.passes()


class _Walk:
    def __init__(self, packet: Packet, node: Node, localhost_node_ports: bool) -> None:
        self.packet = packet
        self.node = node
        self.localhost_node_ports = localhost_node_ports and packet.family is Family.IPv4
        self.reasons: list[str] = []  # of what happened on the way

    def nat(self, routes: list[Route]) -> Explanation | None:
        """KUBE-SERVICES of the nat table, whose last rule leads to KUBE-NODEPORTS."""
        for route in routes:
            if route.service_port.port == self.packet.port and (found := self._to_addresses(route)):
                return found
        if self._reaches_node_ports():
            for route in routes:
                if self.packet.is_at_node_port(route) and route.has_any:
                    self._at(FrontendKind.NODE_PORT, route)
                    if found := self._external(route):
                        return found
        return None

    def _to_addresses(self, route: Route) -> Explanation | None:
        """The rules of a service port's addresses, in their order."""
        for kind in self.packet.kinds_at(route):
            if kind is FrontendKind.CLUSTER_IP:
                if route.internal in (Outcome.CLUSTER, Outcome.LOCAL):
                    self._at(kind, route)
                    masquerade = self._masquerades_cluster_ip()
                    return self._to_endpoints(route, local=route.internal is Outcome.LOCAL, masquerade=masquerade)
            elif route.has_any:
                self._at(kind, route)
                if kind is FrontendKind.LOAD_BALANCER and not self._admits(route):
                    self._not_admitted(route)
                elif found := self._external(route):
                    return found
        return None

    def _external(self, route: Route) -> Explanation | None:
        """KUBE-EXT-…; None: it returns."""
        if not route.service_port.external_local:
            self.reasons.append("masqueraded: externalTrafficPolicy Cluster")
            return self._to_endpoints(route, local=False, masquerade=True)
        if self.node.is_pod(self.packet):
            self.reasons.append("externalTrafficPolicy Local, but from a pod: every endpoint")
            return self._to_endpoints(route, local=False, masquerade=False)
        if self.node.is_own(self.packet.source):
            self.reasons.append("externalTrafficPolicy Local, but from this node: every endpoint, masqueraded")
            return self._to_endpoints(route, local=False, masquerade=True)
        self.reasons.append("externalTrafficPolicy Local: endpoints of this node")
        return self._to_endpoints(route, local=True, masquerade=False) if route.local else None

    def _to_endpoints(self, route: Route, *, local: bool, masquerade: bool) -> Explanation:
        return translated(
            self.packet,
            route,
            local=local,
            masquerade=masquerade,
            only_local_hairpin=False,
            reasons=self.reasons,
        )

    def filter(self, routes: list[Route]) -> Explanation | None:
        """What the filter table refuses. Two service ports that refuse the same packet: the order has no meaning."""
        packet, node = self.packet, self.node
        is_sent, stays = not packet.interface, node.is_own(packet.destination)
        if self.localhost_node_ports and is_loopback(packet.destination) and not is_loopback(packet.source):
            return self._refused(Action.DROP, "KUBE-FIREWALL keeps others from what listens on loopback")
        for route in routes:
            if self._has_firewall(route) and FrontendKind.LOAD_BALANCER in self.packet.kinds_at(route):
                return self._refused(Action.DROP, f"KUBE-PROXY-FIREWALL guards {packet.destination}", route)
        if is_sent or not stays:
            for route in routes:
                if FrontendKind.CLUSTER_IP in self.packet.kinds_at(route) and route.internal in _REFUSALS:
                    self._at(FrontendKind.CLUSTER_IP, route)
                    return self._refused(_REFUSALS[route.internal], _WHY[route.internal], route)
        if is_sent and not stays:
            return None
        verdicts = [(route, kind) for route in routes for kind in self._refused_kinds(route)]
        if not verdicts:
            return None
        route, kind = verdicts[0]
        self._at(kind, route)
        found = self._refused(_REFUSALS[route.external], _WHY[route.external], route)
        others = {_REFUSALS[other.external] for other, _ in verdicts} - {found.action}
        return msgspec.structs.replace(found, instead=others.pop()) if others else found

    def _refused_kinds(self, route: Route) -> Iterator[FrontendKind]:
        """The rules of KUBE-EXTERNAL-SERVICES that take the packet: node ports are refused on every local address."""
        if route.external in _REFUSALS:
            yield from (kind for kind in self.packet.kinds_at(route) if kind is not FrontendKind.CLUSTER_IP)
            if self.packet.is_at_node_port(route) and self.node.is_own(self.packet.destination):
                yield FrontendKind.NODE_PORT

    def passes(self) -> Explanation:
        """Nothing of ours takes the packet."""
        where = join_host_port(self.packet.destination, self.packet.port)
        reason = f"nothing is done with {where}/{self.packet.protocol}"
        if not self.reasons:
            reason = f"{where}/{self.packet.protocol} is no service's address or node port"
        return Explanation(Action.PASS, (*self.reasons, reason))

    def _reaches_node_ports(self) -> bool:
        address = self.packet.destination
        if not self.node.is_own(address) or (is_loopback(address) and not self.localhost_node_ports):
            return False
        chosen = self.node.facts.node_port_addresses.get(self.packet.family)
        return chosen is None or address in chosen

    def _masquerades_cluster_ip(self) -> bool:
        if self.node.facts.masquerade_all:
            self.reasons.append("masqueraded: masqueradeAll")
            return True
        if self.node.facts.detector(self.packet.family) and not self.node.is_pod(self.packet):
            self.reasons.append(f"masqueraded: {self.packet.source} is not a pod's address")
            return True
        return False

    def _has_firewall(self, route: Route) -> bool:
        return route.has_any and bool(route.service_port.source_ranges)

    def _admits(self, route: Route) -> bool:
        """KUBE-FW-…: who may use the load balancer's addresses."""
        port = route.service_port
        if not self._has_firewall(route):
            return True
        networks = [ip_network(cidr) for cidr in port.source_ranges]
        if any(ip_address(self.packet.source) in network for network in networks):
            return True
        node_ip = ip_address(self.node.facts.node_ip(port.family))
        owned = {frontend.address for _, frontend in route.frontends}
        to_itself = self.packet.source in owned.intersection(port.load_balancer_ips)
        return to_itself and any(node_ip in network for network in networks)

    def _not_admitted(self, route: Route) -> None:
        self.reasons.append(f"{self.packet.source} is in none of {', '.join(route.service_port.source_ranges)}")

    def _at(self, kind: FrontendKind, route: Route) -> None:
        port = route.service_port
        reason = f"{kind} of service port {port.name} ({port.name.protocol})"
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _refused(self, action: Action, why: str, route: Route | None = None) -> Explanation:
        return Explanation(action, (*self.reasons, why), service_port=route.service_port if route else None)
