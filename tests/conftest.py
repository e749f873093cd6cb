"""What all tests share: namespaces and the packet lab. They need a real kernel, so they are never skipped quietly."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.namespaces import Namespace
from tests.lab.packets import Lab

KERNEL_FIXTURES = {"netns", "make_netns", "lab", "make_lab"}
PACKET_FLOWS = pytest.StashKey[Counter[str]]()

MakeLab = Callable[..., Lab]
MakeNetns = Callable[[], Namespace]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PACKET_FLOWS] = Counter()


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(KERNEL_FIXTURES.intersection(getattr(item, "fixturenames", ())) for item in session.items):
        complaint = _missing_privileges()
        if complaint:
            pytest.exit(complaint, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    sent = config.stash[PACKET_FLOWS].total()
    if sent:
        terminalreporter.write_line(f"{sent:,} packet flows were sent through the kernel")


@pytest.fixture
def make_netns() -> Iterator[MakeNetns]:
    """Makes network namespaces that go when the test ends."""
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(Namespace())
        return made[-1]

    yield make
    for namespace in made:
        namespace.close()


@pytest.fixture
def netns(make_netns: MakeNetns) -> Namespace:
    """A network namespace with nothing but its loopback device."""
    return make_netns()


@pytest.fixture
def make_lab(request: pytest.FixtureRequest) -> Iterator[MakeLab]:
    """Makes packet labs that go when the test ends; the arguments are those of `Lab`."""
    made: list[Lab] = []

    def make(*args: Any, **kwargs: Any) -> Lab:
        made.append(Lab(*args, **kwargs))
        return made[-1]

    yield make
    for lab in made:
        request.config.stash[PACKET_FLOWS][request.node.nodeid] += lab.sent
        lab.close()


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """A packet lab with the usual addresses."""
    return make_lab()


def _missing_privileges() -> str:
    """One line that says what to do, or nothing if namespaces and TUN devices can be made."""
    try:
        Namespace().close()
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return (
            f"these tests need a network namespace with TUN devices of their own and cannot make one ({error}):"
            " run them as root with /dev/net/tun, or under `unshare -Urnm`"
        )
    return ""
