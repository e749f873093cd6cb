"""The nftables mode on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import ApplyError
from kproxy.dataplane.nftables.dataplane import NftablesDataplane
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.monitor import Monitor
from kproxy.explain import Explanation, Node, Packet, nftables
from kproxy.metrics.connections import Reading
from kproxy.metrics.families import NftablesMetrics
from kproxy.model import Family, Route
from kproxy.proxy import Observer
from kproxy.sysctl import Setting
from kproxy.traffic import Traffic


class Nftables:
    """See `kproxy.modes.base.Mode`. `counted_endpoints`: how many endpoints a map may begin with to have counters."""

    def __init__(self, families: Sequence[Family], counted_endpoints: int) -> None:
        self.kernel = NftablesKernel(families, counted_endpoints=counted_endpoints)
        self.dataplane = NftablesDataplane(self.kernel)
        self._families = tuple(families)
        self._counted_endpoints = counted_endpoints

    def large_families(self, state: ClusterState) -> Callable[[], frozenset[Family]]:  # noqa: ARG002
        """See `kproxy.modes.base.Mode`. It does not matter to this one."""
        return frozenset

    def observers(self, registry: CollectorRegistry) -> Sequence[Observer]:
        """See `kproxy.modes.base.Mode`."""
        return [_Measured(self._families, NftablesMetrics(registry))]

    def readings(self, state: ClusterState) -> Callable[[], Iterable[Reading]]:
        """See `kproxy.modes.base.Mode`."""
        return Traffic(self._families, state.owner, self._counted_endpoints).readings

    def explain(self, packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
        """See `kproxy.modes.base.Mode`."""
        return nftables.explain(packet, routes, node)

    def is_exposed(self) -> bool:
        """See `kproxy.modes.base.Mode`. A table that is owned can be changed by nobody else."""
        return bool(self.kernel.tables()) and not self.kernel.protected()

    def watch(self) -> Monitor:
        """See `kproxy.modes.base.Mode`."""
        return Monitor([self.kernel.port])

    def settings(self) -> Sequence[Setting]:
        """See `kproxy.modes.base.Mode`. There are none."""
        return ()

    def prepare(self) -> None:
        """See `kproxy.modes.base.Mode`. There is nothing to do."""

    def close(self) -> None:
        """See `kproxy.modes.base.Mode`."""
        self.kernel.close()


class _Measured(Observer):
    def __init__(self, families: Sequence[Family], metrics: NftablesMetrics) -> None:
        self._families = families
        self._metrics = metrics

    def sync_failed(self, error: Exception, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        if isinstance(error, ApplyError):
            for family in self._families:
                self._metrics.sync_failures.labels(family.name).inc()
