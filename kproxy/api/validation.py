"""What an API server would refuse of an object, for manifests that no API server has seen.

Only what matters to a proxy is looked at. CIDRs are left to their consumers, which log and skip what they cannot read,
as kube-proxy does. Addresses may have leading zeros (reference: section 1.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from kproxy.api.decode import explain
from kproxy.api.objects import EndpointSlice, Node, Object, Service, ServiceCIDR, ServicePortSpec, ServiceSpec
from kproxy.model import Family, Protocol, canonical_address

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_FORM = "Expected at most 63 lower case letters, digits and '-'"
_SUBDOMAIN_FORM = "Expected at most 253 lower case letters, digits, '-' and '.'"
_PROTOCOLS = tuple(Protocol)


def form_errors(data: object, wanted: Any, path: str = "") -> Iterator[str]:
    """Every place where plain data does not have the form of a type, as `spec.ports[0].port: Expected int, got str`."""
    wanted = _without_none(wanted)
    if isinstance(wanted, type) and issubclass(wanted, msgspec.Struct) and isinstance(data, Mapping):
        for field in msgspec.structs.fields(wanted):
            inner = f"{path}.{field.encode_name}".lstrip(".")
            if field.encode_name in data:
                yield from form_errors(data[field.encode_name], field.type, inner)
            elif field.required:
                yield f"{inner}: Required"
    elif get_origin(wanted) is list and isinstance(data, list):
        [element] = get_args(wanted)
        for index, item in enumerate(data):
            yield from form_errors(item, element, f"{path}[{index}]")
    elif get_origin(wanted) is dict and isinstance(data, Mapping):
        _, element = get_args(wanted)
        for key, value in data.items():
            yield from form_errors(value, element, f"{path}[{key}]")
    else:
        try:
            msgspec.convert(data, wanted)
        except msgspec.ValidationError as error:
            yield explain(error, path)


def _without_none(wanted: Any) -> Any:
    if get_origin(wanted) in (Union, UnionType):
        return next(choice for choice in get_args(wanted) if choice is not NoneType)
    return wanted


def errors(item: Object) -> Iterator[str]:
    """What is wrong with an object of the right form, as `spec.ports[0].port: Expected int <= 65535`."""
    label = isinstance(item, Service)
    name = item.metadata.name
    if not name:
        yield "metadata.name: Required"
    elif not (_LABEL if label else _SUBDOMAIN).fullmatch(name):
        yield f"metadata.name: {_LABEL_FORM if label else _SUBDOMAIN_FORM}, got {name!r}"
    if item.metadata.namespace and not _LABEL.fullmatch(item.metadata.namespace):
        yield f"metadata.namespace: {_LABEL_FORM}, got {item.metadata.namespace!r}"
    match item:
        case Service():
            yield from _service_errors(item)
        case EndpointSlice():
            yield from _slice_errors(item)
        case Node() | ServiceCIDR():
            pass


def _service_errors(service: Service) -> Iterator[str]:
    spec = service.spec
    yield from _choice("spec.type", spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"))
    yield from _cluster_ip_errors(spec)
    yield from _service_port_errors(spec)
    for index, address in enumerate(spec.external_ips or ()):
        yield from _address(f"spec.externalIPs[{index}]", address)
    yield from _choice("spec.sessionAffinity", spec.session_affinity, ("None", "ClientIP"))
    config = spec.session_affinity_config
    if spec.session_affinity == "ClientIP" and config and config.client_ip:
        seconds = config.client_ip.timeout_seconds
        if seconds is not None:
            yield from _between("spec.sessionAffinityConfig.clientIP.timeoutSeconds", seconds, 1, 86400)
    yield from _choice("spec.externalTrafficPolicy", spec.external_traffic_policy, ("", "Cluster", "Local"))
    yield from _choice("spec.internalTrafficPolicy", spec.internal_traffic_policy, (None, "Cluster", "Local"))
    if spec.health_check_node_port:
        yield from _between("spec.healthCheckNodePort", spec.health_check_node_port, 1, 65535)
    for index, ingress in enumerate(service.status.load_balancer.ingress or ()):
        path = f"status.loadBalancer.ingress[{index}]"
        if ingress.ip:
            yield from _address(f"{path}.ip", ingress.ip)
        yield from _choice(f"{path}.ipMode", ingress.ip_mode, (None, "VIP", "Proxy"))


def _cluster_ip_errors(spec: ServiceSpec) -> Iterator[str]:
    if spec.type == "ExternalName":
        return
    if spec.cluster_ip not in ("", "None"):
        yield from _address("spec.clusterIP", spec.cluster_ip)
    for index, address in enumerate(spec.cluster_ips or ()):
        if address != "None":
            yield from _address(f"spec.clusterIPs[{index}]", address)
    if spec.cluster_ip and spec.cluster_ips and spec.cluster_ips[0] != spec.cluster_ip:
        yield f"spec.clusterIPs[0]: Expected {spec.cluster_ip!r}, which is spec.clusterIP, got {spec.cluster_ips[0]!r}"
    for index, family in enumerate(spec.ip_families or ()):
        yield from _choice(f"spec.ipFamilies[{index}]", family, tuple(Family.__members__))


def _service_port_errors(spec: ServiceSpec) -> Iterator[str]:
    ports = spec.ports or []
    if not ports and spec.type != "ExternalName" and spec.cluster_ip != "None":
        yield "spec.ports: Required"
    for index, port in enumerate(ports):
        path = f"spec.ports[{index}]"
        yield from _between(f"{path}.port", port.port, 1, 65535)
        if port.node_port:
            yield from _between(f"{path}.nodePort", port.node_port, 1, 65535)
        yield from _choice(f"{path}.protocol", port.protocol, _PROTOCOLS)
        if port.name and not _LABEL.fullmatch(port.name):
            yield f"{path}.name: {_LABEL_FORM}, got {port.name!r}"
        elif not port.name and len(ports) > 1:
            yield f"{path}.name: Required where there is more than one port"
    yield from _repeated(ports, "name", lambda port: port.name)
    yield from _repeated(ports, "port", lambda port: (port.protocol, port.port))
    yield from _repeated(ports, "nodePort", lambda port: (port.protocol, port.node_port) if port.node_port else None)


def _repeated(ports: list[ServicePortSpec], field: str, key: Callable[[ServicePortSpec], object]) -> Iterator[str]:
    first: dict[object, int] = {}
    for index, port in enumerate(ports):
        if (identity := key(port)) and (earlier := first.setdefault(identity, index)) != index:
            yield f"spec.ports[{index}].{field}: the same as spec.ports[{earlier}].{field}"


def _slice_errors(item: EndpointSlice) -> Iterator[str]:
    if not item.address_type:
        yield "addressType: Required"
    else:
        yield from _choice("addressType", item.address_type, ("IPv4", "IPv6", "FQDN"))
    for index, endpoint in enumerate(item.endpoints or ()):
        path = f"endpoints[{index}].addresses"
        if not endpoint.addresses:
            yield f"{path}: Required"
        if item.address_type in Family.__members__:
            for position, address in enumerate(endpoint.addresses):
                yield from _address(f"{path}[{position}]", address, Family[item.address_type])
    for index, port in enumerate(item.ports or ()):
        if port.port is not None:
            yield from _between(f"ports[{index}].port", port.port, 1, 65535)
        yield from _choice(f"ports[{index}].protocol", port.protocol, _PROTOCOLS)
        if port.name and not _LABEL.fullmatch(port.name):
            yield f"ports[{index}].name: {_LABEL_FORM}, got {port.name!r}"


def _between(path: str, value: int, low: int, high: int) -> Iterator[str]:
    if value < low:
        yield f"{path}: Expected int >= {low}"
    elif value > high:
        yield f"{path}: Expected int <= {high}"


def _choice(path: str, value: str | None, choices: Collection[str | None]) -> Iterator[str]:
    if value not in choices:
        named = [choice for choice in choices if choice]
        yield f"{path}: Expected {', '.join(named[:-1])} or {named[-1]}, got {value!r}"


def _address(path: str, text: str, family: Family | None = None) -> Iterator[str]:
    try:
        address = canonical_address(text)
    except ValueError:
        yield f"{path}: Expected an IP address, got {text!r}"
        return
    if family is not None and Family.of(address) is not family:
        yield f"{path}: Expected an {family.name} address, got {text!r}"
