"""A node in a network namespace, with the kernel side of ipvs mode: what its tests have in common."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from kproxy.dataplane.base import Entries, diff
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.ipvs.entries import RealServerKey, VirtualServerKey
from kproxy.dataplane.ipvs.fixed import render_base
from kproxy.dataplane.ipvs.kernel import IpvsKernel
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.render import render_route
from kproxy.model import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    LocalDetector,
    NodeFacts,
    Protocol,
    Route,
    ServicePort,
    ServicePortName,
)
from tests.lab.namespaces import Namespace

V4, V6 = Family.IPv4, Family.IPv6
NODE = {V4: "192.168.0.10", V6: "fd00:10::10"}
PODS = {V4: "10.1.0.0/16", V6: "fd00:1::/64"}
FACTS = NodeFacts(
    name="here",
    ips=NODE,
    addresses={family: (address,) for family, address in NODE.items()},
    detectors={family: LocalDetector(cidr=cidr) for family, cidr in PODS.items()},
)
BACKEND_PORT = 8080
COUNTS = re.compile(r" \[\d+:\d+\]$")  # of packets, in iptables-save's lines of chains


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Host:
    """A namespace with a network card, and addresses of pods that are on the node itself, so that they can answer."""

    def __init__(self, netns: Namespace) -> None:
        self.netns = netns
        self.clock = Clock()
        commands = [
            "link add eth0 type dummy",
            "link set eth0 up",
            f"address add dev eth0 {NODE[V4]}/24",
            "route add default dev eth0",
            f"address add nodad dev eth0 {NODE[V6]}/64",
            *(f"address add dev lo {pod(V4, number)}/32" for number in range(1, 4)),
            *(f"address add nodad dev lo {pod(V6, number)}/128" for number in range(1, 4)),
        ]
        netns.command("ip", "-batch", "-", stdin="\n".join(commands))
        self.kernel = self.new_kernel()

    def new_kernel(self, **options: Any) -> IpvsKernel:
        """The kernel side of a process that starts now."""
        return self.netns.run(lambda: IpvsKernel((V4, V6), Variant.LEGACY, clock=self.clock, **options))

    def restart(self, **options: Any) -> None:
        """A new process takes over."""
        self.kernel.close()
        self.kernel = self.new_kernel(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kernel.close()

    def read(self) -> Entries:
        return self.netns.run(self.kernel.read)

    def bring_to(self, wanted: Entries) -> None:
        self.netns.run(self.kernel.apply, diff(wanted, self.read()))

    def drain(self) -> int:
        return self.netns.run(self.kernel.drain)

    def command(self, *args: str, stdin: str = "") -> str:
        return self.netns.command(*args, stdin=stdin).stdout

    def servers(self) -> list[str]:
        """What ipvsadm can restore, sorted."""
        return sorted(self.command("ipvsadm", "-Sn").splitlines())

    def saved(self, family: Family = V4) -> list[str]:
        program = "iptables" if family is V4 else "ip6tables"
        text = self.command(f"{program}-{Variant.LEGACY}-save")
        return [COUNTS.sub("", line) for line in text.splitlines() if not line.startswith("#")]

    @contextmanager
    def listening(self, address: str, protocol: Protocol = Protocol.TCP) -> Iterator[socket.socket]:
        """A pod's server."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
        with self.netns.run(socket.socket, family, kind) as server:
            server.settimeout(10)
            server.bind((address, BACKEND_PORT))
            if protocol is Protocol.TCP:
                server.listen()
            yield server

    def connect(self, address: str, port: int = 80) -> socket.socket:
        """A client on the node itself."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = self.netns.run(socket.socket, family, socket.SOCK_STREAM)
        client.settimeout(10)
        try:
            client.connect((address, port))
        except OSError:
            client.close()
            raise
        return client


def pod(family: Family, number: int) -> str:
    return f"10.1.0.{number}" if family is V4 else f"fd00:1::{number:x}"


def cluster_ip(family: Family, number: int) -> str:
    return f"10.96.0.{number}" if family is V4 else f"fd00:96::{number:x}"


def route(family: Family, number: int, *pods: int, protocol: Protocol = Protocol.TCP, **port: Any) -> Route:
    """The service port default/svc-N:http on port 80 of its cluster IP, and on whatever else `port` says."""
    service_port = ServicePort(
        ServicePortName("default", f"svc-{number}", "http", protocol), family, cluster_ip(family, number), 80, **port
    )
    addresses = [(FrontendKind.CLUSTER_IP, service_port.cluster_ip)]
    addresses += [(FrontendKind.EXTERNAL_IP, address) for address in service_port.external_ips]
    addresses += [(FrontendKind.LOAD_BALANCER, address) for address in service_port.load_balancer_ips]
    frontends = [(kind, Frontend(family, address, protocol, 80)) for kind, address in addresses]
    if service_port.node_port:
        frontends.append((FrontendKind.NODE_PORT, Frontend(family, "", protocol, service_port.node_port)))
    endpoints = tuple(Endpoint(pod(family, one), BACKEND_PORT) for one in pods)
    return Route(
        service_port,
        cluster=endpoints,
        local=endpoints[:1],
        here=endpoints[:1],
        has_any=bool(endpoints),
        frontends=tuple(frontends),
    )


def elaborate(family: Family, number: int, protocol: Protocol = Protocol.TCP) -> Route:
    """A service port with all that there is."""
    documented = "192.0.2." if family is V4 else "2001:db8::"
    return route(
        family,
        number,
        *(1, 2),
        protocol=protocol,
        node_port=30000 + number,
        external_ips=(f"{documented}{number}",),
        load_balancer_ips=(f"{documented}{number + 100}",),
        source_ranges=("203.0.113.0/24", "198.51.100.7/32")
        if family is V4
        else ("2001:db8:1::/48", "2001:db8:2::7/128"),
        affinity_seconds=180,
        external_local=True,
        externally_accessible=True,
        health_check_node_port=31000 + number,
    )


def entries(*routes: Route, options: Options | None = None, facts: NodeFacts = FACTS) -> Entries:
    """All that the kernel must hold for some service ports."""
    options = options or Options()
    found = dict(render_base(facts, options))
    for one in routes:
        found |= render_route(one, facts, options)
    return found


def everything() -> Entries:
    """In both families: service ports with all that there is, of each protocol; a plain one; one without endpoints."""
    return entries(
        *(
            one
            for family in Family
            for one in (
                *(elaborate(family, 20 + n, protocol) for n, protocol in enumerate(Protocol)),
                route(family, 1, 1, 2, 3),
                route(family, 2),
            )
        )
    )


def virtual_server(number: int, protocol: Protocol = Protocol.TCP, family: Family = V4) -> VirtualServerKey:
    return VirtualServerKey(family, cluster_ip(family, number), protocol, 80)


def real_server(number: int, one: int, protocol: Protocol = Protocol.TCP, family: Family = V4) -> RealServerKey:
    return RealServerKey(*virtual_server(number, protocol, family), pod(family, one), BACKEND_PORT)
