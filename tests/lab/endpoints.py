"""The EndpointSlices of the cluster lab: what the controller in a real cluster makes of Services and pods.

A slice holds at most 100 endpoints of one family and one set of ports. Endpoints stay in the slice where they are, and
a slice that does not change is not written, so that a change of one pod is a change of one slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, NamedTuple, Protocol

MAX_ENDPOINTS = 100

Object = dict[str, Any]


class PodState(Protocol):
    """What the controller reads of a pod."""

    name: str
    labels: dict[str, str]
    ipv4: str
    ipv6: str
    node_name: str
    zone: str
    port_names: dict[str, int]
    ready: bool
    terminating: bool
    changed_at: float  # seconds since the epoch


class Api(Protocol):
    """What the controller needs of the API server."""

    def put(self, new: Object) -> Object:
        """Create or replace an object."""

    def delete(self, kind: str, name: str, namespace: str = "default") -> Object:
        """Remove an object."""

    def objects(self, kind: str) -> list[Object]:
        """All objects of a kind."""


class _Group(NamedTuple):
    """What all endpoints of a slice share."""

    family: str
    ports: tuple[tuple[str, str, int], ...]  # (name, protocol, number)


class EndpointSliceController:
    """Keeps the slices of every Service with a selector; `sync` brings them up to date and returns when they are."""

    def __init__(self, api: Api, pods: Iterable[PodState]) -> None:
        self._api, self._pods = api, pods
        self._slices: dict[tuple[str, str], list[Object]] = {}  # (namespace, Service) → its slices as written
        self._numbers = count(1)

    def sync(self) -> None:
        """Write the slices that differ, remove those that nothing needs."""
        services = {
            (service["metadata"].get("namespace", "default"), service["metadata"]["name"]): service
            for service in self._api.objects("Service")
            if service["spec"].get("selector")
        }
        for key in self._slices.keys() - services.keys():
            self._write(key, [])
        for key, service in services.items():
            self._write(key, self._plan(service, self._slices.get(key, [])))

    def _write(self, key: tuple[str, str], wanted: list[Object]) -> None:
        known = {old["metadata"]["name"]: old for old in self._slices.get(key, [])}
        self._name(key[1], wanted, known)
        for new in wanted:
            if known.pop(new["metadata"]["name"], None) != new:
                self._api.put(new)
        for name in known:
            self._api.delete("EndpointSlice", name, key[0])
        self._slices[key] = wanted
        if not wanted:
            del self._slices[key]

    def _name(self, service: str, wanted: list[Object], known: dict[str, Object]) -> None:
        """Name the new slices; a slice that would go is used again for them, so that nothing is gone in between."""
        kept = {new["metadata"]["name"] for new in wanted}
        free = [(old["addressType"], name) for name, old in known.items() if name not in kept]
        for new in wanted:
            if not new["metadata"]["name"]:
                again = next((place for place in free if place[0] == new["addressType"]), None)
                if again:
                    free.remove(again)
                new["metadata"]["name"] = again[1] if again else f"{service}-{next(self._numbers):05d}"

    def _plan(self, service: Object, present: list[Object]) -> list[Object]:
        groups: dict[_Group, dict[str, tuple[PodState, Object]]] = {}
        families = service["spec"].get("ipFamilies") or ["IPv4"]
        for family in families:
            for pod in self._pods:
                address = pod.ipv4 if family == "IPv4" else pod.ipv6
                if address and service["spec"]["selector"].items() <= pod.labels.items():
                    group = _Group(family, tuple(_ports(service, pod)))
                    groups.setdefault(group, {})[address] = (pod, _endpoint(service, pod, address))
        planned = []
        for group, endpoints in groups.items():
            for name, addresses in _places(group, list(endpoints), present):
                planned.append(_slice(service, group, name, [endpoints[address] for address in addresses]))
        if not planned:  # a Service that nothing matches has a slice too, an empty one
            planned = [_slice(service, _Group(family, ()), "", []) for family in families]
        return planned


def _places(group: _Group, addresses: Sequence[str], present: list[Object]) -> list[tuple[str, list[str]]]:
    """Which address is in which slice; a slice that is to be made has no name yet."""
    places: list[tuple[str, list[str]]] = []
    placed = set()
    for old in present:
        if _group_of(old) == group:
            kept = [e["addresses"][0] for e in old["endpoints"] if e["addresses"][0] in addresses]
            placed.update(kept)
            places.append((old["metadata"]["name"], kept))
    for address in addresses:
        if address in placed:
            continue
        room = next((kept for _, kept in places if len(kept) < MAX_ENDPOINTS), None)
        if room is None:
            room = []
            places.append(("", room))
        room.append(address)
    return [(name, kept) for name, kept in places if kept]


def _ports(service: Object, pod: PodState) -> Iterable[tuple[str, str, int]]:
    for port in service["spec"].get("ports", []):
        target = port.get("targetPort", port["port"])
        number = pod.port_names.get(target) if isinstance(target, str) else target
        if number is not None:
            yield port.get("name", ""), port.get("protocol", "TCP"), number


def _endpoint(service: Object, pod: PodState, address: str) -> Object:
    unready_too = service["spec"].get("publishNotReadyAddresses", False)
    endpoint: Object = {
        "addresses": [address],
        "conditions": {
            "ready": unready_too or (pod.ready and not pod.terminating),
            "serving": pod.ready,
            "terminating": pod.terminating,
        },
        "nodeName": pod.node_name,
        "zone": pod.zone,
        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod.name},
    }
    match service["spec"].get("trafficDistribution"):
        case "PreferSameNode":
            endpoint["hints"] = {"forZones": [{"name": pod.zone}], "forNodes": [{"name": pod.node_name}]}
        case "PreferSameZone" | "PreferClose":
            endpoint["hints"] = {"forZones": [{"name": pod.zone}]}
    return endpoint


def _slice(service: Object, group: _Group, name: str, endpoints: list[tuple[PodState, Object]]) -> Object:
    metadata = service["metadata"]
    labels = {
        "kubernetes.io/service-name": metadata["name"],
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    if service["spec"].get("clusterIP") == "None":
        labels["service.kubernetes.io/headless"] = ""
    annotations = {}
    if endpoints:
        changed = datetime.fromtimestamp(max(pod.changed_at for pod, _ in endpoints), UTC)
        annotations["endpoints.kubernetes.io/last-change-trigger-time"] = f"{changed:%Y-%m-%dT%H:%M:%S.%fZ}"
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": name,
            "namespace": metadata.get("namespace", "default"),
            "labels": labels,
            "annotations": annotations,
        },
        "addressType": group.family,
        "endpoints": [endpoint for _, endpoint in endpoints],
        "ports": [{"name": name, "protocol": protocol, "port": number} for name, protocol, number in group.ports],
    }


def _group_of(written: Object) -> _Group:
    ports = tuple((port["name"], port["protocol"], port["port"]) for port in written["ports"])
    return _Group(written["addressType"], ports)
