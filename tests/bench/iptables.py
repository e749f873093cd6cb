"""iptables mode: a full load and the change of one endpoint, and whose work that is."""

from __future__ import annotations

import http.client
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.measure import API_PORT, METRICS_PORT, api_server, kproxy, memory, put_slice

CHANGES = 20
# kproxy would wait for a second between syncs, as kube-proxy does; here the sync itself is of interest.
FLAGS = ("--proxy-mode=iptables", "--iptables-min-sync-period=0s")
HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"


class Cpu(NamedTuple):
    """Seconds of CPU time: of kproxy itself, and of the iptables programs in user mode and in the kernel."""

    own: float
    programs: float
    programs_kernel: float

    def since(self, before: Cpu) -> Cpu:
        return Cpu(*(now - then for now, then in zip(self, before, strict=True)))

    def __str__(self) -> str:
        return f"{self.own:.2f} + {self.programs:.2f} + {self.programs_kernel:.2f}"


class Figures(NamedTuple):
    """What was measured of one size in one variant. Seconds, MiB."""

    services: int
    endpoints: int
    variant: str
    start: float
    start_cpu: Cpu
    restart: float
    restart_writes: int
    rss: int
    change_p50: float
    change_max: float
    change_cpu: Cpu  # of one change

    @staticmethod
    def header() -> str:
        """The table's head."""
        return (
            f"{'services':>14} {'variant':>8} {'start':>8} {'of it CPU s':>20} {'restart':>8} {'writes':>6} {'RSS':>8}"
            f" {'change p50':>10} {'max':>8} {'of it CPU s':>20}"
        )

    @staticmethod
    def legend() -> str:
        """What the columns are."""
        return (
            "\nstart: process start to everything programmed. CPU: of kproxy itself + of iptables programs, in user\n"
            "mode + in the kernel. restart: the same with nothing to change, and the entries it wrote. change: PUT of\n"
            f"an EndpointSlice to the end of its sync, {CHANGES} times, minSyncPeriod 0."
        )

    def row(self) -> str:
        """One line of the table."""
        size = f"{self.services:,} × {self.endpoints}"
        return (
            f"{size:>14} {self.variant:>8} {self.start:>6.2f} s {self.start_cpu!s:>20} {self.restart:>6.2f} s"
            f" {self.restart_writes:>6} {self.rss:>4} MiB {self.change_p50 * 1000:>7.0f} ms"
            f" {self.change_max * 1000:>5.0f} ms {self.change_cpu!s:>20}"
        )


def measure(services: int, endpoints: int, variant: str) -> Figures:
    """Run everything for one size in the current network namespace, and leave it empty."""
    subprocess.run([f"iptables-{variant}-restore", "--noflush"], input=HINT, text=True, check=True)
    try:
        with api_server(services, endpoints):
            with kproxy(*FLAGS) as (process, start):
                start_cpu = _cpu(process.pid)
                latencies, change_cpu = _changes(process.pid, services, endpoints)
                rss, _ = memory(process.pid)
            with kproxy(*FLAGS) as (_, restart):
                restart_writes = int(sum(_samples("kproxy_sync_changes_total")))
            subprocess.run(
                [sys.executable, "-m", "kproxy", "--cleanup"], check=True, timeout=300, stdout=subprocess.DEVNULL
            )
    finally:
        subprocess.run([f"iptables-{variant}", "-t", "mangle", "-X", "KUBE-IPTABLES-HINT"], check=True)
    return Figures(
        services,
        endpoints,
        variant,
        start,
        start_cpu,
        restart,
        restart_writes,
        rss,
        statistics.median(latencies),
        max(latencies),
        change_cpu,
    )


def _changes(pid: int, services: int, endpoints: int) -> tuple[list[float], Cpu]:
    """Seconds from a PUT to the end of the sync that it leads to, one after the other, and the CPU time of one."""
    latencies = []
    before = _cpu(pid)
    api = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=30)
    for round_ in range(CHANGES):
        started = time.time()
        put_slice(api, round_ * 7919 % services, endpoints, round_)
        while (synced := min(_samples("kubeproxy_sync_proxy_rules_last_timestamp_seconds"))) < started:
            time.sleep(0.01)
        latencies.append(synced - started)
    api.close()
    return latencies, Cpu(*(seconds / CHANGES for seconds in _cpu(pid).since(before)))


def _samples(family: str) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{family}{{")]


def _cpu(pid: int) -> Cpu:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, kernel, user_programs, kernel_programs = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields[11:15])
    return Cpu(user + kernel, user_programs, kernel_programs)
