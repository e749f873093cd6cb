"""While something changes, every new connection is served, and at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kproxy.dataplane.base import diff
from kproxy.dataplane.iptables import fixed as iptables_fixed
from kproxy.dataplane.iptables import render as iptables_render
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.options import Options
from tests.ipvs.kernel_host import BACKEND_PORT, FACTS, V4, V6, Host, cluster_ip, entries, pod, route
from tests.lab.namespaces import Namespace

pytestmark = pytest.mark.ipvs

# Serves as the pod and connects to the service until its standard input ends; prints how often. It ends connections
# with a reset, so that nobody remembers them: masquerading may give the same source port again, and where the pod does
# remember one it answers otherwise, and the client has to try again a second later.
CLIENT = """
import select, socket, struct, sys
at_once = struct.pack("ii", 1, 0)
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
count = 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    with socket.create_connection((sys.argv[3], 80), timeout=30) as client, server.accept()[0]:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        count += 1
print(count)
"""


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


@contextmanager
def clients(host: Host) -> Iterator[None]:
    """One after the other connects to service 1 meanwhile. All have to be served, without saying anything twice."""
    args = [sys.executable, "-S", "-c", CLIENT, pod(V4, 1), str(BACKEND_PORT), cluster_ip(V4, 1)]
    with host.netns.start(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            count, trouble = process.communicate(timeout=60)
    assert trouble == ""
    assert int(count) > 10
    assert repeated(host) == 0


def repeated(host: Host) -> int:
    """How many first packets of connections had to be sent again."""
    text = host.netns.run(Path("/proc/thread-self/net/netstat").read_text)
    names, values = (line.split() for line in text.splitlines() if line.startswith("TcpExt:"))
    return int(values[names.index("TCPSynRetrans")])


def test_when_ipvs_mode_takes_over_from_iptables_mode(host: Host) -> None:
    before = iptables_fixed.render_base(FACTS, Options())
    before |= iptables_render.render_route(route(V4, 1, 1), FACTS, Options())
    kernel = host.netns.run(lambda: IptablesKernel((V4, V6), Variant.LEGACY, guards_localhost=False))
    host.netns.run(kernel.apply, diff(before, {}))
    wanted = entries(*(route(V4, number, 1) for number in range(250, 0, -1)))
    with clients(host):
        host.bring_to(wanted)
    assert diff(wanted, host.read()) == []


def test_when_everything_else_changes(host: Host) -> None:
    host.bring_to(entries(*(route(V4, number, 1, 2) for number in range(2, 50)), route(V4, 1, 1)))
    others = (route(V4, number, 2, 3, node_port=30000 + number) for number in range(2, 70))
    wanted = entries(*others, route(V4, 1, 1, affinity_seconds=60))
    with clients(host):
        host.bring_to(wanted)
        host.restart()
        host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
