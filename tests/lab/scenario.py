"""Scenario files: what is given, what is changed, what must become of packets then (see tests/scenarios/README.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kproxy.model import Family, Protocol
from tests.lab.expectations import Action, Endpoint, Expectation
from tests.lab.flows import Flow, Origin

NODE_NAME = "here"
SOURCES = {"pod": "10.0.0.2", "client": "203.0.113.9", "node": "192.168.0.2"}
ORIGINS = {"pod": Origin.POD, "client": Origin.OUTSIDE, "node": Origin.NODE}
CONDITIONS = {
    "unready": {"ready": False, "serving": False},
    "terminating": {"ready": False, "serving": True, "terminating": True},
    "gone": {"ready": False, "serving": False, "terminating": True},
}
_IPV4 = re.compile(r"(?<![\d.])(\d+\.\d+\.\d+\.\d+)(/\d+)?(:\d+)?")
_TARGET = re.compile(r"\[?(?P<address>[0-9a-fA-F:.]+?)\]?:(?P<port>\d+)(/(?P<protocol>TCP|UDP|SCTP))?")
_SPEC_OUTSIDE = ("labels", "annotations", "namespace", "created", "ingress")


class Affinity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every client stays with one endpoint; who got which is kept under a name or compared with what was kept."""

    remember: str = ""
    same_as: str = ""
    differs_from: str = ""


class FlowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"origin": "from"}):
    """One line of a `then`."""

    expect: str | list[str] | dict[str, str | list[str]]
    origin: str = ""
    to: str = ""
    source: str | dict[str, str] = ""
    affinity: Affinity | None = None
    clients: int = 1
    keep: str = ""
    again: str = ""


class Objects(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is there. In a step: what changes; null stands for "deleted"."""

    config: dict[str, Any] = {}
    node: dict[str, Any] = {}
    services: dict[str, dict[str, Any] | None] = {}
    slices: dict[str, dict[str, Any] | None] = {}
    service_cidrs: list[str] | None = None

    def over(self, base: Objects) -> Objects:
        """These over others: named objects replace those of the same name."""
        return Objects(
            config=base.config | self.config,
            node=base.node | self.node,
            services=_without_none(base.services | self.services),
            slices=_without_none(base.slices | self.slices),
            service_cidrs=base.service_cidrs if self.service_cidrs is None else self.service_cidrs,
        )

    def undone(self, before: Objects) -> Objects:
        """What takes these changes back, given what was there before."""
        return Objects(
            services={name: before.services.get(name) for name in self.services},
            slices={name: before.slices.get(name) for name in self.slices},
        )


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change and what must be true after the sync that follows it."""

    when: str
    changes: Objects = Objects()
    wait: float = 0.0
    restart: bool = False
    during: list[FlowSpec] = []
    then: list[FlowSpec] = []


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One story."""

    name: str
    given: Objects = Objects()
    then: list[FlowSpec] = []
    steps: list[Step] = []
    families: tuple[str, ...] = ("IPv4", "IPv6")
    modes: tuple[str, ...] = ("nftables", "iptables", "ipvs")


class ScenarioFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scenarios of one subject."""

    about: str
    scenarios: list[Scenario]
    given: Objects = Objects()


USUAL = Objects(
    config={"clusterCIDR": "10.0.0.0/8"},
    node={"addresses": ["192.168.0.2", "192.168.1.2"], "labels": {}},
    service_cidrs=["172.30.0.0/16"],
)


def read(path: Path, family: Family) -> list[Scenario]:
    """The scenarios of a file in one family, complete. Raises ValueError that names file and field."""
    try:
        loaded = msgspec.convert(yaml.safe_load(path.read_text()), ScenarioFile)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {error}") from error
    complete = [
        msgspec.structs.replace(s, given=s.given.over(loaded.given).over(USUAL))
        for s in loaded.scenarios
        if family.name in s.families
    ]
    if family is Family.IPv4:
        return complete
    return msgspec.convert(_twin(msgspec.to_builtins(complete)), list[Scenario])


def items(objects: Objects, family: Family) -> Iterator[dict[str, Any]]:
    """The objects as the API has them; deleted ones have no spec."""
    for name, service in objects.services.items():
        yield _service(name, service)
    for name, piece in objects.slices.items():
        yield _slice(name, piece, family)


def surroundings(objects: Objects) -> Iterator[dict[str, Any]]:
    """The Node, and the ServiceCIDR if there is one."""
    node = objects.node
    yield {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE_NAME, "labels": node.get("labels", {})},
        "spec": {"podCIDRs": node.get("podCIDRs", [])},
        "status": {"addresses": [{"type": "InternalIP", "address": a} for a in node["addresses"]]},
    }
    if objects.service_cidrs:
        yield {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": objects.service_cidrs},
        }


