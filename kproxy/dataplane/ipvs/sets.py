"""The ipsets (reference: section 4.2.4)."""

from __future__ import annotations

from typing import NamedTuple

from kproxy.dataplane.base import Entries
from kproxy.dataplane.ipvs import names
from kproxy.dataplane.ipvs.entries import SetKey, SetKind, SetType
from kproxy.model import Family, Protocol


class Set(NamedTuple):
    """What a set holds, and the comment of rules that look into it."""

    kind: SetKind
    comment: str


def _node_ports(protocol: str, purpose: str) -> Set:
    return Set(SetKind.PORT, f"Kubernetes nodeport {protocol} port {purpose}")


def _sctp_node_ports(purpose: str) -> Set:
    return Set(SetKind.ADDRESS_PORT, f"Kubernetes nodeport SCTP port {purpose} with type 'hash ip:port'")


_MASQUERADE = "for masquerade purpose"
_LOCAL = "with externalTrafficPolicy=local"

# By their IPv4 names.
SETS: dict[str, Set] = {
    names.LOOP_BACK_SET: Set(
        SetKind.ADDRESS_PORT_ADDRESS,
        "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose",
    ),
    names.CLUSTER_IP_SET: Set(SetKind.ADDRESS_PORT, f"Kubernetes service cluster ip + port {_MASQUERADE}"),
    names.EXTERNAL_IP_SET: Set(
        SetKind.ADDRESS_PORT, "Kubernetes service external ip + port for masquerade and filter purpose"
    ),
    names.EXTERNAL_IP_LOCAL_SET: Set(SetKind.ADDRESS_PORT, f"Kubernetes service external ip + port {_LOCAL}"),
    names.LOAD_BALANCER_SET: Set(SetKind.ADDRESS_PORT, "Kubernetes service lb portal"),
    names.LOAD_BALANCER_LOCAL_SET: Set(SetKind.ADDRESS_PORT, f"Kubernetes service load balancer ip + port {_LOCAL}"),
    names.LOAD_BALANCER_FIREWALL_SET: Set(
        SetKind.ADDRESS_PORT, "Kubernetes service load balancer ip + port for load balancer with sourceRange"
    ),
    names.SOURCE_CIDR_SET: Set(
        SetKind.ADDRESS_PORT_NETWORK,
        "Kubernetes service load balancer ip + port + source cidr for packet filter purpose",
    ),
    names.SOURCE_IP_SET: Set(
        SetKind.ADDRESS_PORT_ADDRESS,
        "Kubernetes service load balancer ip + port + source IP for packet filter purpose",
    ),
    names.NODE_PORT_SET[Protocol.TCP]: _node_ports("TCP", _MASQUERADE),
    names.NODE_PORT_SET[Protocol.UDP]: _node_ports("UDP", _MASQUERADE),
    names.NODE_PORT_SET[Protocol.SCTP]: _sctp_node_ports(_MASQUERADE),
    names.NODE_PORT_LOCAL_SET[Protocol.TCP]: _node_ports("TCP", _LOCAL),
    names.NODE_PORT_LOCAL_SET[Protocol.UDP]: _node_ports("UDP", _LOCAL),
    names.NODE_PORT_LOCAL_SET[Protocol.SCTP]: _sctp_node_ports(_LOCAL),
    names.HEALTH_CHECK_SET: Set(SetKind.PORT, "Kubernetes health check node port"),
    names.ADDRESSES_SET: Set(SetKind.ADDRESS, "Addresses on the ipvs interface"),
}


def render_sets(family: Family) -> Entries:
    """All sets of a family; they are there even while they are empty, for rules name them."""
    return {SetKey(names.set_name(name, family)): SetType(known.kind, family) for name, known in SETS.items()}
