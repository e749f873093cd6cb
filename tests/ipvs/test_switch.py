"""From iptables mode to ipvs mode and back, under traffic: no new connection fails, nothing is left of the old mode.

What stays of ipvs mode for its connections opens nothing else.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.ipvs import jumps as ipvs_mode
from tests.handover.connections import Traffic, Way
from tests.lab.cluster import Cluster, Node
from tests.lab.cluster_objects import port, service
from tests.lab.host import Host
from tests.lab.proxy_process import ProxyProcess
from tests.lab.waiting import eventually

pytestmark = pytest.mark.ipvs

WEB = "10.96.0.10", "fd00:96::10"
NODE_PORT = 30080
IDLE = "10.96.0.12"  # nobody is connected to it for long
CLOSED = 81  # a port of the first one without endpoints
KUBELET = 10250
WITHOUT_DETECTOR = "--cluster-cidr="  # iptables mode does not masquerade the node's connections to cluster IPs then
LASTING = 3
CONNECTIONS = 5
EVERY = 0.2  # seconds: the proxies shall get some of User-Mode Linux's one processor
SECONDS = 60.0  # for what takes some; User-Mode Linux is slow
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
GUARDS = re.compile("KUBE-IPVS-(OUT-)?FILTER")
COUNTERS = re.compile(r" \[\d+:\d+\]|^#.*\n", re.MULTILINE)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes, of which one is to have a proxy; a Service with pods on both, and an idle one."""
    with Cluster(2) as made:
        for number, node in enumerate(made.nodes):
            made.run_pod(f"web-{number}", node, {"app": "web"})
        made.apply(
            service(
                "web",
                *WEB,
                type="NodePort",
                ports=[
                    port(80, node_port=NODE_PORT, name="http"),
                    port(CLOSED, target="none", node_port=30081, name="closed"),
                ],
            ),
            service("empty", "10.96.0.11"),
            service("idle", IDLE, app="web"),
        )
        yield made


@pytest.fixture
def node(cluster: Cluster) -> Iterator[Node]:
    node = cluster.nodes[0]
    yield node
    if node.proxy:
        node.proxy.stop()
        print(node.proxy.log.read_text())


def start(cluster: Cluster, node: Node, mode: ProxyMode, folder: Path) -> None:
    """The proxy of the node ends, and one in another mode begins."""
    if node.proxy:
        node.proxy.stop()
    flags = [*cluster.proxy_flags(node), WITHOUT_DETECTOR, f"--proxy-mode={mode.value}"]
    node.proxy = ProxyProcess(node, flags, folder / "kproxy.log")
    node.proxy.start()
    node.proxy.wait_until_synced(seconds=SECONDS)


def rules(node: Node) -> str:
    return "".join(COUNTERS.sub("", node.exec(f"{program}-legacy-save")) for program in ("iptables", "ip6tables"))


def chains(node: Node) -> set[str]:
    """Those of proxies: that which guards loopback addresses stays, for it is kubelet's as well."""
    return set(re.findall(r"^:(KUBE-\S+)", rules(node), re.MULTILINE)) - {"KUBE-FIREWALL"}


def is_all_of_iptables_mode_gone(node: Node) -> bool:
    return chains(node) == {chain for _, chain in ipvs_mode.CHAINS}


@pytest.fixture
def listening(node: Node) -> Iterator[list[int]]:
    """Ports on which something listens, on all of the node's addresses."""
    with ExitStack() as closing:
        for number in (KUBELET, CLOSED):
            listener = node.namespace.run(
                socket.create_server, ("::", number), family=socket.AF_INET6, dualstack_ipv6=True
            )
            closing.enter_context(listener)
        yield [KUBELET, CLOSED]


def reached(client: Host, addresses: Iterable[str], ports: Iterable[int]) -> list[tuple[str, int]]:
    """Where the client gets a connection."""
    found = []
    for address, number in product(addresses, ports):
        try:
            client.connect(address, number, timeout=1).close()
        except OSError:
            continue
        found.append((address, number))
    return found


def test_iptables_to_ipvs_and_back(cluster: Cluster, node: Node, listening: list[int], tmp_path: Path) -> None:
    start(cluster, node, ProxyMode.IPTABLES, tmp_path)
    at_first = rules(node)
    ways = [Way(node, WEB[0], 80), Way(node, WEB[1], 80), Way(cluster.client, node.ipv4, NODE_PORT)]

    with Traffic(ways, LASTING, every=EVERY) as there:  # who is connected already stays so
        there.more(CONNECTIONS)
        start(cluster, node, ProxyMode.IPVS, tmp_path)
        eventually(lambda: is_all_of_iptables_mode_gone(node), "iptables mode is gone", seconds=SECONDS)
        there.more(CONNECTIONS)
    assert there.failures == []
    for stream in there.streams:
        assert stream.answers.keys() == {"web-0", "web-1"}
    assert node.exec("cat", f"/proc/sys/{ROUTE_LOCALNET}") == "0\n"
    dry_run = cluster.kproxy(node, WITHOUT_DETECTOR, "--proxy-mode=ipvs", "--dry-run")
    assert dry_run.returncode == 0, dry_run.stdout

    with Traffic(ways, LASTING, every=EVERY) as back:
        back.more(CONNECTIONS)
        node.proxy.stop()
        done = cluster.kproxy(node, WITHOUT_DETECTOR, "--proxy-mode=iptables", "--once")
        back.more(CONNECTIONS)
        # What is connected through IPVS still needs virtual servers, but nobody gets to them any more.
        assert not re.search("-w [1-9]", node.exec("ipvsadm", "-Sn"))
        assert "virtual servers of ipvs mode stay while they have connections" in done.stdout + done.stderr
        kept = [line for line in rules(node).splitlines() if not GUARDS.search(line)]
        assert sorted(kept) == sorted(at_first.splitlines())
        pod = cluster.pods[0]
        assert reached(pod, [node.ipv4], listening)
        assert reached(pod, [*WEB, IDLE], listening) == []
        back.more(CONNECTIONS)
    assert back.failures == []

    assert cluster.kproxy(node, "--cleanup").returncode == 0
    assert chains(node) == set()
    assert node.exec("ipvsadm", "-Sn") + node.exec("ipset", "list", "-n") == ""
    assert "kube-ipvs0" not in node.exec("ip", "link")
