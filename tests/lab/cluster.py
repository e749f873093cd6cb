"""A small Kubernetes cluster in network namespaces: nodes, pods, an outside client, an API server, a kproxy a node.

                     fabric (router and API server, 172.30.0.254)
          ┌───────────────┬───────────────┬──────────────────────┐
     node-1 172.30.0.11  node-2 .12      node-3 .13        client 203.0.113.10
       │ 10.244.1.0/24     10.244.2.0/24   10.244.3.0/24
      pods, each with a veth of its own and routes as a CNI plugin would set them

Every host has IPv6 beside IPv4. Namespaces have no names; they are held by threads of this process and go with it, even
if it is killed. There is no way out of them, and the machine's own namespace is never touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_real import RealApiServer
from tests.lab.endpoints import EndpointSliceController
from tests.lab.host import Host
from tests.lab.pod_server import PodServer
from tests.lab.proxy_process import HEALTHZ_PORT, METRICS_PORT, ProxyProcess, kproxy_command, kproxy_environment
from tests.lab.waiting import eventually

CLUSTER_CIDR = "10.244.0.0/16,fd00:244::/32"
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:96::/112")
API_ADDRESS = "172.30.0.254"

_ROUTER_SYSCTLS = {
    "net/ipv4/ip_forward": 1,
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/icmp_ratelimit": 0,  # a refusal is an ICMP error, and tests ask more than once a second
    "net/ipv6/icmp/ratelimit": 0,
}

_DIRECTORY = "kproxy-lab-"  # of logs; then come the process id and something random

Object = dict[str, Any]
HostType = TypeVar("HostType", bound=Host)


class Pod(Host):
    """A pod: what the EndpointSlice controller knows of it, and its server."""

    def __init__(self, name: str, node: Node, labels: dict[str, str], index: int) -> None:
        super().__init__(name, f"10.244.{node.number}.{index + 1}", f"fd00:244:{node.number:x}::{index + 1:x}")
        self.node, self.labels = node, labels
        self.node_name, self.zone = node.name, node.zone
        self.port_names: dict[str, int] = {}
        self.ready, self.terminating = True, False
        self.changed_at = time.time()
        self._device = f"pod{index}"
        self._server: PodServer | None = None
        gateway4, gateway6 = f"10.244.{node.number}.1", "fe80::1"
        node.configure(
            f"link add {self._device} type veth peer name eth0 netns {self.namespace.path}",
            f"addr add {gateway4}/32 dev {self._device}",
            f"addr add {gateway6}/64 dev {self._device} nodad",
            f"link set {self._device} up",
            f"route add {self.ipv4}/32 dev {self._device}",
            f"route add {self.ipv6}/128 dev {self._device}",
        )
        self.configure(
            f"addr add {self.ipv4}/32 dev eth0",
            f"addr add {self.ipv6}/128 dev eth0 nodad",
            "link set eth0 up",
            f"route add {gateway4}/32 dev eth0",
            f"route add default via {gateway4} dev eth0",
            f"route add default via {gateway6} dev eth0",
        )

    def serve(self, says: str, tcp: Sequence[int], udp: Sequence[int]) -> None:
        """Start the pod's server."""
        self._server = PodServer(
            self.name,
            says,
            [self._listener(port, socket.SOCK_STREAM) for port in tcp],
            [self._listener(port, socket.SOCK_DGRAM) for port in udp],
        )

    def stop(self) -> None:
        """End the server. The address stays up, so that clients are refused and not left waiting: conntrack keeps an
        unanswered SYN for two minutes, and sends a client that takes the same source port again to the same dead pod.
        """
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """End the server and leave the namespace."""
        self.stop()
        super().close()

    def _listener(self, port: int, kind: socket.SocketKind) -> socket.socket:
        listener = self.socket("::", kind)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", port))
        if kind is socket.SOCK_STREAM:
            listener.listen(256)
        return listener


