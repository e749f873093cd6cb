"""A recorded scenario of packet flows, the laboratory it takes, and what is wrong when it is replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import DetectLocalMode, Family, Protocol
from kproxy.node_addresses import is_loopback
from tests.lab.expectations import Action, Expectation, complaints
from tests.lab.flows import Flow, Origin
from tests.lab.packets import Lab
from tests.lab.proxy import InProcess, Item, Proxy

ORIGINS = {
    "pod": Origin.POD,
    "external": Origin.OUTSIDE,
    "node": Origin.NODE,
    "loopback": Origin.NODE,
}


class World:
    """What is in force at some step of a scenario: configuration and objects."""

    def __init__(self, config: Mapping[str, Any], variant: Variant | None = None) -> None:
        self.config = dict(config)
        self.variant = variant
        self._objects: dict[tuple[str, str, str], Item] = {}

    def advance(self, step: Mapping[str, Any]) -> None:
        """Take a step's changes in."""
        self.config |= step.get("config_change", {})
        for item in step["delete"]:
            del self._objects[_identity(item)]
        for item in step["apply"]:
            self._objects[_identity(item)] = item

    @property
    def family(self) -> Family:
        """The one family of the recorded proxier."""
        return Family[self.config["ip_family"]]

    @property
    def objects(self) -> list[Item]:
        """Everything in force, the node and its service CIDRs included."""
        return [*self.surroundings(), *self._objects.values()]

    @property
    def sticky(self) -> bool:
        """Whether a first connection can decide where the next one goes."""
        return any(item.get("spec", {}).get("sessionAffinity") == "ClientIP" for item in self._objects.values())

    def slices(self) -> list[Item]:
        """The EndpointSlices in force."""
        return [item for item in self._objects.values() if item["kind"] == "EndpointSlice"]

    def services(self) -> list[Item]:
        """The Services in force."""
        return [item for item in self._objects.values() if item["kind"] == "Service"]

    def surroundings(self) -> Iterator[Item]:
        """Objects that the recording has as configuration."""
        metadata = {"name": self.config["node_name"], "labels": self.config["node_labels"]}
        addresses = [{"type": "InternalIP", "address": self.config["node_ip"]}]
        yield {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": {"addresses": addresses}}
        yield {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": self.config.get("service_cidrs") or []},
        }

    def configuration(self) -> dict[str, Any]:
        """The recorded configuration as a KubeProxyConfiguration."""
        config, mode = self.config, self.config["proxy_mode"]
        detect = config["detect_local"]
        chosen: dict[str, Any] = {
            "mode": mode,
            "hostnameOverride": config["node_name"],
            "nodePortAddresses": config["node_port_addresses"] or ["0.0.0.0/0", "::/0"],
        }
        part: dict[str, Any] = {"masqueradeAll": config["masquerade_all"]}
        if config["masquerade_bit"] is not None:
            part["masqueradeBit"] = config["masquerade_bit"]
        if "localhost_node_ports" in config:
            part["localhostNodePorts"] = config["localhost_node_ports"]
        chosen["nftables" if mode == "nftables" else "iptables"] = part
        if config.get("conntrack_tcp_be_liberal"):
            chosen["conntrack"] = {"tcpBeLiberal": True}
        match detect["mode"]:
            case DetectLocalMode.CLUSTER_CIDR:
                chosen["clusterCIDR"] = detect["cidr"]
            case DetectLocalMode.BRIDGE_INTERFACE:
                chosen["detectLocal"] = {"bridgeInterface": detect["bridge_interface"]}
            case DetectLocalMode.INTERFACE_NAME_PREFIX:
                chosen["detectLocal"] = {"interfaceNamePrefix": detect["interface_prefix"]}
        if detect["mode"] != "None":
            chosen["detectLocalMode"] = detect["mode"]
        return chosen

    def addresses(self) -> list[str]:
        """The node's own addresses, without loopback."""
        interfaces = self.config["interfaces"].values()
        own = {address.partition("/")[0] for addresses in interfaces for address in addresses}
        own |= set(self.config.get("local_ips") or [])
        return sorted(address for address in own if not is_loopback(address))

    def lab_arguments(self) -> dict[str, Any]:
        """The node that the recording describes."""
        detect = self.config["detect_local"]
        return {
            "addresses": self.addresses(),
            "outside": next((name for name in self.config["interfaces"] if name != "lo"), "eth0"),
            "pods": detect.get("bridge_interface") or detect.get("interface_prefix") or "pods",
        }

    def expected(self, recorded: Mapping[str, Any]) -> tuple[Flow, Expectation]:
        """A recorded flow, and what must become of it."""
        flow = Flow(
            ORIGINS[recorded["source_kind"]],
            recorded["source_ip"],
            recorded["dest_ip"],
            recorded["dest_port"],
            Protocol(recorded["protocol"]),
        )
        expect = recorded["expect"]
        # Packets alone cannot tell "accept" from "pass".
        action = Action.PASS if expect["action"] == "accept" else Action(expect["action"])
        if action is not Action.DNAT:
            return flow, Expectation(action)
        endpoints = frozenset((d["ip"], d["port"]) for d in expect["destinations"])
        return flow, Expectation(action, endpoints, expect["masquerade"])

    def forget_clients(self, _: Lab, proxy: Proxy) -> None:
        """An endpoint that leaves loses its clients; so nobody is remembered when all have left and come back."""
        proxy.delete(*self.slices())
        proxy.sync()
        proxy.apply(*self.slices())
        proxy.sync()


def through_all_steps(lab: Lab, world: World, steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong after the first step that goes wrong with one proxy; empty if nothing."""
    proxy = start_proxy(lab, world)
    try:
        proxy.apply(*world.surroundings())
        for step in steps:
            world.advance(step)
            if "config_change" in step:  # as a user does it: with a restart
                proxy.close()
                proxy = start_proxy(lab, world)
                proxy.apply(*world.objects)
            else:
                proxy.delete(*step["delete"])
                proxy.apply(*step["apply"])
            if found := step_complaints(lab, proxy, world, step):
                return found
        return []
    finally:
        proxy.close()


def start_proxy(lab: Lab, world: World) -> Proxy:
    """A proxy as the recording has it configured, which knows no object yet."""
    return InProcess(lab.netns, world.configuration(), [world.family], world.variant)


def step_complaints(lab: Lab, proxy: Proxy, world: World, step: Mapping[str, Any]) -> list[str]:
    """What is wrong with a step's flows once the proxy has synced; empty if nothing."""
    for address in world.addresses():
        if address not in lab.node.addresses:
            lab.node.add_address(address)
    proxy.sync()
    lab.flush_conntrack()
    return [complaint for recorded in step["flows"] for complaint in _flow_complaints(lab, proxy, world, recorded)]


def _flow_complaints(lab: Lab, proxy: Proxy, world: World, recorded: Mapping[str, Any]) -> list[str]:
    flow, expected = world.expected(recorded)

    def forget_clients() -> None:
        world.forget_clients(lab, proxy)

    found = complaints(lab, flow, expected, before_each_try=forget_clients if world.sticky else None)
    return [f"{recorded['name']}: {complaint}" for complaint in found]


def _identity(item: Item) -> tuple[str, str, str]:
    return item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]
