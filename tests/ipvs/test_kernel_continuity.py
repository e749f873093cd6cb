"""While something changes, every new connection is served."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kproxy.dataplane.base import Entries, diff
from kproxy.dataplane.iptables import fixed as iptables_fixed
from kproxy.dataplane.iptables import render as iptables_render
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.options import Options
from tests.ipvs.kernel_host import FACTS, V4, V6, Host, cluster_ip, entries, pod, route
from tests.lab.namespaces import Namespace

pytestmark = pytest.mark.ipvs

CLIENTS = 300  # sockets that are ready before the change begins


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


def connected_while(host: Host, wanted: Entries, server: socket.socket) -> int:
    """How many clients, one after the other, connected to a service while another thread made the change."""
    clients = [host.netns.run(socket.socket, socket.AF_INET, socket.SOCK_STREAM) for _ in range(CLIENTS)]
    changing = threading.Thread(target=host.bring_to, args=(wanted,))
    changing.start()
    done = 0
    try:
        for client in clients:
            client.settimeout(10)
            client.connect((cluster_ip(V4, 1), 80))
            server.accept()[0].close()
            done += 1
            if not changing.is_alive():
                break
    finally:
        changing.join()
        for client in clients:
            client.close()
    return done


def test_when_ipvs_mode_takes_over_from_iptables_mode(host: Host) -> None:
    before = iptables_fixed.render_base(FACTS, Options()) | iptables_render.render_route(
        route(V4, 1, 1), FACTS, Options()
    )
    kernel = host.netns.run(lambda: IptablesKernel((V4, V6), Variant.LEGACY, guards_localhost=False))
    host.netns.run(kernel.apply, diff(before, {}))
    wanted = entries(*(route(V4, number, 1) for number in range(1, 50)))
    with host.listening(pod(V4, 1)) as server:
        assert connected_while(host, wanted, server) > 3
        assert diff(wanted, host.read()) == []
        host.connect(cluster_ip(V4, 1)).close()
        server.accept()[0].close()


def test_when_everything_else_changes(host: Host) -> None:
    host.bring_to(entries(*(route(V4, number, 1, 2) for number in range(2, 50)), route(V4, 1, 1)))
    wanted = entries(*(route(V4, number, 2, 3, node_port=30000 + number) for number in range(2, 70)), route(V4, 1, 1))
    with host.listening(pod(V4, 1)) as server:
        assert connected_while(host, wanted, server) > 3
    assert diff(wanted, host.read()) == []
