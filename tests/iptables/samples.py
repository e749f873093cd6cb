"""Builders of services and of what is rendered from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kproxy import routing
from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.fixed import render_base
from kproxy.dataplane.iptables.options import Options
from kproxy.dataplane.iptables.render import render_route
from kproxy.dataplane.iptables.rule import AnyRule
from kproxy.model import Endpoint, Family, LocalDetector, NodeFacts, Protocol, Route, ServicePort, ServicePortName
from tests.iptables.tables import laid_out

PODS = LocalDetector(cidr="10.180.0.0/16")
FACTS = NodeFacts(
    name="node",
    families=(Family.IPv4,),
    ips={Family.IPv4: "192.0.2.1", Family.IPv6: "2001:db8::1"},
    detectors={Family.IPv4: PODS, Family.IPv6: LocalDetector(cidr="fd00:10::/64")},
)
LOCAL = Endpoint("10.180.0.1", 80, local=True)
REMOTE = Endpoint("10.180.1.1", 80)


def service_port(
    name: str = "svc1", *, protocol: Protocol = Protocol.TCP, family: Family = Family.IPv4, **settings: Any
) -> ServicePort:
    settings.setdefault("cluster_ip", "10.96.0.30" if family is Family.IPv4 else "fd00:96::30")
    reachable = any(settings.get(field) for field in ("node_port", "external_ips", "load_balancer_ips"))
    return ServicePort(
        name=ServicePortName("ns1", name, "p80", protocol),
        family=family,
        port=80,
        externally_accessible=reachable,
        **settings,
    )


def routed(port: ServicePort, *endpoints: Endpoint) -> Route:
    return routing.route(port, endpoints, node_name="node", zone="", frontends=routing.frontends(port))


def cluster(*routes: Route, facts: NodeFacts = FACTS, options: Options | None = None) -> Entries:
    """Everything that is there with these services."""
    options = options or Options()
    entries = render_base(facts, options)
    for route in routes:
        entries |= render_route(route, facts, options)
    return entries


def written(
    port: ServicePort, *endpoints: Endpoint, facts: NodeFacts = FACTS, options: Options | None = None
) -> dict[str, list[str]]:
    """The rules of one service port, by table and chain: "nat KUBE-SERVICES"."""
    return shown(laid_out(render_route(routed(port, *endpoints), facts, options or Options())))


def base(facts: NodeFacts = FACTS, options: Options | None = None) -> dict[str, list[str]]:
    """The rules that are there without services, by table and chain."""
    return shown(laid_out(cluster(facts=facts, options=options)))


def shown(tables: Mapping[str, Mapping[str, list[AnyRule]]]) -> dict[str, list[str]]:
    return {
        f"{table} {chain}": list(map(str, rules))
        for table, chains in tables.items()
        for chain, rules in chains.items()
        if rules
    }