class Node(Host):
    """A node: routes to the pods of all nodes, and its kproxy."""

    def __init__(self, number: int) -> None:
        super().__init__(f"node-{number}", f"172.30.0.{10 + number}", f"fd00:30::{10 + number}")
        self.number, self.zone = number, f"zone-{number}"
        self.proxy: ProxyProcess | None = None
        self.pod_numbers = count(1)
        self.sysctls(_ROUTER_SYSCTLS)

    def object(self) -> Object:
        """The Node object."""
        return {
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": {"name": self.name, "labels": {"topology.kubernetes.io/zone": self.zone}},
            "spec": {
                "podCIDR": f"10.244.{self.number}.0/24",
                "podCIDRs": [f"10.244.{self.number}.0/24", f"fd00:244:{self.number:x}::/64"],
            },
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": self.ipv4},
                    {"type": "InternalIP", "address": self.ipv6},
                    {"type": "Hostname", "address": self.name},
                ]
            },
        }


class Cluster:
    """The cluster; a context manager. With KUBEBUILDER_ASSETS set, its API server is the real one from there."""

    def __init__(self, nodes: int = 3, *, mode: str = "nftables") -> None:
        self._mode = mode
        self._closing = ExitStack()
        _remove_leftovers()
        directory = tempfile.TemporaryDirectory(prefix=f"{_DIRECTORY}{os.getpid()}-")
        self._directory = Path(self._closing.enter_context(directory))
        self.pods: list[Pod] = []
        self._ended: list[Pod] = []
        try:
            self.fabric = self._host(Host("fabric", API_ADDRESS, "fd00:30::fe"))
            self.client = self._host(Host("client", "203.0.113.10", "2001:db8:113::10"))
            self.nodes = [self._host(Node(number)) for number in range(1, nodes + 1)]
            self._connect()
            self.api = self._closing.enter_context(self._api_server())
            cidrs = {"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": [*SERVICE_CIDRS]}}
            self.api.put(cidrs)
            for node in self.nodes:
                self.api.put(node.object())
            self._controller = EndpointSliceController(self.api, self.pods)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and leave every namespace."""
        self._close_pods()
        self._closing.close()

    # Pods

    def run_pod(
        self,
        name: str,
        node: Node,
        labels: dict[str, str] | None = None,
        *,
        says: str = "",
        tcp: Sequence[int] = (80,),
        udp: Sequence[int] = (),
        port_names: dict[str, int] | None = None,
        ready: bool = True,
    ) -> Pod:
        """Start a pod; its endpoints are written when this returns. No labels: a client only."""
        pod = Pod(name, node, labels or {}, next(node.pod_numbers))
        self.pods.append(pod)
        pod.serve(says or f"This is {name}.", tcp, udp)
        for port in tcp[:1]:  # a readiness probe: a link that has just come up may lose its first packets
            for address in (pod.ipv4, pod.ipv6):
                eventually(partial(_answers, node, address, port), f"pod {name} answers its node at {address}")
        pod.ready, pod.port_names = ready, port_names or {}
        self._controller.sync()
        return pod

    def set_ready(self, pod: Pod, ready: bool) -> None:
        """Let the pod's readiness probe succeed or fail; its server answers either way."""
        pod.ready, pod.changed_at = ready, time.time()
        self._controller.sync()

    def terminate(self, pod: Pod) -> None:
        """Begin the end of a pod: it is told to stop but still serves."""
        pod.terminating, pod.changed_at = True, time.time()
        self._controller.sync()

    def remove_pod(self, pod: Pod) -> None:
        """End a pod at once."""
        self.pods.remove(pod)
        self._ended.append(pod)
        pod.stop()
        self._controller.sync()

    # Objects

    def apply(self, *objects: Object) -> None:
        """Create or replace objects; the endpoints of Services are written when this returns."""
        for new in objects:
            self.api.put(new)
        self._controller.sync()

    def delete_service(self, name: str) -> None:
        """Remove a Service and its endpoints."""
        self.api.delete("Service", name)
        self._controller.sync()

    def clear(self) -> None:
        """Remove all Services and pods; nodes, their proxies and the API server stay."""
        for service in self.api.objects("Service"):
            if service["metadata"]["name"] != "kubernetes":  # a real API server's own
                self.api.delete("Service", service["metadata"]["name"])
        self._close_pods()
        self._controller.sync()

    def _close_pods(self) -> None:
        for pods in self.pods, self._ended:
            while pods:
                pods.pop().close()

    # The network

    def route_from_outside(self, address: str, node: Node) -> None:
        """Bring packets for an address that a load balancer announces to a node."""
        via = node.ipv6 if ":" in address else node.ipv4
        self.fabric.exec("ip", "route", "replace", address, "via", via)

    # Proxies

    def proxy_flags(self, node: Node) -> list[str]:
        """The flags with which kproxy runs on a node."""
        return [
            *self.api.client_flags(),
            f"--hostname-override={node.name}",
            f"--cluster-cidr={CLUSTER_CIDR}",
            f"--proxy-mode={self._mode}",
            f"--nodeport-addresses={node.ipv4}/32,{node.ipv6}/128",
            f"--healthz-bind-address=0.0.0.0:{HEALTHZ_PORT}",
            f"--metrics-bind-address=127.0.0.1:{METRICS_PORT}",
            "--conntrack-max-per-core=0",  # the kernel lets no other namespace than its first write that limit
        ]

    def start_proxies(self) -> None:
        """Start kproxy on every node and wait until all have synced."""
        for node in self.nodes:
            node.proxy = ProxyProcess(node, self.proxy_flags(node), self._directory / f"{node.name}.log")
            self._closing.callback(node.proxy.stop)
            node.proxy.start()
        for node in self.nodes:
            node.proxy.wait_until_synced()  # type: ignore[union-attr]

    def kproxy(self, node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run kproxy on a node to its end, with the flags of the node's proxy before the arguments."""
        command = kproxy_command([*self.proxy_flags(node), *arguments])
        return node.namespace.command(*command, env=kproxy_environment(), check=False)

    def _host(self, host: HostType) -> HostType:
        self._closing.callback(host.close)
        return host

    def _api_server(self) -> ApiServer | RealApiServer:
        if assets := os.environ.get("KUBEBUILDER_ASSETS"):
            return RealApiServer(Path(assets), self.fabric, self._directory, SERVICE_CIDRS)
        return ApiServer(API_ADDRESS, 6443, listen=self._listen)

    def _listen(self, address: str, port: int) -> socket.socket:
        return self.fabric.namespace.run(socket.create_server, (address, port))

    def _connect(self) -> None:
        """Plug nodes and client into the fabric, and set the routes between them."""
        fabric = self.fabric
        fabric.sysctls(_ROUTER_SYSCTLS)
        fabric.configure(
            "link add nodes type bridge",
            f"addr add {fabric.ipv4}/24 dev nodes",
            f"addr add {fabric.ipv6}/64 dev nodes nodad",
            "link set nodes up",
            f"link add client type veth peer name eth0 netns {self.client.namespace.path}",
            "addr add 203.0.113.1/24 dev client",
            "addr add 2001:db8:113::1/64 dev client nodad",
            "link set client up",
            *(f"link add {n} type veth peer name eth0 netns {n.namespace.path}" for n in self.nodes),
            *(f"link set {n} master nodes up" for n in self.nodes),
        )
        self.client.configure(
            f"addr add {self.client.ipv4}/24 dev eth0",
            f"addr add {self.client.ipv6}/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 203.0.113.1",
            "route add default via 2001:db8:113::1",
        )
        for node in self.nodes:
            others = [other for other in self.nodes if other is not node]
            node.configure(
                f"addr add {node.ipv4}/24 dev eth0",
                f"addr add {node.ipv6}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via {fabric.ipv4}",
                f"route add default via {fabric.ipv6}",
                *(f"route add 10.244.{other.number}.0/24 via {other.ipv4}" for other in others),
                *(f"route add fd00:244:{other.number:x}::/64 via {other.ipv6}" for other in others),
            )


def _remove_leftovers() -> None:
    """Logs of runs that were killed are all that can be left of them."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*-*"):
        if not Path("/proc", directory.name.split("-")[2]).exists():
            shutil.rmtree(directory, ignore_errors=True)


def _answers(node: Node, address: str, port: int) -> bool:
    with node.connect(address, port, timeout=0.2):
        return True
