"""One run: a cluster of some size, one kproxy process, and what it takes."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.lab.apiserver_load import POD_CIDR, slice_of

API_PORT, HEALTH_PORT, METRICS_PORT = 18080, 18256, 18249
START_TIMEOUT = 120.0
CHANGES = 200
RATE, RATE_SECONDS = 100, 10.0
IDLE_SECONDS = 10.0

_NEWGEN = 10 << 8 | 15


class Figures(NamedTuple):
    """What was measured of one size."""

    services: int
    endpoints: int
    start: float  # s
    restart: float  # s
    restart_writes: int
    rss: int  # MiB
    peak: int  # MiB
    change_p50: float  # ms
    change_p99: float
    change_max: float
    load: float  # % of a core
    wakeups: int

    @staticmethod
    def header() -> str:
        """The table's head."""
        return (
            f"{'services':>14} {'start':>8} {'restart':>8} {'writes':>6} {'RSS':>8} {'peak':>8} "
            f"{'change p50':>10} {'p99':>8} {'max':>8} {'100/s':>7} {'idle':>5}"
        )

    @staticmethod
    def legend() -> str:
        """What the columns are."""
        return (
            "\nstart: process start to everything programmed. restart: the same with nothing to change, and the\n"
            f"kernel commits it made. change: PUT of an EndpointSlice to its commit in the kernel, {CHANGES} times.\n"
            f"100/s: CPU of one core at {RATE} endpoint changes a second. idle: wake-ups in {IDLE_SECONDS:.0f} s."
        )

    def row(self) -> str:
        """One line of the table."""
        size = f"{self.services:,} × {self.endpoints}"
        return (
            f"{size:>14} {self.start:>6.2f} s {self.restart:>6.2f} s {self.restart_writes:>6} {self.rss:>4} MiB "
            f"{self.peak:>4} MiB {self.change_p50:>7.2f} ms {self.change_p99:>5.2f} ms {self.change_max:>5.2f} ms "
            f"{self.load:>5.1f} % {self.wakeups:>5}"
        )


def measure(services: int, endpoints: int) -> Figures:
    """Run everything for one size, in the current network namespace, and leave it empty."""
    with api_server(services, endpoints):
        with kproxy("--proxy-mode=nftables") as (process, start):
            rss, peak = memory(process.pid)
            latencies = _changes(services, endpoints)
            load = _load(process.pid, services, endpoints)
            wakeups = _wakeups(process.pid)
        with Commits() as commits, kproxy("--proxy-mode=nftables") as (_, restart):
            restart_writes = commits.count()
        subprocess.run([sys.executable, "-m", "kproxy", "--cleanup"], check=True, timeout=120, capture_output=True)
    latencies.sort()
    return Figures(
        services,
        endpoints,
        start,
        restart,
        restart_writes,
        rss,
        peak,
        latencies[len(latencies) // 2] * 1000,
        latencies[len(latencies) * 99 // 100] * 1000,
        latencies[-1] * 1000,
        load,
        wakeups,
    )


class Commits:
    """The kernel's announcements of nf_tables commits in this namespace."""

    def __enter__(self) -> Commits:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        self._socket.bind((0, 1 << 6))  # NFNLGRP_NFTABLES
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait(self, timeout: float) -> None:
        """Until one commit is announced. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while self._poll(max(0.0, deadline - time.monotonic())) == 0:
            if time.monotonic() > deadline:
                raise TimeoutError("no commit")

    def count(self) -> int:
        """How many were announced and not yet counted."""
        total = 0
        while select.select([self._socket], [], [], 0)[0]:
            total += self._poll(0)
        return total

    def _poll(self, timeout: float) -> int:
        if not select.select([self._socket], [], [], timeout)[0]:
            return 0
        data, at, found = self._socket.recv(1 << 20), 0, 0
        while at + 16 <= len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            found += kind == _NEWGEN
            at += (length + 3) & ~3
        return found


@contextmanager
def api_server(services: int, endpoints: int) -> Iterator[None]:
    """An API server that holds so many Services."""
    command = [sys.executable, "-m", "tests.lab.apiserver", "--port", str(API_PORT)]
    command += ["--generate", str(services), "--endpoints", str(endpoints)]
    with _process(command) as process:
        _await(process, API_PORT, "/api/v1/nodes?limit=1", 10 * START_TIMEOUT)
        yield


@contextmanager
def kproxy(*flags: str) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A running kproxy, and the seconds until its first sync was done."""
    command = [sys.executable, "-m", "kproxy", "--master", f"http://127.0.0.1:{API_PORT}", *flags]
    command += ["--hostname-override", "node-0", "--cluster-cidr", POD_CIDR]
    command += ["--healthz-bind-address", f"127.0.0.1:{HEALTH_PORT}"]
    command += ["--metrics-bind-address", f"127.0.0.1:{METRICS_PORT}"]
    # The machine's conntrack limits are not a namespace's to set.
    command += ["--conntrack-max-per-core", "0", "--oom-score-adj", "0"]
    started = time.monotonic()
    with _process(command) as process:
        _await(process, HEALTH_PORT, "/readyz", START_TIMEOUT)
        yield process, time.monotonic() - started


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield process
        except BaseException:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-10_000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(process: subprocess.Popen[bytes], port: int, path: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"process ended with {process.returncode}: {process.args}")
        try:
            if request("GET", port, path) == 200:
                return
        except OSError:
            pass
        time.sleep(0.01)
    raise TimeoutError(f"port {port}{path} is not ready after {timeout:.0f} s")


def request(method: str, port: int, path: str, body: bytes | None = None) -> int:
    """The status of the answer on loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def memory(pid: int) -> tuple[int, int]:
    """Resident MiB, now and at most."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) // 1024, int(status["VmHWM"].split()[0]) // 1024


def put_slice(connection: http.client.HTTPConnection, number: int, endpoints: int, round_: int) -> None:
    """Move one endpoint of a service to a new address."""
    changed = slice_of(number, endpoints)
    changed["endpoints"][round_ % endpoints]["addresses"] = [f"10.200.{round_ >> 8 & 255}.{round_ & 255}"]
    path = f"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/{changed['metadata']['name']}"
    connection.request("PUT", path, json.dumps(changed).encode())
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise RuntimeError(f"PUT {path}: {response.status}")


def _changes(services: int, endpoints: int) -> list[float]:
    """Seconds from a PUT to the commit that it leads to, one after the other."""
    latencies = []
    connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=30)
    connection.connect()
    with Commits() as commits:
        for round_ in range(CHANGES):
            commits.count()
            started = time.monotonic()
            put_slice(connection, round_ * 7919 % services, endpoints, round_)
            commits.wait(10.0)
            latencies.append(time.monotonic() - started)
            time.sleep(0.01)
    connection.close()
    return latencies


def _load(pid: int, services: int, endpoints: int) -> float:
    """Percent of a core that the process takes while endpoints change at the rate."""
    connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=30)
    started, before = time.monotonic(), _cpu_seconds(pid)
    for round_ in range(int(RATE * RATE_SECONDS)):
        put_slice(connection, round_ * 104729 % services, endpoints, CHANGES + round_)
        time.sleep(max(0.0, started + (round_ + 1) / RATE - time.monotonic()))
    used = _cpu_seconds(pid) - before
    connection.close()
    return 100 * used / (time.monotonic() - started)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wakeups(pid: int) -> int:
    before = _switches(pid)
    time.sleep(IDLE_SECONDS)
    return _switches(pid) - before


def _switches(pid: int) -> int:
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total
