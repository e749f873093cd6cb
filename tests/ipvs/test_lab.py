"""What the tests of ipvs mode stand on: a kernel that really balances, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.lab.cluster import Cluster
from tests.lab.namespaces import Namespace
from tests.lab.traffic import NoAnswer, try_once, who_answers

pytestmark = pytest.mark.ipvs

VIRTUAL_ADDRESS = "10.96.0.1"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=1) as cluster:
        yield cluster


def test_a_virtual_server_sends_connections_to_its_real_servers_in_turn(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    pods = [cluster.run_pod(name, node) for name in ("one", "other")]
    cluster.route_from_outside(VIRTUAL_ADDRESS, node)
    node.configure(
        "link add virtual type dummy",
        f"addr add {VIRTUAL_ADDRESS}/32 dev virtual",
    )
    node.exec("ipvsadm", "-A", "-t", f"{VIRTUAL_ADDRESS}:80", "-s", "rr")
    for pod in pods:
        node.exec("ipvsadm", "-a", "-t", f"{VIRTUAL_ADDRESS}:80", "-r", f"{pod.ipv4}:80", "-m")

    answers = [cluster.client.get(f"http://{VIRTUAL_ADDRESS}").pod for _ in range(6)]

    assert answers in (["one", "other"] * 3, ["other", "one"] * 3)


def test_without_a_virtual_server_the_address_refuses(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    cluster.route_from_outside(VIRTUAL_ADDRESS, node)
    node.configure("link add virtual type dummy", f"addr add {VIRTUAL_ADDRESS}/32 dev virtual")

    assert try_once(cluster.client, f"http://{VIRTUAL_ADDRESS}") is NoAnswer.REFUSED


def test_a_virtual_server_of_ipv6(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    pod = cluster.run_pod("only", node)
    cluster.route_from_outside("fd00:96::1", node)
    node.configure("link add virtual type dummy", "addr add fd00:96::1/128 dev virtual nodad")
    node.exec("ipvsadm", "-A", "-t", "[fd00:96::1]:80", "-s", "rr")
    node.exec("ipvsadm", "-a", "-t", "[fd00:96::1]:80", "-r", f"[{pod.ipv6}]:80", "-m")

    assert who_answers(cluster.client, "http://[fd00:96::1]", 2) == {"only": 2}


def test_virtual_servers_belong_to_their_namespace(netns: Namespace, make_netns) -> None:
    netns.command("ipvsadm", "-A", "-u", "10.96.0.2:53", "-s", "mh")

    assert "10.96.0.2:53" in netns.command("ipvsadm", "-Ln").stdout
    assert "10.96.0.2:53" not in make_netns().command("ipvsadm", "-Ln").stdout


@pytest.mark.parametrize("scheduler", ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh"])
def test_every_scheduler_is_there(netns: Namespace, scheduler: str) -> None:
    netns.command("ipvsadm", "-A", "-t", "10.96.0.3:80", "-s", scheduler)

    assert f"10.96.0.3:80 {scheduler}" in netns.command("ipvsadm", "-Ln").stdout


def test_ipsets_and_the_rules_that_look_them_up(netns: Namespace) -> None:
    netns.command("ipset", "create", "services", "hash:ip,port")
    netns.command("ipset", "add", "services", "10.96.0.4,tcp:443")
    netns.command("iptables-legacy", "-A", "INPUT", "-m", "set", "--match-set", "services", "dst,dst", "-j", "ACCEPT")

    assert "10.96.0.4,tcp:443" in netns.command("ipset", "list", "services").stdout
    assert "--match-set services dst,dst" in netns.command("iptables-legacy", "-S", "INPUT").stdout


def test_the_clock_moves(netns: Namespace) -> None:
    wall, monotonic = time.time(), time.monotonic()

    netns.command("sleep", "0.2")

    assert 0.2 <= time.monotonic() - monotonic < 5
    assert 0.2 <= time.time() - wall < 5
