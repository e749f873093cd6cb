"""The proxy's own vocabulary: service ports, endpoints, routes and what a node is.

Plain frozen data without behaviour that touches the outside. Everything that decides (routing) or programs
(dataplane) speaks in these terms; the API's wire objects end at `kproxy.cluster`.
"""

from __future__ import annotations

import ipaddress
import re
from enum import Enum, IntEnum, StrEnum
from typing import NamedTuple

import msgspec


class Family(IntEnum):
    """An IP family; the value is the IP version."""

    IPv4 = 4
    IPv6 = 6

    @property
    def bits(self) -> int:
        """Width of an address."""
        return 32 if self is Family.IPv4 else 128

    @classmethod
    def of(cls, address: str) -> Family:
        """Family of a canonical address or CIDR."""
        return cls.IPv6 if ":" in address else cls.IPv4


class Protocol(StrEnum):
    """Transport protocol, spelled as the API does."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    @property
    def number(self) -> int:
        """IANA protocol number."""
        return _PROTOCOL_NUMBERS[self]


_PROTOCOL_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


class ServiceName(NamedTuple):
    """Identity of a Service: the unit in which changes are tracked and written."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServicePortName(NamedTuple):
    """Identity of one port of a Service. The text form leaves out the protocol, as kube-proxy's does."""

    namespace: str
    name: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"

    @property
    def service(self) -> ServiceName:
        """The Service that the port belongs to."""
        return ServiceName(self.namespace, self.name)


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One address and port behind a service port, with the conditions that decide whether it is used."""

    address: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    local: bool = False
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()

    @property
    def usable_while_terminating(self) -> bool:
        """Whether the fallback for services with nothing ready may use it (KEP-1669)."""
        return self.serving and self.terminating

    def __str__(self) -> str:
        return join_host_port(self.address, self.port)


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a Service in one family: every address under which it is reached, and its policies."""

    name: ServicePortName
    family: Family
    cluster_ip: str
    port: int
    node_port: int = 0  # 0: none
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()  # ipMode VIP only
    source_ranges: tuple[str, ...] = ()  # CIDRs; empty: everyone
    affinity_seconds: int = 0  # 0: no session affinity
    internal_local: bool = False  # internalTrafficPolicy: Local
    external_local: bool = False  # externalTrafficPolicy: Local, and reachable from outside
    health_check_node_port: int = 0
    externally_accessible: bool = False
    created: str = ""  # RFC 3339; decides who keeps an address that two Services claim

    @property
    def uses_cluster_endpoints(self) -> bool:
        """Whether any traffic may go to endpoints on other nodes."""
        return not self.internal_local or self.externally_accessible

    @property
    def uses_local_endpoints(self) -> bool:
        """Whether any traffic must stay on this node."""
        return self.internal_local or (self.external_local and self.externally_accessible)


