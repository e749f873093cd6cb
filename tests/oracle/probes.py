"""Which packets to try: every frontend from every sort of client, and addresses and ports that nobody has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from heapq import nsmallest
from itertools import product
from zlib import crc32

from kproxy.cluster import ClusterState
from kproxy.model import Family, Protocol
from kproxy.node_addresses import LOOPBACK
from kproxy.routing import frontends
from tests.lab.flows import Flow, Origin
from tests.oracle.worlds import (
    CLIENTS,
    CLUSTER_IPS,
    EXTERNAL_IPS,
    HERE_PODS,
    LOAD_BALANCER_IPS,
    NOBODY,
    NODE_ADDRESSES,
    OTHER_NODE,
    OTHER_PODS,
    PORTS,
    UNALLOCATED,
    UNKNOWN_PORT,
    in_family,
)

AT_FRONTENDS, ELSEWHERE = 120, 12  # how many of each are tried

SOURCES = tuple(dict.fromkeys((*HERE_PODS, OTHER_PODS[0], OTHER_NODE, *CLIENTS, *NODE_ADDRESSES, *LOAD_BALANCER_IPS)))
_DESTINATIONS = dict.fromkeys(
    (*CLUSTER_IPS, UNALLOCATED, *NODE_ADDRESSES, *LOAD_BALANCER_IPS, *EXTERNAL_IPS, NOBODY, HERE_PODS[2])
)
_NUMBERS = sorted({UNKNOWN_PORT, 8080, *(number for _, _, numbers, _ in PORTS for number in numbers)})

Target = tuple[str, int, Protocol]


def probes(state: ClusterState, node_addresses: Collection[str], luck: int) -> list[Flow]:
    """The flows to try now. Each flow has its own luck, so that fewer objects do not mean other flows."""

    def drawn(flow: Flow) -> int:
        return crc32(f"{luck} {flow}".encode())

    served = targets(state, node_addresses)
    at_frontends = [flow for target in served for flow in towards(target, SOURCES, node_addresses)]
    chosen = nsmallest(AT_FRONTENDS, at_frontends, key=drawn)
    others = {
        (in_family(address, family), port, protocol)
        for address, family, port, protocol in product(_DESTINATIONS, Family, _NUMBERS, Protocol)
    }
    unserved = sorted(others.difference(served))
    elsewhere = nsmallest(ELSEWHERE, unserved, key=lambda target: crc32(f"{luck} {target}".encode()))
    return chosen + [min(towards(target, SOURCES, node_addresses), key=drawn) for target in elsewhere]


def targets(state: ClusterState, node_addresses: Collection[str]) -> list[Target]:
    """Where service ports are to be reached: node ports on every address of the node, and where they must not be."""
    return sorted(set(_served(state, node_addresses)))


def _served(state: ClusterState, node_addresses: Collection[str]) -> Iterator[Target]:
    for service in state.services():
        for port in state.service_ports(service):
            for _, frontend in frontends(port):
                if frontend.address:
                    yield frontend.address, frontend.port, frontend.protocol
                else:
                    for address in (*node_addresses, LOOPBACK[port.family], in_family(NOBODY, port.family)):
                        if Family.of(address) is port.family:
                            yield address, frontend.port, frontend.protocol


def towards(target: Target, sources: Iterable[str], node_addresses: Collection[str]) -> Iterator[Flow]:
    """Flows to a target from each of the sources (IPv4 addresses, or their twins), from where that one is."""
    family = Family.of(target[0])
    if target[0] == LOOPBACK[family]:
        yield Flow(Origin.NODE, target[0], *target)
        return
    for source in sources:
        address = in_family(source, family)
        if address in node_addresses:
            origin = Origin.NODE
        elif source in HERE_PODS:
            origin = Origin.POD
        else:
            origin = Origin.OUTSIDE
        yield Flow(origin, address, *target)
