"""ipvs mode: a full load and the change of one endpoint, without an API server and the start of a process.

Where the kernel has no IPVS it runs in User-Mode Linux, where programs and system calls take several times as long.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import structlog

from kproxy.model import Family
from tests.lab.apiserver_load import POD_CIDR, generated, slice_of
from tests.lab.namespaces import Namespace
from tests.lab.proxy import InProcess

CHANGES = 20
CONFIG = {"mode": "ipvs", "hostnameOverride": "node-0", "clusterCIDR": POD_CIDR}
HEADER = f"{'services':>14} {'servers':>8} {'load':>8} {'restart':>8} {'change p50':>10} {'max':>8}"
LEGEND = f"""
servers: virtual and real ones in the kernel, a netlink message for each; so it is with addresses, while members of sets
go two hundred to a message. load: objects are known, until all of it is in force. restart: the same with nothing to
change. change: of one endpoint of a Service, {CHANGES} times, three messages each: one server comes, another one gets
weight 0 and, as it has no connections, goes."""


def main(services: list[int], endpoints: int) -> int:
    """Measure here, or in User-Mode Linux; the exit status."""
    subprocess.run(["modprobe", "--quiet", "ip_vs"], check=False)
    if not Path("/proc/net/ip_vs").exists():
        again = [sys.executable, "-m", "tests.lab.uml", sys.executable, "-m", "tests.bench", *sys.argv[1:]]
        return subprocess.run(again, check=False).returncode
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print(HEADER, flush=True)
    for size in services:
        print(row(size, endpoints), flush=True)
    print(LEGEND)
    return 0


def row(services: int, endpoints: int) -> str:
    """One line of the table: everything for one size, in a network namespace of its own."""
    with Namespace() as netns:
        netns.command("ip", "-batch", "-", stdin="link add eth0 type dummy\naddress add 192.168.0.1/24 dev eth0\n")
        first, load = loaded(netns, services, endpoints)
        latencies = sorted(change(first, number * 7919 % services, endpoints) for number in range(CHANGES))
        first.close()
        second, restart = loaded(netns, services, endpoints)
        second.close()
        servers = len(netns.command("ipvsadm", "-Sn").stdout.splitlines())
    return (
        f"{f'{services:,} × {endpoints}':>14} {servers:>8,} {load:>6.2f} s {restart:>6.2f} s"
        f" {latencies[CHANGES // 2] * 1000:>7.1f} ms {latencies[-1] * 1000:>5.1f} ms"
    )


def loaded(netns: Namespace, services: int, endpoints: int) -> tuple[InProcess, float]:
    """A proxy that has synced, and the seconds that this took."""
    proxy = InProcess(netns, CONFIG, [Family.IPv4])
    proxy.apply(*generated(services, endpoints))
    return proxy, synced(proxy)


def change(proxy: InProcess, number: int, endpoints: int) -> float:
    """Exchange one endpoint of a Service for another, and back for the next measurement; the seconds of the former."""
    before = slice_of(number, endpoints)
    after = slice_of(number, endpoints)
    after["endpoints"][0]["addresses"] = ["10.255.255.1"]
    proxy.apply(after)
    seconds = synced(proxy)
    proxy.apply(before)
    proxy.sync()
    return seconds


def synced(proxy: InProcess) -> float:
    begin = time.monotonic()
    proxy.sync()
    return time.monotonic() - begin
