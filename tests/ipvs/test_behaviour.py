"""A running kproxy in ipvs mode, as clients, pods and administrators meet it."""

from __future__ import annotations

import http.client
import signal
import socket
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest

from tests.lab.cluster import Cluster, Node, Pod
from tests.lab.cluster_objects import load_balancer, port, service
from tests.lab.proxy_process import ProxyProcess
from tests.lab.traffic import NoAnswer, answered, fails_as, try_once
from tests.lab.waiting import eventually

pytestmark = pytest.mark.ipvs

DRAIN_SECONDS = 10  # long enough for what a test does meanwhile, where the machine is busy
FLAGS = ("--ipvs-sync-period=2s", "--ipvs-min-sync-period=0s", f"--ipvs-drain-timeout={DRAIN_SECONDS}s")
LOAD_BALANCER_IP = "198.51.100.10"
SECONDS = 30.0  # until a change must be seen: User-Mode Linux is slow
STRANGER = "-A -t 203.0.113.77:99 -s wlc"

_numbers = count(10)


class Web(NamedTuple):
    """A Service with its pods."""

    name: str
    address: str
    node_port: int
    pods: list[Pod]

    @property
    def url(self) -> str:
        return f"http://{self.address}/"

    def pod(self, name: str) -> Pod:
        [found] = [pod for pod in self.pods if pod.name == name]
        return found


class Conversation:
    """A connection that stays open."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = http.client.HTTPConnection("pod")
        self._connection.sock = connection

    def speak(self) -> str:
        """Ask once more; which pod answers. Raises OSError and HTTPException."""
        self._connection.request("GET", "/")
        with self._connection.getresponse() as response:
            response.read()
            return str(response.headers["X-Pod"])

    def is_broken(self) -> bool:
        try:
            self.speak()
        except (OSError, http.client.HTTPException):
            return True
        return False

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(2, mode="ipvs") as cluster:
        node = cluster.nodes[0]
        log = tmp_path_factory.mktemp("ipvs") / "kproxy.log"
        node.proxy = ProxyProcess(node, [*cluster.proxy_flags(node), *FLAGS], log)
        node.proxy.start()
        try:
            node.proxy.wait_until_synced(seconds=60)
            yield cluster
        finally:
            node.proxy.stop()


@pytest.fixture
def cluster(whole: Cluster) -> Iterator[Cluster]:
    """A cluster of two nodes, on the first of which kproxy runs."""
    yield whole
    proxy = whole.nodes[0].proxy
    assert proxy
    print(proxy.log_end())  # pytest shows it where a test has failed
    whole.clear()


@pytest.fixture
def node(cluster: Cluster) -> Node:
    return cluster.nodes[0]


@pytest.fixture
def web(cluster: Cluster, node: Node) -> Web:
    """A Service of two pods that is in force."""
    number = next(_numbers)
    name = f"web-{number}"
    pods = [cluster.run_pod(f"{name}-{letter}", node, {"app": name}) for letter in "ab"]
    made = Web(name, f"10.96.0.{number}", 30000 + number, pods)
    ports = [port(80, node_port=made.node_port)]
    cluster.apply(service(name, made.address, type="NodePort", ports=ports))
    wait_for_servers(node, made, made.pods)
    return made


def weights(node: Node, virtual_server: str) -> dict[str, int]:
    """The weights of its real servers, by their addresses."""
    listed = [line.split() for line in node.exec("ipvsadm", "-Sn").splitlines()]
    return {
        words[4].partition(":")[0]: int(words[7]) for words in listed if words[0] == "-a" and words[2] == virtual_server
    }


def servers(node: Node, address: str) -> dict[str, int]:
    """The weights of the real servers of port 80 of an address."""
    listed = [line.split() for line in node.exec("ipvsadm", "-Sn").splitlines()]
    return {
        words[4].partition(":")[0]: int(words[7])
        for words in listed
        if words[0] == "-a" and words[2] == f"{address}:80"
    }


def wait_for_servers(node: Node, web: Web, pods: list[Pod]) -> None:
    wanted = {pod.ipv4: 1 for pod in pods}
    eventually(lambda: servers(node, web.address) == wanted, f"{web.name} has {len(pods)} servers", seconds=SECONDS)


def held(node: Node) -> str:
    """All that ipvs mode has in the kernel, but for the order of sets' members."""
    addresses = node.exec("ip", "-o", "address", "show", "dev", "kube-ipvs0", check=False)
    members = sorted(node.exec("ipset", "save").splitlines())
    rules = [node.exec(f"{program}-legacy-save", "-t", "nat") for program in ("iptables", "ip6tables")]
    shown = [line for text in rules for line in text.splitlines() if line.startswith("-A")]
    virtual = sorted(node.exec("ipvsadm", "-Sn").splitlines())
    return "\n".join([*virtual, *sorted(line.split()[3] for line in addresses.splitlines()), *members, *shown])


