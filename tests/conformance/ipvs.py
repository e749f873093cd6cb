"""What becomes of a recorded packet in ipvs mode.

The recordings are of kube-proxy's other modes, with the same objects. Most packets fare alike in all of them; where
ipvs mode is different (kproxy/dataplane/ipvs/README.md), it is said here how, from the objects and what was recorded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from kproxy.model import FrontendKind
from kproxy.node_addresses import is_loopback
from tests.conformance.flows import World
from tests.lab.expectations import Action, Expectation
from tests.lab.flows import Flow, Origin
from tests.lab.packets import Lab
from tests.lab.proxy import Item, Proxy
from tests.oracle.kernels import forget_clients_of_ipvs


class VirtualServer(NamedTuple):
    """Whose it is, and what its address is to that Service."""

    service: Item
    kind: FrontendKind

    @property
    def keeps_sources(self) -> bool:
        """Whether it has to keep to endpoints of this node (externalTrafficPolicy Local)."""
        is_external = self.kind is not FrontendKind.CLUSTER_IP
        return is_external and self.service["spec"].get("externalTrafficPolicy") == "Local"

    def keeps_out(self, client: str) -> bool:
        """Whether source ranges do."""
        ranges = self.service["spec"].get("loadBalancerSourceRanges", [])
        if self.kind is not FrontendKind.LOAD_BALANCER or not ranges:
            return False
        return not any(ip_address(client) in ip_network(cidr.strip()) for cidr in ranges)


class IpvsWorld(World):
    """What is in force at some step, for a proxy in ipvs mode."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "proxy_mode": "ipvs"})
        self._luck = random.Random(0)

    def expected(self, recorded: Mapping[str, Any]) -> tuple[Flow, Expectation]:
        flow, expected = super().expected(recorded)
        if flow.source in self._bound():
            # The node has the Services' addresses: only its own processes can send from one.
            flow = flow._replace(origin=Origin.NODE)
        return flow, self._fate(flow, expected)

    def forget_clients(self, lab: Lab, _: Proxy) -> None:
        """Endpoints that leave would keep their connections, and find their clients again when they come back."""
        lab.netns.run(forget_clients_of_ipvs, self._luck)

    def _fate(self, flow: Flow, recorded: Expectation) -> Expectation:
        server = self._virtual_server(flow)
        if server is None:
            # Other ports of the addresses on kube-ipvs0 are refused. Everything else goes on as without a proxy, also
            # to node ports on loopback addresses, and to addresses of the service range that no Service has.
            return Expectation(Action.REJECT if flow.destination in self._bound() else Action.PASS)
        if recorded.action is Action.DROP and not server.keeps_out(flow.source):
            # A policy Local without an endpoint here: no rule drops, and a server without endpoints refuses.
            return Expectation(Action.REJECT)
        if recorded.action is not Action.DNAT:
            return recorded
        endpoints, masquerade = recorded.endpoints, recorded.masquerade
        if flow.origin is not Origin.OUTSIDE and server.keeps_sources:
            # Pods and the node itself have no way round the policy. So their source is kept, too.
            endpoints, masquerade = frozenset(e for e in endpoints if e[0] in self._endpoints_here()), False
            if not endpoints:
                return Expectation(Action.REJECT)
        return Expectation(Action.DNAT, endpoints, masquerade, in_turn=not self.sticky)

    def _virtual_server(self, flow: Flow) -> VirtualServer | None:
        node_ports_at = {address for address in self.config["node_port_ips"] if not is_loopback(address)}
        for service in self.services():
            kinds = dict(_addresses(service))
            for port in service["spec"]["ports"]:
                if port["protocol"] != flow.protocol:
                    continue
                if port["port"] == flow.port and flow.destination in kinds:
                    return VirtualServer(service, kinds[flow.destination])
                if port.get("nodePort") == flow.port and flow.destination in node_ports_at:
                    return VirtualServer(service, FrontendKind.NODE_PORT)
        return None

    def _bound(self) -> set[str]:
        """What is on kube-ipvs0; an outside address that the node has otherwise stays where it is."""
        return {address for service in self.services() for address, _ in _addresses(service)} - {*self.addresses()}

    def _endpoints_here(self) -> set[str]:
        endpoints = [endpoint for piece in self.slices() for endpoint in piece["endpoints"]]
        here = [endpoint for endpoint in endpoints if endpoint.get("nodeName") == self.config["node_name"]]
        return {address for endpoint in here for address in endpoint["addresses"]}


def _addresses(service: Item) -> Iterator[tuple[str, FrontendKind]]:
    """All that the proxy serves, but for node ports."""
    for ingress in service.get("status", {}).get("loadBalancer", {}).get("ingress", []):
        if ingress.get("ipMode") != "Proxy":
            yield ingress["ip"], FrontendKind.LOAD_BALANCER
    for address in service["spec"].get("externalIPs", []):
        yield address, FrontendKind.EXTERNAL_IP
    yield service["spec"]["clusterIP"], FrontendKind.CLUSTER_IP
