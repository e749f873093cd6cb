"""Service ports with every kind of rule, and what the kernel must hold for them."""

from __future__ import annotations

from ipaddress import ip_address

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.fixed import render_base
from kproxy.dataplane.iptables.options import Options
from kproxy.dataplane.iptables.render import render_route
from kproxy.model import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    NodeFacts,
    Protocol,
    Route,
    ServicePort,
    ServicePortName,
)

BOTH = (Family.IPv4, Family.IPv6)
GUARDED = Options(localhost_node_ports=True)
_VIP = {Family.IPv4: "10.96.0.0", Family.IPv6: "fd00:96::"}
_EXTERNAL = {Family.IPv4: "192.0.2.0", Family.IPv6: "2001:db8::"}
_POD = {Family.IPv4: "10.180.0.0", Family.IPv6: "fd00:180::"}
_PODS = {Family.IPv4: "10.180.0.0/16", Family.IPv6: "fd00:180::/32"}
_CLIENTS = {Family.IPv4: "203.0.113.0/24", Family.IPv6: "2001:db8:1::/48"}


def _address(networks: dict[Family, str], family: Family, number: int) -> str:
    return str(ip_address(networks[family]) + number)


def facts(*families: Family) -> NodeFacts:
    return NodeFacts(
        name="here", families=families, detectors={family: LocalDetector(cidr=_PODS[family]) for family in families}
    )


def plain(family: Family, number: int, *pods: int) -> Route:
    """The service port default/svc-N:http on a cluster IP."""
    vip = _address(_VIP, family, number)
    name = ServicePortName("default", f"svc-{number}", "http", Protocol.TCP)
    endpoints = tuple(Endpoint(_address(_POD, family, pod), 8080) for pod in pods)
    return Route(
        ServicePort(name, family, vip, 80),
        cluster=endpoints,
        has_any=bool(endpoints),
        frontends=((FrontendKind.CLUSTER_IP, Frontend(family, vip, Protocol.TCP, 80)),),
    )


def elaborate(family: Family, number: int = 0, protocol: Protocol = Protocol.TCP) -> Route:
    """The service port default/all:http with all that there is: addresses, affinity, source ranges, policy Local."""
    vip, external, balancer = (
        _address(_VIP, family, 65000 + number),
        _address(_EXTERNAL, family, 1 + number),
        _address(_EXTERNAL, family, 101 + number),
    )
    there = Endpoint(_address(_POD, family, 2001), 8080)
    here = Endpoint(_address(_POD, family, 2002), 8080, local=True)
    return Route(
        ServicePort(
            ServicePortName("default", "all", "http", protocol),
            family,
            vip,
            80,
            node_port=30080 + number,
            external_ips=(external,),
            load_balancer_ips=(balancer,),
            source_ranges=(_CLIENTS[family],),
            affinity_seconds=10800,
            external_local=True,
            externally_accessible=True,
            health_check_node_port=30999,
        ),
        cluster=(there, here),
        local=(here,),
        has_any=True,
        frontends=(
            (FrontendKind.CLUSTER_IP, Frontend(family, vip, protocol, 80)),
            (FrontendKind.EXTERNAL_IP, Frontend(family, external, protocol, 80)),
            (FrontendKind.LOAD_BALANCER, Frontend(family, balancer, protocol, 80)),
            (FrontendKind.NODE_PORT, Frontend(family, "", protocol, 30080 + number)),
        ),
    )


def entries(*routes: Route, families: tuple[Family, ...] = BOTH) -> Entries:
    """All that the kernel must hold."""
    found = render_base(facts(*families), GUARDED)
    for route in routes:
        found.update(render_route(route, facts(*families), GUARDED))
    return found


def everything() -> Entries:
    """In both families: a service with everything, a plain one, and one without endpoints."""
    return entries(*(r for f in BOTH for r in (elaborate(f), plain(f, 1, 1, 2, 3), plain(f, 2))))
