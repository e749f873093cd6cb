"""The API objects that are watched, with only the fields that are read (reference: section 1).

Field names are the API's; what is absent here is skipped by the decoder and costs nothing.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class _Wire(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """An object as the API spells it. `gc=False`: decoded JSON has no cycles, and the collector need not look."""


class ObjectMeta(_Wire, frozen=True):
    """`metadata`."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ServicePortSpec(_Wire, frozen=True):
    """An entry of a Service's `spec.ports`."""

    port: int
    name: str = ""
    protocol: str = "TCP"
    node_port: int = 0


class ClientIPConfig(_Wire, frozen=True):
    """`spec.sessionAffinityConfig.clientIP`."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(_Wire, frozen=True):
    """`spec.sessionAffinityConfig`."""

    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(_Wire, frozen=True):
    """A Service's `spec`."""

    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    ports: list[ServicePortSpec] | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    external_traffic_policy: str = ""
    internal_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int = 0


class LoadBalancerIngress(_Wire, frozen=True):
    """An entry of `status.loadBalancer.ingress`."""

    ip: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(_Wire, frozen=True):
    """`status.loadBalancer`."""

    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(_Wire, frozen=True):
    """A Service's `status`."""

    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(_Wire, frozen=True):
    """`v1` Service."""

    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class EndpointConditions(_Wire, frozen=True):
    """Conditions of an endpoint; None means unknown, which reads as ready, serving, not terminating."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Hint(_Wire, frozen=True):
    name: str


class EndpointHints(_Wire, frozen=True):
    """`hints` of an endpoint."""

    for_zones: list[_Hint] | None = None
    for_nodes: list[_Hint] | None = None


class SliceEndpoint(_Wire, frozen=True):
    """An entry of an EndpointSlice's `endpoints`."""

    addresses: list[str] = []
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    hints: EndpointHints | None = None


class SlicePort(_Wire, frozen=True):
    """An entry of an EndpointSlice's `ports`."""

    name: str | None = None
    port: int | None = None
    protocol: str = "TCP"


class EndpointSlice(_Wire, frozen=True):
    """`discovery.k8s.io/v1` EndpointSlice."""

    metadata: ObjectMeta
    address_type: str = ""
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class NodeAddress(_Wire, frozen=True):
    """An entry of a Node's `status.addresses`."""

    type: str
    address: str


class Taint(_Wire, frozen=True):
    """An entry of a Node's `spec.taints`."""

    key: str
    effect: str = ""


class NodeSpec(_Wire, frozen=True):
    """A Node's `spec`."""

    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeStatus(_Wire, frozen=True):
    """A Node's `status`."""

    addresses: list[NodeAddress] | None = None


class Node(_Wire, frozen=True):
    """`v1` Node."""

    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServiceCIDRSpec(_Wire, frozen=True):
    """A ServiceCIDR's `spec`."""

    cidrs: list[str] | None = None


class ServiceCIDR(_Wire, frozen=True):
    """`networking.k8s.io/v1` ServiceCIDR."""

    metadata: ObjectMeta
    spec: ServiceCIDRSpec = ServiceCIDRSpec()


Kind = Literal["Service", "EndpointSlice", "Node", "ServiceCIDR"]
Object = Service | EndpointSlice | Node | ServiceCIDR

KINDS: dict[Kind, type[Object]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
ZONE_LABEL = "topology.kubernetes.io/zone"
