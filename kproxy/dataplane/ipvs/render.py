"""From routes to what ipvs mode needs for a service port (reference: sections 4.2.2 to 4.2.5). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.entries import EXISTS
from kproxy.dataplane.ipvs import names
from kproxy.dataplane.ipvs.blocks import kept_from_node, rules_of_sets
from kproxy.dataplane.ipvs.entries import (
    MH_PORT,
    PERSISTENT,
    AddressKey,
    Member,
    MemberKey,
    RealServer,
    RealServerKey,
    VirtualServer,
    VirtualServerKey,
)
from kproxy.dataplane.ipvs.options import Options
from kproxy.model import Endpoint, NodeFacts, Outcome, Protocol, Route

DEFAULT_SCHEDULER = "rr"

_WEIGHT = RealServer(1)


def render_route(route: Route, facts: NodeFacts, options: Options) -> Entries:
    """The entries of one service port."""
    return _ServicePort(route, facts, options).entries()


class _ServicePort:
    def __init__(self, route: Route, facts: NodeFacts, options: Options) -> None:
        self.route = route
        self.port = route.service_port
        self.family = route.service_port.family
        self.protocol = route.service_port.name.protocol
        self.options = options
        self.node_ip = facts.node_ip(self.family)
        self.own_addresses = facts.addresses.get(self.family, ())
        chosen = facts.node_port_addresses.get(self.family)
        self.node_port_addresses = self.own_addresses if chosen is None else chosen
        # An address that is a load balancer's and an external IP is in the sets of both, as with kube-proxy.
        owned = {frontend.address for _, frontend in route.frontends}
        self.cluster_ips = [ip for ip in (self.port.cluster_ip,) if ip in owned]
        self.external_ips = [ip for ip in self.port.external_ips if ip in owned]
        self.load_balancers = [ip for ip in self.port.load_balancer_ips if ip in owned]
        self.has_node_port = "" in owned
        self.external_servers = self._servers(route.external)
        self.virtual_server = _virtual_server(options.scheduler or DEFAULT_SCHEDULER, self.port.affinity_seconds)
        self.rules = rules_of_sets(self.family, facts, options)
        self.found: Entries = {}

    def entries(self) -> Entries:
        for endpoint in self.route.here:
            self._fill(names.LOOP_BACK_SET, self._at(endpoint.address, endpoint.port, endpoint.address))
        port = self.port.port
        for address in self.cluster_ips:
            self._serve(address, port, self._servers(self.route.internal))
            self._bind(address)
            self._fill(names.CLUSTER_IP_SET, self._at(address, port))
        for address in self.external_ips:
            self._outside(address)
            local = self.port.external_local
            name = names.EXTERNAL_IP_LOCAL_SET if local else names.EXTERNAL_IP_SET
            self._fill(name, self._at(address, port))
        for address in self.load_balancers:
            self._outside(address)
            self._load_balancer(address)
        if self.has_node_port:
            self._node_port()
        if self.port.health_check_node_port and (self.node_port_addresses or not self.port.node_port):
            # Where there is no address for node ports, nobody answers health checks either.
            self._fill(names.HEALTH_CHECK_SET, Member(port=self.port.health_check_node_port))
        return self.found

    def _servers(self, outcome: Outcome) -> Sequence[Endpoint]:
        match outcome:
            case Outcome.CLUSTER:
                return self.route.cluster
            case Outcome.LOCAL:
                return self.route.local
            case Outcome.DROP:
                return self.route.cluster if self.options.stock_local_fallback else ()
            case Outcome.REJECT:
                return ()

    def _outside(self, address: str) -> None:
        """An external IP or a load balancer's address; one that the node has otherwise stays where it is."""
        self._serve(address, self.port.port, self.external_servers)
        if address not in self.own_addresses:
            self._bind(address)

    def _load_balancer(self, address: str) -> None:
        port = self.port.port
        at = self._at(address, port)
        self._fill(names.LOAD_BALANCER_SET, at)
        if self.port.external_local:
            self._fill(names.LOAD_BALANCER_LOCAL_SET, at)
        if not self.port.source_ranges:
            return
        self._fill(names.LOAD_BALANCER_FIREWALL_SET, at)
        for cidr in self.port.source_ranges:
            self._fill(names.SOURCE_CIDR_SET, self._at(address, port, cidr))
        if any(ip_address(self.node_ip) in ip_network(cidr) for cidr in self.port.source_ranges):
            # What the node itself sends there has this very address as its source.
            self._fill(names.SOURCE_IP_SET, self._at(address, port, address))
        else:
            block = kept_from_node(VirtualServerKey(self.family, address, self.protocol, port))
            self.found[block.key] = block.rules

    def _node_port(self) -> None:
        number = self.port.node_port
        for address in self.node_port_addresses:
            self._serve(address, number, self.external_servers)
            # Only SCTP's sets have addresses: there is no set of SCTP ports.
            at = self._at(address, number) if self.protocol is Protocol.SCTP else Member(port=number)
            self._fill(names.NODE_PORT_SET[self.protocol], at)
            if self.port.external_local:
                self._fill(names.NODE_PORT_LOCAL_SET[self.protocol], at)

    def _serve(self, address: str, port: int, servers: Sequence[Endpoint]) -> None:
        key = VirtualServerKey(self.family, address, self.protocol, port)
        if key in self.found:  # an address that was named twice
            return
        self.found[key] = self.virtual_server
        for server in servers:
            self.found[RealServerKey(*key, server.address, server.port)] = _WEIGHT

    def _bind(self, address: str) -> None:
        self.found[AddressKey(self.family, address)] = EXISTS
        self._fill(names.ADDRESSES_SET, Member(address))

    def _fill(self, name: str, member: Member) -> None:
        """Add a member to a set, with the rules that are there while it has any."""
        set_name = names.set_name(name, self.family)
        self.found[MemberKey(set_name, member)] = EXISTS
        self.found.update(self.rules.get(set_name, ()))

    def _at(self, address: str, port: int, source: str = "") -> Member:
        return Member(address, self.protocol, port, source)


@lru_cache(maxsize=1024)
def _virtual_server(scheduler: str, affinity_seconds: int) -> VirtualServer:
    flags = (PERSISTENT if affinity_seconds else 0) | (MH_PORT if scheduler == "mh" else 0)
    return VirtualServer(scheduler, flags, affinity_seconds)
