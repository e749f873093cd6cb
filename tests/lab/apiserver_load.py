"""Objects for measurements: many Services with their EndpointSlices, as large as those of a real cluster."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

NODES = 100
PODS_PER_NODE = 8192
SERVICE_CIDR = "10.96.0.0/12"
POD_CIDR = "10.128.0.0/9"
_FIRST_CLUSTER_IP = int(IPv4Address("10.96.1.0"))
_FIRST_POD_IP = int(IPv4Address("10.128.0.0"))
_BORN = "2026-01-01T00:00:00Z"


def service_name(number: int) -> str:
    """Name of a generated Service; it is in the namespace `default`."""
    return f"svc-{number:05d}"


def cluster_ip(number: int) -> str:
    """ClusterIP of a generated Service; its port is 80."""
    return str(IPv4Address(_FIRST_CLUSTER_IP + number))


def slice_of(number: int, endpoints: int, first_pod: int | None = None) -> dict[str, Any]:
    """The EndpointSlice of a generated Service. `first_pod` moves its endpoints to other addresses."""
    first = number * endpoints if first_pod is None else first_pod
    name = service_name(number)
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": f"{name}-{number:05x}",
            "generateName": f"{name}-",
            "namespace": "default",
            "labels": {
                "app": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": name,
            },
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": _BORN},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": _uid("5e", number)}],
            "managedFields": _managed_fields("kube-controller-manager", "f:addressType", "f:endpoints", "f:ports"),
        },
        "addressType": "IPv4",
        "endpoints": [_endpoint(name, first + index) for index in range(endpoints)],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def _endpoint(name: str, pod: int) -> dict[str, Any]:
    node = pod % NODES
    address = IPv4Address(_FIRST_POD_IP + node * PODS_PER_NODE + pod // NODES)
    return {
        "addresses": [str(address)],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{node}",
        "targetRef": {"kind": "Pod", "namespace": "default", "name": f"{name}-{pod:06d}", "uid": _uid("90d", pod)},
        "zone": f"zone-{node % 3}",
    }


def _service(number: int) -> dict[str, Any]:
    name = service_name(number)
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": _uid("5e", number),
            "labels": {"app": name},
            "managedFields": _managed_fields("kubectl-client-side-apply", "f:ports", "f:selector", "f:type"),
        },
        "spec": {
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": name},
            "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def _uid(kind: str, number: int) -> str:
    return f"{number:08x}-0000-4000-8000-{kind:0>12}"


def _managed_fields(manager: str, *fields: str) -> list[dict[str, Any]]:
    owned: dict[str, Any] = {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}} | {field: {} for field in fields}
    entry = {"manager": manager, "operation": "Update", "apiVersion": "v1", "time": _BORN, "fieldsType": "FieldsV1"}
    return [entry | {"fieldsV1": owned}]


def generated(services: int, endpoints: int) -> Iterator[dict[str, Any]]:
    """A Service and its EndpointSlice for each number below `services`, and the Nodes that carry the endpoints."""
    for node in range(NODES if services else 0):
        yield {
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": {"name": f"node-{node}", "labels": {"topology.kubernetes.io/zone": f"zone-{node % 3}"}},
            "spec": {"podCIDRs": [f"{IPv4Address(_FIRST_POD_IP + node * PODS_PER_NODE)}/19"]},
            "status": {"addresses": [{"type": "InternalIP", "address": f"192.168.0.{node + 1}"}]},
        }
    for number in range(services):
        yield _service(number)
        yield slice_of(number, endpoints)
