"""Real servers that are taken out of service: their clients may finish, but not for ever."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import Change, diff
from kproxy.dataplane.ipvs.dataplane import IpvsDataplane
from kproxy.dataplane.ipvs.drain import DRAIN_SECONDS, LOOK_SECONDS
from kproxy.dataplane.ipvs.entries import RealServer
from kproxy.dataplane.ipvs.options import Options
from kproxy.model import Family, Protocol
from kproxy.modes.ipvs import Drained
from kproxy.reconcile import Reconciler
from tests.ipvs.kernel_host import FACTS, NODE, V4, Host, cluster_ip, entries, pod, real_server, route
from tests.lab.cluster_objects import service
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually
from tests.reconcile.driven import changed

pytestmark = pytest.mark.ipvs

GONE = entries(route(V4, 1))
AT_WEIGHT_0 = "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 0"
AT_WEIGHT_1 = "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1"


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


class Conversation:
    """A client and a pod that are connected through a virtual server."""

    def __init__(self, host: Host, server: socket.socket, family: Family = V4) -> None:
        self._host = host
        self.client = host.connect(cluster_ip(family, 1))
        self.server, _ = server.accept()
        self.server.settimeout(10)

    def goes_on(self) -> bool:
        self.client.sendall(b"hello")
        return self.server.recv(64) == b"hello"

    def end(self) -> None:
        """Until IPVS has forgotten it: half closed by the server, a connection lasts for tcpFinTimeout."""
        self._host.netns.run(self._host.kernel.set_timeouts, 0, 1, 0)
        self.server.close()
        eventually(lambda: " 1 " not in self._host.command("ipvsadm", "-Ln"), "the connection ends")

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def conversation(host: Host) -> Iterator[Conversation]:
    """With the only endpoint of a service, which was taken away meanwhile."""
    host.bring_to(entries(route(V4, 1, 1)))
    with host.listening(pod(V4, 1)) as server:
        made = Conversation(host, server)
        host.bring_to(GONE)
        yield made
        made.close()


def test_an_endpoint_that_leaves_keeps_its_connections_and_gets_no_new_ones(
    host: Host, conversation: Conversation
) -> None:
    assert AT_WEIGHT_0 in host.servers()
    assert conversation.goes_on()
    assert diff(GONE, host.read()) == []
    with pytest.raises(OSError, match="refused"):
        host.connect(cluster_ip(V4, 1))
    assert host.drain() == 0
    assert conversation.goes_on()


def test_it_goes_when_its_connections_have_ended(host: Host, conversation: Conversation) -> None:
    conversation.end()
    assert host.drain() == 1
    assert AT_WEIGHT_0 not in host.servers()
    assert host.kernel.due() is None


def test_it_goes_when_it_has_had_time_enough(host: Host, conversation: Conversation) -> None:
    assert host.kernel.due() == LOOK_SECONDS
    host.clock.now += DRAIN_SECONDS - 1
    assert host.kernel.due() == 0
    assert host.drain() == 0
    assert host.kernel.due() == 1
    assert conversation.goes_on()
    host.clock.now += 1
    assert host.drain() == 1
    assert AT_WEIGHT_0 not in host.servers()


def test_a_look_that_failed_is_not_repeated_at_once(host: Host, conversation: Conversation) -> None:
    host.clock.now += DRAIN_SECONDS
    host.kernel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        host.drain()
    assert host.kernel.due() == LOOK_SECONDS


def give_weight(host: Host, weight: int) -> None:
    server = f"{pod(V4, 1)}:8080"
    host.command("ipvsadm", "-e", "-t", f"{cluster_ip(V4, 1)}:80", "-r", server, "-m", "-w", str(weight))


def test_weight_that_somebody_gives_back_is_taken_away_again(host: Host, conversation: Conversation) -> None:
    give_weight(host, 3)
    assert diff(GONE, host.read()) == [Change(real_server(1, 1), RealServer(3), None)]
    host.bring_to(GONE)
    assert AT_WEIGHT_0 in host.servers()
    assert conversation.goes_on()
    host.clock.now += DRAIN_SECONDS
    assert host.drain() == 1


def test_weight_that_somebody_gives_back_to_what_is_wanted_again_stays(host: Host, conversation: Conversation) -> None:
    give_weight(host, 1)
    host.bring_to(entries(route(V4, 1, 1)))
    host.clock.now += DRAIN_SECONDS
    assert host.drain() == 0
    assert AT_WEIGHT_1 in host.servers()


def test_it_comes_back_with_its_connections(host: Host, conversation: Conversation) -> None:
    host.bring_to(entries(route(V4, 1, 1)))
    assert AT_WEIGHT_1 in host.servers()
    assert host.kernel.due() is None
    host.clock.now += DRAIN_SECONDS
    assert host.drain() == 0
    assert conversation.goes_on()


def test_a_new_process_waits_for_what_an_earlier_one_left(host: Host, conversation: Conversation) -> None:
    host.restart(drain_seconds=60)
    assert host.kernel.due() is None
    assert diff(GONE, host.read()) == []
    assert AT_WEIGHT_0 in host.servers()
    assert conversation.goes_on()
    host.clock.now += 60
    assert host.kernel.due() == 0
    assert host.drain() == 1
    assert AT_WEIGHT_0 not in host.servers()


def test_a_new_process_that_has_nothing_to_change_deletes_what_an_earlier_one_left(
    host: Host, conversation: Conversation
) -> None:
    host.restart()
    drained = Drained(host.kernel)
    cluster = ClusterState(FACTS.name, note=lambda text: None)
    cluster.apply(changed(service("svc-1", cluster_ip(V4, 1))))
    report = host.netns.run(Reconciler(cluster, IpvsDataplane(host.kernel, Options()), FACTS).sync)
    assert not report.changes
    assert AT_WEIGHT_0 in host.servers()
    conversation.end()
    host.clock.now += LOOK_SECONDS
    drained.sync_done(report, 0.0)
    eventually(lambda: AT_WEIGHT_0 not in host.servers(), "it is deleted")


def test_a_new_process_gives_a_wanted_endpoint_its_weight_back(host: Host, conversation: Conversation) -> None:
    host.restart()
    host.bring_to(entries(route(V4, 1, 1)))
    assert AT_WEIGHT_1 in host.servers()
    assert host.kernel.due() is None
    assert conversation.goes_on()


def test_weight_0_without_connections_is_a_difference(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1, 2)))
    for number in (1, 2):
        server = f"{pod(V4, number)}:8080"
        host.command("ipvsadm", "-e", "-t", f"{cluster_ip(V4, 1)}:80", "-r", server, "-m", "-w", "0")
    host.restart()
    host.bring_to(entries(route(V4, 1, 1)))
    assert [line for line in host.servers() if line.startswith("-a")] == [AT_WEIGHT_1]
    assert host.kernel.due() is None


def test_a_service_that_is_deleted_takes_its_connections_along(host: Host, conversation: Conversation) -> None:
    host.bring_to(entries())
    assert host.servers() == []
    assert host.kernel.due() is None


def test_what_another_tool_deleted_is_waited_for_no_longer(host: Host, conversation: Conversation) -> None:
    host.command("ipvsadm", "-d", "-t", f"{cluster_ip(V4, 1)}:80", "-r", f"{pod(V4, 1)}:8080")
    assert host.drain() == 0
    assert host.kernel.due() is None


@pytest.mark.parametrize("family", list(Family))
def test_without_connections_an_endpoint_leaves_at_once(host: Host, family: Family) -> None:
    host.bring_to(entries(route(family, 1, 1)))
    with host.listening(pod(family, 1)) as server, host.connect(cluster_ip(family, 1)), server.accept()[0]:
        host.bring_to(entries(route(family, 1, 1, 2)))
        host.bring_to(entries(route(family, 1)))
        (left,) = (line for line in host.servers() if line.startswith("-a"))
    assert pod(family, 1) in left
    assert left.endswith("-w 0")


def test_datagrams_are_not_waited_for(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1, protocol=Protocol.UDP)))
    with (
        host.listening(pod(V4, 1), Protocol.UDP) as server,
        host.netns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.sendto(b"hello", (cluster_ip(V4, 1), 80))
        assert server.recv(64) == b"hello"
        host.bring_to(entries(route(V4, 1, protocol=Protocol.UDP)))
    assert not [line for line in host.servers() if line.startswith("-a")]
    assert host.kernel.due() is None


def test_both_addresses_of_a_service_are_waited_for(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1, node_port=30001), route(V4, 2, 1)))
    with (
        host.listening(pod(V4, 1)) as server,
        host.connect(NODE[V4], 30001),
        server.accept()[0],
        host.connect(cluster_ip(V4, 2)),
        server.accept()[0],
    ):
        host.bring_to(entries(route(V4, 1, node_port=30001), route(V4, 2)))
        assert [line for line in host.servers() if line.startswith("-a")] == [
            "-a -t 10.96.0.2:80 -r 10.1.0.1:8080 -m -w 0",
            "-a -t 192.168.0.10:30001 -r 10.1.0.1:8080 -m -w 0",
        ]
        host.clock.now += DRAIN_SECONDS
        assert host.drain() == 2
    assert real_server(2, 1) not in host.read()
