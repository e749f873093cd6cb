"""A packet's way in ipvs mode (kproxy/dataplane/ipvs/README.md).

The node has every address of a Service, so such a packet is for the node itself. What comes in meets the filter table
first and IPVS behind it; what the node sends meets IPVS first, and the filter table where IPVS leaves it alone. Rules
ask sets of addresses and ports, whichever Service filled them; only the virtual server knows endpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network

from kproxy.explain.terms import Action, Explanation, Node, Packet, is_loopback
from kproxy.model import Endpoint, FrontendKind, Outcome, Protocol, Route, ServicePort, join_host_port

_OUTSIDE = (FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER)


def explain(packet: Packet, routes: Iterable[Route], node: Node, *, stock_local_fallback: bool) -> Explanation:
    """What happens to a packet on a node where these are all the routes.

    `stock_local_fallback`: where policy Local finds no endpoint on this node, those elsewhere serve.
    """
    of_family = [route for route in routes if route.service_port.family is packet.family]
    walk = _Walk(packet, node, of_family, stock_local_fallback)
    if packet.interface:
        return walk.filter() or walk.virtual_server() or walk.passes()
    return walk.virtual_server() or walk.filter() or walk.passes()


class _Walk:
    def __init__(self, packet: Packet, node: Node, routes: list[Route], stock_local_fallback: bool) -> None:
        self.packet = packet
        self.node = node
        self.stock_local_fallback = stock_local_fallback
        self.routes = routes
        self.concerned = [route for route in routes if route.service_port.name.protocol is packet.protocol]
        self.own_addresses = node.facts.addresses.get(packet.family, ())
        chosen = node.facts.node_port_addresses.get(packet.family)
        self.node_port_addresses = self.own_addresses if chosen is None else chosen
        self.at_address = [(route, kind) for route in self.concerned for kind in self.packet.kinds_at(route)]

    # --- the filter table on the way in ---

    def filter(self) -> Explanation | None:
        """KUBE-IPVS-FILTER, then KUBE-PROXY-FIREWALL."""
        packet = self.packet
        if self._is_bound() and not self.at_address and not self._is_health_check():
            why = f"{packet.destination} is a Service's, but no service has {packet.protocol} port {packet.port} on it"
            return Explanation(Action.REJECT, (f"KUBE-IPVS-FILTER: {why}",))
        for port in self._guarded():
            networks = map(ip_network, port.source_ranges)
            if any(ip_address(packet.source) in network for network in networks) or self._is_let_back(port):
                continue
            at = _words(FrontendKind.LOAD_BALANCER, port)
            why = f"KUBE-PROXY-FIREWALL: {packet.source} is in none of {', '.join(port.source_ranges)}"
            return Explanation(Action.DROP, (at, why), service_port=port)
        return None

    def _guarded(self) -> Iterator[ServicePort]:
        """Those whose source ranges the packet meets."""
        for route, kind in self.at_address:
            if kind is FrontendKind.LOAD_BALANCER and route.service_port.source_ranges:
                yield route.service_port

    def _is_let_back(self, port: ServicePort) -> bool:
        """What the node sends to an address that it has, has this address as its source."""
        return self.packet.source == self.packet.destination and self._node_is_within(port)

    def _node_is_within(self, port: ServicePort) -> bool:
        node_ip = ip_address(self.node.facts.node_ip(port.family))
        return any(node_ip in ip_network(cidr) for cidr in port.source_ranges)

    # --- IPVS, and what follows it ---

    def virtual_server(self) -> Explanation | None:
        """What IPVS makes of the packet; None: no virtual server is for it."""
        serving = list(self._serving())
        if not serving:
            return None
        reasons = [_words(kind, route.service_port) for route, kind in serving]
        servers: dict[tuple[str, int], Endpoint] = {}
        for route, kind in serving:
            servers |= {(e.address, e.port): e for e in self._real_servers(route, kind, reasons)}
        endpoints, packet, port = tuple(servers.values()), self.packet, serving[0][0].service_port
        if not endpoints:
            return Explanation(Action.REJECT, tuple(reasons), service_port=port)
        for guarded in self._guarded():
            if packet.source == packet.destination and not self._node_is_within(guarded):
                reasons.append(f"KUBE-IPVS-OUT-FILTER: this node is in none of {', '.join(guarded.source_ranges)}")
                return Explanation(Action.DROP, tuple(reasons), service_port=guarded)
        if is_loopback(packet.source) and any(e.address not in self.own_addresses for e in endpoints):
            reasons.append("IPVS sends nothing from a loopback address to another machine or pod")
            return Explanation(Action.DROP, tuple(reasons), service_port=port)
        masquerade = self._is_marked(reasons)
        if seconds := port.affinity_seconds:
            reasons.append(f"sticks to the chosen endpoint for {seconds} s (ClientIP)")
        itself = tuple(e for e in endpoints if e.local and e.address == packet.source)
        return Explanation(Action.DNAT, tuple(reasons), endpoints, masquerade, itself, port)

    def _serving(self) -> Iterator[tuple[Route, FrontendKind]]:
        """Whose endpoints it has: two Services' where an external IP of the node meets a node port."""
        for route in self.concerned:
            if kinds := self.packet.kinds_at(route):
                yield route, kinds[0]
            elif self.packet.is_at_node_port(route) and self.packet.destination in self.node_port_addresses:
                yield route, FrontendKind.NODE_PORT

    def _real_servers(self, route: Route, kind: FrontendKind, reasons: list[str]) -> tuple[Endpoint, ...]:
        is_internal = kind is FrontendKind.CLUSTER_IP
        policy = "internalTrafficPolicy" if is_internal else "externalTrafficPolicy"
        match route.internal if is_internal else route.external:
            case Outcome.LOCAL:
                reasons.append(f"{policy} Local: endpoints of this node")
                return route.local
            case Outcome.DROP if not self.stock_local_fallback or not route.cluster:
                reasons.append(f"{policy} Local, and no endpoint on this node: the virtual server has no real server")
                return ()
            case Outcome.DROP:
                reasons.append(f"{policy} Local, and no endpoint on this node: every endpoint (stockLocalFallback)")
            case Outcome.REJECT:
                reasons.append("no endpoint is ready: the virtual server has no real server")
                return ()
        if route.topology_reason:
            reasons.append(f"topology: {route.topology_reason}")
        return route.cluster

    # --- the nat table ---

    def _is_marked(self, reasons: list[str]) -> bool:
        """Whether KUBE-SERVICES asks for masquerading."""
        packet = self.packet
        if is_loopback(packet.source):
            return False
        found = []
        for route, kind in self.at_address:
            if kind in _OUTSIDE and not route.service_port.external_local:
                found.append("externalTrafficPolicy Cluster")
        if by_source := self._marked_by_source():
            found.append(by_source)
        is_accepted = any(kind is FrontendKind.EXTERNAL_IP for _, kind in self.at_address)
        if not is_accepted and self._is_local() and any(map(self._marks_node_port, self.concerned)):
            found.append(f"KUBE-NODE-PORT has {packet.protocol} port {packet.port}, on every address of the node")
        reasons += (f"masqueraded: {why}" for why in dict.fromkeys(found))
        return bool(found)

    def _marked_by_source(self) -> str:
        """Why the rule for cluster IPs marks the packet; empty if it does not."""
        packet, facts = self.packet, self.node.facts
        to_cluster_ip = any(kind is FrontendKind.CLUSTER_IP for _, kind in self.at_address)
        if facts.masquerade_all:
            return "masqueradeAll" if to_cluster_ip else ""
        if facts.detector(packet.family):
            is_meant = to_cluster_ip and not self.node.is_pod(packet)
            return f"{packet.source} is not a pod's address" if is_meant else ""
        # Without a detector the set is asked for the source, with the port that the packet goes to.
        at_source = (packet.source, packet.port)
        has_it = any(
            kind is FrontendKind.CLUSTER_IP and (frontend.address, frontend.port) == at_source
            for route in self.concerned
            for kind, frontend in route.frontends
        )
        return f"{packet.source} is a cluster IP, thus the node itself" if has_it else ""

    def _marks_node_port(self, route: Route) -> bool:
        """Whether a node port's number asks for masquerading; only those of SCTP are known with their addresses."""
        if not self.packet.is_at_node_port(route) or route.service_port.external_local:
            return False
        if self.packet.protocol is Protocol.SCTP:
            return self.packet.destination in self.node_port_addresses
        return bool(self.node_port_addresses)

    def passes(self) -> Explanation:
        """Nothing of ours takes the packet, though rules may mark it, or take it for a pod's to itself."""
        packet = self.packet
        where = join_host_port(packet.destination, packet.port)
        reasons = [f"{where}/{packet.protocol} is no service's address or node port"]
        if packet.interface and self._is_local():  # it never meets the rules that masquerade
            return Explanation(Action.PASS, tuple(reasons))
        masquerade = self._is_marked(reasons)
        at = (packet.destination, packet.port)
        if packet.source == packet.destination and any(
            (e.address, e.port) == at for r in self.concerned for e in r.here
        ):
            reasons.append(f"masqueraded: KUBE-LOOP-BACK takes {packet.source} for an endpoint that reaches itself")
            masquerade = True
        return Explanation(Action.PASS, tuple(reasons), masquerade=masquerade)

    # --- what sets and the device hold ---

    def _is_health_check(self) -> bool:
        """Whether somebody on this node answers health checks at the port, whatever the protocol and the address."""
        ports = (
            route.service_port for route in self.routes if self.node_port_addresses or not route.service_port.node_port
        )
        return any(port.health_check_node_port == self.packet.port for port in ports)

    def _is_bound(self) -> bool:
        """Whether the destination is on kube-ipvs0: an outside address that the node has otherwise stays there."""
        address = self.packet.destination
        return any(
            frontend.address == address and (kind is FrontendKind.CLUSTER_IP or address not in self.own_addresses)
            for route in self.routes
            for kind, frontend in route.frontends
        )

    def _is_local(self) -> bool:
        address = self.packet.destination
        return address in self.own_addresses or is_loopback(address) or self._is_bound()


def _words(kind: FrontendKind, port: ServicePort) -> str:
    return f"{kind} of service port {port.name} ({port.name.protocol})"