class FrontendKind(StrEnum):
    """What sort of address a client uses."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class Frontend(NamedTuple):
    """An address, protocol and port that clients connect to. Node ports have no address of their own ("")."""

    family: Family
    address: str
    protocol: Protocol
    port: int

    def __str__(self) -> str:
        where = join_host_port(self.address, self.port) if self.address else f"node port {self.port}"
        return f"{where}/{self.protocol}"


class Outcome(Enum):
    """What happens to the first packet of a connection to a frontend."""

    CLUSTER = "cluster"  # one of Route.cluster
    LOCAL = "local"  # one of Route.local
    DROP = "drop"  # endpoints exist, none on this node, policy Local
    REJECT = "reject"  # no usable endpoint anywhere


class TopologyMode(StrEnum):
    """Which hints restricted the cluster-wide endpoints."""

    NONE = ""
    SAME_NODE = "PreferSameNode"
    SAME_ZONE = "PreferSameZone"


class Route(msgspec.Struct, frozen=True):
    """A service port and the endpoints that may receive its traffic on this node; what dataplanes render."""

    service_port: ServicePort
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_any: bool = False  # a usable endpoint exists somewhere, even if policy excludes it here
    here: tuple[Endpoint, ...] = ()  # endpoints on this node in any condition, for the hairpin set of ipvs mode
    ready_here: tuple[str, ...] = ()  # addresses of ready endpoints on this node, for a health check node port
    topology: TopologyMode = TopologyMode.NONE
    topology_reason: str = ""  # why hints were or were not followed
    frontends: tuple[tuple[FrontendKind, Frontend], ...] = ()  # those this service port owns; conflicts are resolved

    def _outcome(self, local_policy: bool) -> Outcome:
        if not self.has_any:
            return Outcome.REJECT
        if not local_policy:
            return Outcome.CLUSTER
        return Outcome.LOCAL if self.local else Outcome.DROP

    @property
    def internal(self) -> Outcome:
        """Outcome for the cluster IP."""
        return self._outcome(self.service_port.internal_local)

    @property
    def external(self) -> Outcome:
        """Outcome for external addresses and node ports, seen from outside.

        With externalTrafficPolicy Local, local pods and the node itself are treated as with policy Cluster.
        """
        return self._outcome(self.service_port.external_local)


class DetectLocalMode(StrEnum):
    """How traffic of local pods is recognised; the names are kube-proxy's."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class LocalDetector(msgspec.Struct, frozen=True):
    """Recognises packets of local pods in one family: by source CIDR, or by input interface."""

    cidr: str = ""
    interface: str = ""
    interface_prefix: str = ""

    def __bool__(self) -> bool:
        return bool(self.cidr or self.interface or self.interface_prefix)


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataplane's fixed part and the routing depend on, beside Services and endpoints.

    Dictionaries are keyed by family; a family that is absent is not served.
    """

    name: str = ""
    zone: str = ""
    families: tuple[Family, ...] = (Family.IPv4, Family.IPv6)
    ips: dict[Family, str] = {}  # primary node addresses, where known
    detectors: dict[Family, LocalDetector] = {}
    node_port_addresses: dict[Family, tuple[str, ...] | None] = {}  # this node's; None or absent: every local one
    addresses: dict[Family, tuple[str, ...]] = {}  # this node's, but for loopback and those of Services; ipvs mode only
    service_cidrs: dict[Family, tuple[str, ...]] = {}
    large_families: frozenset[Family] = frozenset()  # with so many endpoints that iptables rules have no comments
    masquerade_all: bool = False
    masquerade_bit: int = 14

    @property
    def masquerade_mark(self) -> int:
        """The packet mark that asks for masquerading."""
        return 1 << self.masquerade_bit

    def node_ip(self, family: Family) -> str:
        """The primary node address of a family; loopback where it is not known."""
        return self.ips.get(family) or ("127.0.0.1" if family is Family.IPv4 else "::1")

    def detector(self, family: Family) -> LocalDetector:
        """The family's detector; false where there is none."""
        return self.detectors.get(family) or LocalDetector()


def join_host_port(address: str, port: int) -> str:
    """`address:port`, with brackets round an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


_CANONICAL_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?[1-9]?\d|10\d)\.){3}(?:25[0-5]|2[0-4]\d|1?[1-9]?\d|10\d)")


def canonical_address(text: str) -> str:
    """The canonical form of an IP address; leading zeros of IPv4 octets are decimal, as Kubernetes reads them.

    An IPv4-mapped IPv6 address becomes IPv4, as in Go. Raises ValueError.
    """
    if _CANONICAL_IPV4.fullmatch(text):
        return text
    if ":" not in text:
        octets = (str(int(o)) if o.isascii() and o.isdigit() else o for o in text.split("."))
        return str(ipaddress.IPv4Address(".".join(octets)))
    if "%" in text:
        raise ValueError(f"{text!r} has a zone; a service or endpoint address cannot have one")
    address = ipaddress.IPv6Address(text)
    return str(address.ipv4_mapped or address)


def canonical_cidr(text: str) -> str:
    """The canonical form of a CIDR with its host bits cleared, surrounding blanks removed. Raises ValueError."""
    address, slash, length = text.strip().partition("/")
    if not slash or not length.isascii() or not length.isdigit():
        raise ValueError(f"{text!r} is not a CIDR")
    return str(ipaddress.ip_network(f"{canonical_address(address)}/{int(length)}", strict=False))