def flows(spec: FlowSpec, family: Family) -> list[Flow]:
    """The flows of a line: one for each client."""
    origin, _, address = spec.origin.partition(" ")
    target = _TARGET.fullmatch(spec.to)
    if origin not in ORIGINS or target is None:
        raise ValueError(
            f"from {spec.origin!r} to {spec.to!r}: expected pod, client or node, and address:port[/protocol]"
        )
    start = ip_network(address or (SOURCES[origin] if family is Family.IPv4 else _twin(SOURCES[origin])))[0]
    return [
        Flow(
            ORIGINS[origin],
            str(start + number),
            target["address"],
            int(target["port"]),
            Protocol(target["protocol"] or "TCP"),
        )
        for number in range(spec.clients)
    ]


def expectation(spec: FlowSpec, mode: str) -> Expectation:
    """What a line expects in a mode."""
    expect = _of_mode(spec.expect, mode)
    if isinstance(expect, str):
        return Expectation(Action(expect))
    source = _of_mode(spec.source, mode)
    masquerade = {"": None, "node": True, "kept": False}[source]
    return Expectation(Action.DNAT, frozenset(map(_endpoint, expect)), masquerade, in_turn=mode == "ipvs")


def _of_mode(value: Any, mode: str) -> Any:
    if isinstance(value, dict):
        return value[mode] if mode in value else value["others"]
    return value


def _endpoint(text: str) -> Endpoint:
    target = _TARGET.fullmatch(text)
    if target is None:
        raise ValueError(f"{text!r} is not address:port")
    return target["address"], int(target["port"])


def _service(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    shown = given or {}
    metadata = {"name": name, "namespace": shown.get("namespace", "default")}
    metadata |= {key: shown[key] for key in ("labels", "annotations") if key in shown}
    if "created" in shown:
        metadata["creationTimestamp"] = shown["created"]
    spec = {key: value for key, value in shown.items() if key not in _SPEC_OUTSIDE}
    service: dict[str, Any] = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    if "ingress" in shown:
        ingress = [{"ip": i} if isinstance(i, str) else i for i in shown["ingress"]]
        service["status"] = {"loadBalancer": {"ingress": ingress}}
    return service


def _slice(name: str, given: Mapping[str, Any] | None, family: Family) -> dict[str, Any]:
    shown = given or {}
    labels = {"kubernetes.io/service-name": shown["service"]} if "service" in shown else {}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": shown.get("namespace", "default"),
            "labels": labels | shown.get("labels", {}),
        },
        "addressType": shown.get("addressType", family.name),
        "ports": [{"protocol": "TCP", **port} for port in shown.get("ports", [])],
        "endpoints": [_slice_endpoint(e) for e in shown.get("endpoints", [])],
    }


def _slice_endpoint(given: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    address, *words = given.split()
    endpoint: dict[str, Any] = {"addresses": [address], "nodeName": "elsewhere"}
    for word in words:
        if word == NODE_NAME:
            endpoint["nodeName"] = NODE_NAME
        else:
            endpoint["conditions"] = CONDITIONS[word]
    return endpoint


def _without_none(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}


def _twin(value: Any) -> Any:
    """The same with every IPv4 address replaced by its IPv6 twin, fd00:: and the IPv4 address's 32 bits."""
    match value:
        case str():
            return _IPV4.sub(_twin_address, value)
        case list():
            return [_twin(member) for member in value]
        case dict():
            return {key: _twin(member) for key, member in value.items()}
        case _:
            return value


def _twin_address(found: re.Match[str]) -> str:
    address, length, port = found.groups()
    if address == "0.0.0.0":
        return f"::{length or ''}"
    if address.startswith("127."):
        return f"[::1]{port}" if port else f"::1{'/128' if length else ''}"
    twin = str(IPv6Address(f"fd00::{address}"))
    if port:
        return f"[{twin}]{port}"
    return f"{twin}/{int(length[1:]) + 96}" if length else twin
