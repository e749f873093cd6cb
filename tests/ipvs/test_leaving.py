"""Leaving ipvs mode while connections last: these go on, and nothing else of the node is reached by their addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.base import diff
from kproxy.dataplane.ipvs import device
from kproxy.model import Family
from kproxy.modes.remains import Succession, in_place
from tests.ipvs.kernel_host import NODE, V4, V6, Host, cluster_ip, elaborate, entries, pod, route
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually

pytestmark = pytest.mark.ipvs

KUBELET = 10250


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


@pytest.fixture
def kubelet(host: Host) -> Iterator[socket.socket]:
    """Something that listens on all of the node's addresses."""
    with host.netns.run(
        socket.create_server, ("::", KUBELET), family=socket.AF_INET6, dualstack_ipv6=True
    ) as listening:
        yield listening


class Conversation:
    """A client on the node and a pod, connected through a virtual server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server

    def goes_on(self) -> bool:
        self.client.sendall(b"?")
        asked = self.server.recv(1)
        self.server.sendall(b"!")
        return asked + self.client.recv(1) == b"?!"


@contextmanager
def talking(host: Host, address: str, port: int = 80) -> Iterator[Conversation]:
    with host.listening(pod(Family.of(address), 1)) as listener, host.connect(address, port) as client:
        server = listener.accept()[0]
        server.settimeout(10)
        with server:
            yield Conversation(client, server)


def look(host: Host, *, patient: bool = True) -> bool:
    """A proxy in iptables mode looks at what ipvs mode left. Returns whether some of it stays for connections."""
    succession = Succession((V4, V6), ProxyMode.IPTABLES)
    return host.netns.run(succession.remove_now, patient=patient)


def addresses(host: Host) -> set[str]:
    return {address for _, address in host.netns.run(device.addresses)}


def nothing_is_left(host: Host) -> bool:
    kept = [line for family in Family for line in host.saved(family) if "KUBE" in line]
    return host.read() == {} and not kept and not host.servers() and not host.command("ipset", "list", "-n")


def test_other_ports_of_the_address_stay_shut(host: Host, kubelet: socket.socket) -> None:
    host.bring_to(entries(route(V4, 1, 1), route(V4, 2, 1), route(V6, 2, 1), elaborate(V4, 3)))
    with talking(host, cluster_ip(V4, 1)) as conversation:
        assert look(host)

        host.connect(NODE[V4], KUBELET).close()
        with pytest.raises(ConnectionRefusedError):
            host.connect(cluster_ip(V4, 1), KUBELET)
        assert addresses(host) == {cluster_ip(V4, 1)}
        assert [line for line in host.servers() if line.startswith("-A")] == [f"-A -t {cluster_ip(V4, 1)}:80 -s rr"]
        assert host.netns.run(in_place, tuple(Family)) is None
        assert conversation.goes_on()


def test_the_connections_are_the_last_ones(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1)))
    with talking(host, cluster_ip(V4, 1)):
        host.bring_to(entries(route(V4, 1, 1, 2)))
        look(host)
        assert [line.split()[-1] for line in host.servers() if line.startswith("-a")] == ["0", "0"]
        with pytest.raises(ConnectionRefusedError):
            host.connect(cluster_ip(V4, 1), 80)


def test_all_is_gone_when_they_have_ended(host: Host, kubelet: socket.socket) -> None:
    host.bring_to(entries(route(V6, 1, 1), elaborate(V6, 2), route(V4, 1, 1)))
    host.netns.run(host.kernel.set_timeouts, 0, 1, 0)  # a connection that the server has closed is soon forgotten
    with talking(host, cluster_ip(V6, 1)) as conversation:
        assert look(host)
        with pytest.raises(ConnectionRefusedError):
            host.connect(cluster_ip(V6, 1), KUBELET)
        conversation.server.close()
        eventually(lambda: not look(host), "nothing stays")
    assert nothing_is_left(host)


def test_a_connection_to_a_node_port_lasts_until_it_has_had_time_enough(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1, node_port=30001)))
    with talking(host, NODE[V4], 30001) as conversation:
        assert look(host)
        assert addresses(host) == set()
        assert look(host)  # it is known again, though no address tells
        assert conversation.goes_on()
        assert not look(host, patient=False)
    assert nothing_is_left(host)


def test_ipvs_mode_that_comes_back_meanwhile_has_all_of_it_again(host: Host) -> None:
    wanted = entries(route(V4, 1, 1), elaborate(V4, 2), elaborate(V6, 2))
    host.bring_to(wanted)
    with talking(host, cluster_ip(V4, 1)) as conversation:
        look(host)
        host.restart()
        host.bring_to(wanted)
        assert diff(wanted, host.read()) == []
        assert {line.split()[-1] for line in host.servers() if line.startswith("-a")} == {"1"}
        assert conversation.goes_on()