def test_requests_alternate_and_are_counted(cluster: Cluster, node: Node, web: Web) -> None:
    visitor = cluster.run_pod("visitor", node, tcp=())
    one, other = (pod.name for pod in web.pods)

    inside = [visitor.get(web.url).pod for _ in range(8)]
    outside = [cluster.client.get(f"http://{node.ipv4}:{web.node_port}/").pod for _ in range(6)]
    on_the_node = [node.get(web.url).pod for _ in range(4)]

    for answers in (inside, outside, on_the_node):
        assert answers in ([one, other] * (len(answers) // 2), [other, one] * (len(answers) // 2))
    assert visitor.get(web.url).client == visitor.ipv4

    def counted(what: str) -> float:
        """New connections of the Service's frontend or endpoint."""
        assert node.proxy
        samples = node.proxy.scrape().items()
        return sum(
            n
            for name, n in samples
            if "connections_total{" in name and f'service="{web.name}"' in name and what in name
        )

    first, second = (f'endpoint="{pod.ipv4}:80"' for pod in web.pods)
    # The kernel adds up every two seconds.
    eventually(lambda: counted(first) + counted(second) == 19, "19 connections are counted", seconds=SECONDS)
    assert abs(counted(first) - counted(second)) <= 2  # each virtual server has a turn of its own
    assert counted(f'frontend="{web.address}:80"') == 13


def test_connections_last_while_an_endpoint_drains_but_not_for_ever(cluster: Cluster, node: Node, web: Web) -> None:
    lasting = Conversation(cluster.client.connect(node.ipv4, web.node_port))
    leaving = web.pod(lasting.speak())
    [staying] = [pod for pod in web.pods if pod is not leaving]

    cluster.set_ready(leaving, False)
    eventually(lambda: servers(node, web.address) == {staying.ipv4: 1}, "the endpoint has left", seconds=SECONDS)

    assert lasting.speak() == leaving.name
    assert [cluster.client.get(f"http://{node.ipv4}:{web.node_port}/").pod for _ in range(3)] == [staying.name] * 3
    eventually(lambda: lasting.is_broken(), "the drain timeout ends the connection", seconds=SECONDS)
    lasting.close()


def test_an_endpoint_that_comes_back_gets_its_share_again(cluster: Cluster, node: Node, web: Web) -> None:
    assert node.proxy
    lasting = Conversation(cluster.client.connect(node.ipv4, web.node_port))
    leaving = web.pod(lasting.speak())
    both = {pod.ipv4: 1 for pod in web.pods}
    draining = {**both, leaving.ipv4: 0}
    where = f"{node.ipv4}:{web.node_port}"

    cluster.set_ready(leaving, False)
    eventually(lambda: weights(node, where) == draining, "the endpoint drains", seconds=SECONDS)
    cluster.set_ready(leaving, True)
    eventually(lambda: weights(node, where) == both, "it is back", seconds=SECONDS)
    assert lasting.speak() == leaving.name

    cluster.set_ready(leaving, False)
    eventually(lambda: weights(node, where) == draining, "the endpoint drains again", seconds=SECONDS)
    node.proxy.stop(signal.SIGKILL)
    cluster.set_ready(leaving, True)
    assert lasting.speak() == leaving.name  # nobody is needed for what is there
    node.proxy.start()
    node.proxy.wait_until_synced(seconds=60)
    assert weights(node, where) == both
    assert lasting.speak() == leaving.name
    lasting.close()


def test_what_others_break_is_mended_within_the_sync_period(cluster: Cluster, node: Node, web: Web) -> None:
    node.namespace.command("ipvsadm", "-R", stdin=f"{STRANGER}\n")
    whole = held(node)
    first, second = (pod.ipv4 for pod in web.pods)
    meddling = (
        f"ipvsadm -E -t {node.ipv4}:{web.node_port} -s wlc -p 77",
        f"ipvsadm -e -t {node.ipv4}:{web.node_port} -r {first}:80 -m -w 0",
        f"ipvsadm -d -t {node.ipv4}:{web.node_port} -r {second}:80",
        f"ipvsadm -D -t {web.address}:80",
        f"ip address delete {web.address}/32 dev kube-ipvs0",
        "ip link delete kube-ipvs0",
        f"ipset del KUBE-CLUSTER-IP {web.address},tcp:80",
        "iptables-legacy -t nat -F KUBE-SERVICES",
        "iptables-legacy -t nat -D PREROUTING -m comment --comment kubernetes\\ service\\ portals -j KUBE-SERVICES",
    )
    for one in meddling:
        node.exec("sh", "-c", one)
    assert held(node) != whole
    eventually(lambda: held(node) == whole, "everything is as it was", seconds=SECONDS)
    assert STRANGER in node.exec("ipvsadm", "-Sn")
    assert answered(cluster.client, f"http://{node.ipv4}:{web.node_port}/")
    node.exec("ipvsadm", "-D", "-t", "203.0.113.77:99")


def test_the_load_balancer_lets_in_whom_it_should(cluster: Cluster, node: Node, web: Web) -> None:
    cluster.route_from_outside(LOAD_BALANCER_IP, node)
    url = f"http://{LOAD_BALANCER_IP}/"

    def limited(*ranges: str) -> None:
        cluster.apply(
            load_balancer("shop", "10.96.0.200", LOAD_BALANCER_IP, app=web.name, loadBalancerSourceRanges=[*ranges])
        )

    limited("203.0.113.0/24")
    assert answered(cluster.client, url, seconds=SECONDS)
    limited("192.0.2.0/24")
    fails_as(cluster.client, url, NoAnswer.SILENCE, seconds=SECONDS)


def test_with_policy_local_nothing_leaks_to_endpoints_elsewhere(cluster: Cluster, node: Node) -> None:
    elsewhere = cluster.nodes[1]
    cluster.route_from_outside(LOAD_BALANCER_IP, node)
    url = f"http://{LOAD_BALANCER_IP}/"
    cluster.run_pod("far", elsewhere, {"app": "local"})
    here = cluster.run_pod("here", node, {"app": "local"})
    cluster.apply(load_balancer("local", "10.96.0.201", LOAD_BALANCER_IP, externalTrafficPolicy="Local"))

    assert answered(cluster.client, url, seconds=SECONDS) == "here"
    assert cluster.client.get(url).client == cluster.client.ipv4
    cluster.set_ready(here, False)
    fails_as(cluster.client, url, NoAnswer.REFUSED, seconds=SECONDS)
    cluster.set_ready(here, True)
    assert answered(cluster.client, url, seconds=SECONDS) == "here"


def test_a_node_port_is_open_on_a_node_without_a_pod(cluster: Cluster, node: Node) -> None:
    cluster.run_pod("distant-a", cluster.nodes[1], {"app": "distant"})
    cluster.apply(service("distant", "10.96.0.203", type="NodePort", ports=[port(80, node_port=30203)]))
    assert answered(cluster.client, f"http://{node.ipv4}:30203/", seconds=SECONDS) == "distant-a"


def test_a_service_comes_and_goes(cluster: Cluster, node: Node) -> None:
    cluster.apply(service("late", "10.96.0.202", ports=[port(80), port(53, protocol="UDP", name="dns")]))
    fails_as(node, "http://10.96.0.202/", NoAnswer.REFUSED, seconds=SECONDS)
    pod = cluster.run_pod("late-a", node, {"app": "late"})
    assert answered(node, "http://10.96.0.202/", seconds=SECONDS) == "late-a"
    assert try_once(node, "http://10.96.0.202:81/") is NoAnswer.REFUSED

    cluster.remove_pod(pod)
    eventually(lambda: servers(node, "10.96.0.202") == {}, "it has no endpoint", seconds=SECONDS)
    cluster.delete_service("late")
    eventually(lambda: "10.96.0.202" not in held(node), "nothing is left of it", seconds=SECONDS)
