"""From routes to the elements that the kernel should hold. Pure; README.md explains the layout."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network

from kproxy.dataplane.base import Entries, Key, Value
from kproxy.dataplane.nftables import chains
from kproxy.dataplane.nftables.containers import Container, container, element_comment
from kproxy.model import Endpoint, Family, Frontend, FrontendKind, NodeFacts, Outcome, Route, ServicePort

_SLOT = struct.Struct("=I")


class _Maps:
    """The containers of one family for one sort of frontend: those that have an address, or node ports."""

    def __init__(self, family: Family, node_port: bool) -> None:
        prefix = "nodeport-" if node_port else ""
        self.family = family
        self.policies = container(family, f"{prefix}policies")
        self.services = container(family, "nodeports" if node_port else "services")
        self.endpoints = container(family, f"{prefix}endpoints")
        self.pick = f"{prefix}pick"
        self.local_services = container(family, "local-nodeports" if node_port else "local-services")
        self.local_endpoints = container(family, f"local-{prefix}endpoints")
        self.local_pick = f"local-{prefix}pick"
        self.no_endpoints = container(family, "no-endpoint-nodeports" if node_port else "no-endpoints")
        self.learn = container(family, "learn-nodeports" if node_port else "learn")
        self.local_chain = "local-nodeport" if node_port else "local"


@lru_cache(maxsize=4)
def _maps(family: Family, node_port: bool) -> _Maps:
    return _Maps(family, node_port)


def render_route(route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:
    """The entries of one service port.

    `present` is what is in place: an endpoint that stays keeps its slot, so that one change of a service costs one
    element and counters go on.
    """
    entries: Entries = {}
    for kind, frontend in route.frontends:
        maps = _maps(frontend.family, kind is FrontendKind.NODE_PORT)
        if kind is FrontendKind.CLUSTER_IP:
            entries[container(frontend.family, "cluster-ips").key(_packed(frontend.address))] = ""
            _cluster_ip(entries, route, frontend, maps, present)
        else:
            if kind is FrontendKind.LOAD_BALANCER:
                _source_ranges(entries, route.service_port, frontend, facts)
            _external(entries, route, frontend, maps, present)
    _hairpin(entries, route)
    return entries


def _cluster_ip(entries: Entries, route: Route, frontend: Frontend, maps: _Maps, present: Mapping[Key, Value]) -> None:
    port = route.service_port
    match route.internal:
        case Outcome.CLUSTER:
            _balance(entries, maps.services, maps.endpoints, maps.pick, port, frontend, route.cluster, present)
        case Outcome.LOCAL:
            _balance(entries, maps.services, maps.endpoints, maps.pick, port, frontend, route.local, present)
        case Outcome.DROP | Outcome.REJECT:
            _refuse(entries, maps, port, frontend, route.internal)
            return
    if port.affinity_seconds:
        _verdict(entries, maps.policies, port, frontend, "jump sticky")
        _learn(entries, maps, port, frontend)


def _external(entries: Entries, route: Route, frontend: Frontend, maps: _Maps, present: Mapping[Key, Value]) -> None:
    port = route.service_port
    if not route.has_any:
        _refuse(entries, maps, port, frontend, Outcome.REJECT)
        return
    policy = maps.local_chain if port.external_local else "masq"
    if port.affinity_seconds:
        policy += "-sticky"
        _learn(entries, maps, port, frontend)
    _verdict(entries, maps.policies, port, frontend, f"jump {policy}")
    # With policy Local these serve the pods and processes of this node.
    _balance(entries, maps.services, maps.endpoints, maps.pick, port, frontend, route.cluster, present)
    match route.external:
        case Outcome.LOCAL:
            _balance(
                entries,
                maps.local_services,
                maps.local_endpoints,
                maps.local_pick,
                port,
                frontend,
                route.local,
                present,
            )
        case Outcome.DROP:
            _refuse(entries, maps, port, frontend, Outcome.DROP)
        case Outcome.CLUSTER | Outcome.REJECT:
            pass


def _balance(
    entries: Entries,
    services: Container,
    endpoints: Container,
    pick: str,
    port: ServicePort,
    frontend: Frontend,
    targets: Sequence[Endpoint],
    present: Mapping[Key, Value],
) -> None:
    count = len(targets)
    prefix = _key(endpoints, frontend)
    keys = [prefix + _SLOT.pack(slot) for slot in range(count)]
    values = [endpoints.address_port(_packed(e.address), e.port) for e in targets]
    entries.update(zip(keys, _keep_slots(values, [present.get(key) for key in keys]), strict=True))
    _verdict(entries, services, port, frontend, f"goto {pick}-{count}")
    if pick != "pick" or count > chains.ALWAYS_THERE:
        key, chain = chains.pick_chain(endpoints, f"{pick}-{count}", count)
        entries[key] = chain


def _keep_slots(wanted: list[bytes], present: list[Value | None]) -> list[bytes]:
    """The wanted endpoints, each in the slot that it has where that slot still exists; the others fill the gaps."""
    if wanted == present:
        return wanted
    missing = dict.fromkeys(wanted)
    slots: list[bytes | None] = []
    for value in present:
        if isinstance(value, bytes) and value in missing:
            del missing[value]
            slots.append(value)
        else:
            slots.append(None)
    rest = iter(missing)
    return [slot if slot is not None else next(rest) for slot in slots]


def _verdict(entries: Entries, where: Container, port: ServicePort, frontend: Frontend, verdict: str) -> None:
    entries[_key(where, frontend)] = (verdict, element_comment(str(port.name)))


def _refuse(entries: Entries, maps: _Maps, port: ServicePort, frontend: Frontend, outcome: Outcome) -> None:
    verdict = "drop" if outcome is Outcome.DROP else f"goto {chains.REJECT}"
    _verdict(entries, maps.no_endpoints, port, frontend, verdict)


def _learn(entries: Entries, maps: _Maps, port: ServicePort, frontend: Frontend) -> None:
    key, chain = chains.learn_chain(maps.family, port.affinity_seconds)
    entries[key] = chain
    _verdict(entries, maps.learn, port, frontend, f"goto {key.name}")


def _source_ranges(entries: Entries, port: ServicePort, frontend: Frontend, facts: NodeFacts) -> None:
    """Who may use a load balancer address. If the node may, so may the address itself, should it be on this node."""
    if not port.source_ranges:
        return
    family = frontend.family
    entries[_key(container(family, "firewalled"), frontend)] = element_comment(str(port.name))
    ranges = container(family, "source-ranges")
    allowed = list(port.source_ranges)
    if any(_contains(cidr, facts.node_ip(family)) for cidr in port.source_ranges):
        allowed.extend(f"{address}/{family.bits}" for address in port.load_balancer_ips)
    start = _key(ranges, frontend)
    for cidr in _without_overlaps(allowed):
        network = ip_network(cidr)
        entries[ranges.interval(start, network.network_address.packed, network.broadcast_address.packed)] = ""


def _contains(cidr: str, address: str) -> bool:
    return ip_address(address) in ip_network(cidr)


def _without_overlaps(cidrs: list[str]) -> list[str]:
    """The widest of each nest of CIDRs: an interval set refuses elements that overlap."""
    kept: list[str] = []
    for cidr in sorted(dict.fromkeys(cidrs), key=lambda c: ip_network(c).prefixlen):
        if not any(_contains(wider, cidr.partition("/")[0]) for wider in kept):
            kept.append(cidr)
    return kept


def _hairpin(entries: Entries, route: Route) -> None:
    """An endpoint of this node that reaches itself through its service must be masqueraded, or it answers itself."""
    hairpin = container(route.service_port.family, "hairpin")
    number = route.service_port.name.protocol.number
    for endpoint in (*route.cluster, *route.local):
        if endpoint.local:
            address = _packed(endpoint.address)
            entries[hairpin.key(address, address, number, endpoint.port)] = ""


def _key(where: Container, frontend: Frontend) -> bytes:
    """The frontend's key in a container; where more fields follow, the part before them."""
    if frontend.address:
        return where.key(_packed(frontend.address), frontend.protocol.number, frontend.port)
    return where.key(frontend.protocol.number, frontend.port)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
