"""What is rendered in ipvs mode, in forms to read."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from msgspec.structs import replace

from kproxy.dataplane.base import Entries
from kproxy.dataplane.ipvs.chains import laid_out
from kproxy.dataplane.ipvs.entries import AddressKey, MemberKey, RealServerKey, VirtualServerKey
from kproxy.dataplane.ipvs.fixed import render_base
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.render import render_route
from kproxy.model import Endpoint, Family, NodeFacts, Protocol, Route, ServicePort, join_host_port
from tests.iptables import samples
from tests.iptables.samples import LOCAL, routed, service_port

FACTS = replace(
    samples.FACTS,
    families=(Family.IPv4, Family.IPv6),
    addresses={Family.IPv4: ("192.0.2.1", "192.0.2.2"), Family.IPv6: ("2001:db8::1",)},
)


FULL: dict[str, Any] = {
    "node_port": 30080,
    "load_balancer_ips": ("198.51.100.10",),
    "external_ips": ("198.51.100.1",),
}
FULL_IPV6: dict[str, Any] = {
    "node_port": 30080,
    "load_balancer_ips": ("2001:db8:1::10",),
    "external_ips": ("2001:db8:1::1",),
}


def rendered(*routes: Route, facts: NodeFacts = FACTS, options: Options | None = None) -> Entries:
    """The entries of these service ports."""
    entries: Entries = {}
    for route in routes:
        entries |= render_route(route, facts, options or Options())
    return entries


def cluster(*routes: Route, facts: NodeFacts = FACTS, options: Options | None = None) -> Entries:
    """Everything that is there with these service ports."""
    return render_base(facts, options or Options()) | rendered(*routes, facts=facts, options=options)


def everything(family: Family = Family.IPv4) -> Entries:
    """Services with all that there is, so that there is every rule."""
    four = family is Family.IPv4
    addresses = FULL if four else FULL_IPV6
    pod = LOCAL if four else Endpoint("fd00:10::1", 80, local=True)

    def port(name: str, **settings: Any) -> ServicePort:
        return service_port(name, family=family, **settings)

    routes = [
        routed(port(f"svc{protocol}{local}", protocol=protocol, external_local=local, **addresses), pod)
        for protocol in Protocol
        for local in (False, True)
    ]
    allowed = port(
        "allowed",
        load_balancer_ips=("198.51.100.11" if four else "2001:db8:1::11",),
        source_ranges=("192.0.2.0/24" if four else "2001:db8::/48",),
    )
    barred = port(
        "barred",
        load_balancer_ips=("198.51.100.20", "198.51.100.21") if four else ("2001:db8:1::20", "2001:db8:1::21"),
        source_ranges=("203.0.113.0/24" if four else "2001:db8:2::/48",),
    )
    return cluster(*routes, routed(allowed), routed(barred))


def servers(entries: Entries) -> dict[str, list[str]]:
    """The virtual servers, each with its real servers."""
    found: dict[str, list[str]] = {str(key): [] for key in entries if isinstance(key, VirtualServerKey)}
    for key in entries:
        if isinstance(key, RealServerKey):
            found[str(key.virtual_server)].append(join_host_port(key.endpoint_address, key.endpoint_port))
    return found


def sets(entries: Entries) -> dict[str, set[str]]:
    """The sets that have members, with them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for key in entries:
        if isinstance(key, MemberKey):
            found[key.set_name].add(str(key.member))
    return dict(found)


def bound(entries: Entries) -> set[str]:
    """The addresses on the device."""
    return {key.address for key in entries if isinstance(key, AddressKey)}


def chains(entries: Entries, family: Family = Family.IPv4) -> dict[str, list[str]]:
    """The rules of one family, by table and chain: "nat KUBE-SERVICES"."""
    return {
        f"{key.table} {key.chain}": list(map(str, rules))
        for key, rules in laid_out(entries).items()
        if key.family is family
    }
