"""From EndpointSlice objects to the endpoints of a service port (reference: section 1.4)."""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern

import msgspec

from kproxy.api.objects import EndpointSlice, SliceEndpoint
from kproxy.cluster.services import Note
from kproxy.model import Endpoint, Family, ServicePortName, canonical_address


class SlicePortRef(msgspec.Struct, frozen=True, gc=False):
    """One port of a slice; matched to a service port by name and protocol."""

    name: str
    protocol: str
    number: int


class Slice(msgspec.Struct, frozen=True, gc=False):
    """What is kept of an EndpointSlice. The endpoints have port 0: the slice's ports apply to all of them."""

    family: Family
    ports: tuple[SlicePortRef, ...]
    endpoints: tuple[Endpoint, ...]


def read_slice(source: EndpointSlice, node_name: str, note: Note) -> Slice | None:
    """What a slice says; None for address types that no proxy handles. `note` hears what was left out."""
    try:
        family = Family[source.address_type]
    except KeyError:
        if source.address_type != "FQDN":
            note(f"addressType {source.address_type!r} is neither IPv4 nor IPv6")
        return None
    ports = []
    for port in source.ports or []:
        number = port.port or 0
        if port.name is None or not 0 < number < 1 << 16:
            note(f"port {port.name!r} has no {'name' if port.name is None else 'usable number'} and is left out")
            continue
        ports.append(SlicePortRef(intern(port.name), intern(port.protocol), number))
    endpoints = []
    for endpoint in source.endpoints or []:
        if endpoint.addresses:
            try:
                endpoints.append(_endpoint(endpoint, family, node_name))
            except ValueError as error:
                note(f"endpoint {endpoint.addresses[0]!r} is left out: {error}")
    return Slice(family, tuple(ports), tuple(endpoints))


def _endpoint(source: SliceEndpoint, family: Family, node_name: str) -> Endpoint:
    address = canonical_address(source.addresses[0])
    if Family.of(address) is not family:
        raise ValueError(f"not an {family.name} address")
    conditions, hints = source.conditions, source.hints
    return Endpoint(
        address=address,
        port=0,
        ready=conditions.ready is not False,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        local=bool(node_name) and source.node_name == node_name,
        zone_hints=tuple(intern(h.name) for h in hints.for_zones or ()) if hints else (),
        node_hints=tuple(intern(h.name) for h in hints.for_nodes or ()) if hints else (),
    )


def merge(slices: Mapping[str, Slice], name: ServicePortName, family: Family) -> list[Endpoint]:
    """The endpoints of a service port from all its slices, in the order of their `address:port` text.

    An endpoint that is listed twice counts once: one that is not terminating wins over one that is (a pod address may
    already be in use again), then one that is ready, then the one in the slice whose name sorts last.
    """
    merged: dict[tuple[str, int], Endpoint] = {}
    for _, piece in sorted(slices.items()) if len(slices) > 1 else slices.items():
        if piece.family is not family:
            continue
        for port in piece.ports:
            if port.name == name.port and port.protocol == name.protocol:
                for endpoint in piece.endpoints:
                    _add(merged, endpoint, port.number)
    return sorted(merged.values(), key=str)


def _add(merged: dict[tuple[str, int], Endpoint], endpoint: Endpoint, port: int) -> None:
    key = (endpoint.address, port)
    known = merged.get(key)
    if known is None or _rank(endpoint) >= _rank(known):
        merged[key] = Endpoint(
            endpoint.address,
            port,
            endpoint.ready,
            endpoint.serving,
            endpoint.terminating,
            endpoint.local,
            endpoint.zone_hints,
            endpoint.node_hints,
        )


def _rank(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return (not endpoint.terminating, endpoint.ready, endpoint.serving)
