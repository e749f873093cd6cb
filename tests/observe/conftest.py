"""Every test here has a network of its own: ports are free, and nothing listens where others could reach it."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from kproxy.http.server import HttpServer
from tests.observe.clock import Clock

CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture(autouse=True)
def _private_network():
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    check(libc.unshare(CLONE_NEWNET))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    yield
    check(libc.setns(before, CLONE_NEWNET))
    os.close(before)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(_private_network, clock):
    server = HttpServer(clock=clock.monotonic)
    yield server
    server.close()


@pytest.fixture
def health_cases() -> Path:
    return conformance("health.json")


def conformance(name: str) -> Path:
    beside = Path(__file__).parents[3] / "shared" / "conformance"
    path = Path(os.environ.get("KPROXY_CONFORMANCE", beside)) / name
    if not path.exists():
        pytest.skip(f"no conformance data at {path} (set KPROXY_CONFORMANCE)")
    return path
