"""iptables in a namespace of its own, in each variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kproxy.dataplane.base import Entries, diff
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.model import Family
from tests.iptables.services import BOTH
from tests.lab.namespaces import Namespace


class Host(NamedTuple):
    """A namespace, and the kernel side of iptables mode in it."""

    netns: Namespace
    kernel: IptablesKernel

    def read(self) -> Entries:
        return self.netns.run(self.kernel.read)

    def bring_to(self, wanted: Entries) -> None:
        changes = diff(wanted, self.read())
        self.netns.run(self.kernel.apply, changes)

    def iptables(self, *args: str, family: Family = Family.IPv4) -> str:
        name = "iptables" if family is Family.IPv4 else "ip6tables"
        return self.netns.command(f"{name}-{self.kernel.variant}", "--wait", *args).stdout

    def restore(self, *lines: str) -> None:
        """Another tool's iptables-restore, which replaces whole tables."""
        text = "".join(f"{line}\n" for line in lines)
        self.netns.command(f"iptables-{self.kernel.variant}-restore", "--wait", stdin=text)

    def saved(self, family: Family = Family.IPv4) -> list[str]:
        name = "iptables" if family is Family.IPv4 else "ip6tables"
        done = self.netns.command(f"{name}-{self.kernel.variant}-save")
        return [line for line in done.stdout.splitlines() if not line.startswith("#")]


OpenHost = Callable[[Variant], Host]


@pytest.fixture
def open_host(netns: Namespace) -> OpenHost:
    def open_one(variant: Variant) -> Host:
        kernel = netns.run(lambda: IptablesKernel(BOTH, variant, guards_localhost=True))
        netns.run(kernel.probe)
        return Host(netns, kernel)

    return open_one


@pytest.fixture(params=list(Variant))
def host(request: pytest.FixtureRequest, open_host: OpenHost) -> Host:
    return open_host(request.param)
