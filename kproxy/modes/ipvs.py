"""The ipvs mode on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from prometheus_client import CollectorRegistry

from kproxy import sysctl
from kproxy.cluster import ClusterState
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration
from kproxy.dataplane.base import ApplyError
from kproxy.dataplane.iptables import variant
from kproxy.dataplane.ipvs.dataplane import IpvsDataplane
from kproxy.dataplane.ipvs.entries import RealServerKey, VirtualServerKey
from kproxy.dataplane.ipvs.kernel import IpvsKernel
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.probe import have_modules_loaded
from kproxy.dataplane.ipvs.settings import settings_here
from kproxy.explain import Explanation, Node, Packet
from kproxy.explain.ipvs import explain
from kproxy.metrics.connections import Reading
from kproxy.metrics.families import IptablesMetrics
from kproxy.model import Endpoint, Family, Frontend, Route, ServicePortName
from kproxy.node_addresses import node_port_cidrs
from kproxy.proxy import Observer
from kproxy.reconcile import SyncReport
from kproxy.sysctl import Setting

log = structlog.get_logger(__name__)

Owner = Callable[[Frontend], ServicePortName | None]


class Ipvs:
    """See `kproxy.modes.base.Mode`. Raises UnsupportedError and OSError."""

    def __init__(self, configuration: Configuration, settings: KproxyConfiguration, families: Sequence[Family]) -> None:
        self._ipvs = ipvs = configuration.ipvs
        scheduler = ipvs.scheduler or "rr"
        chosen = variant.find(families)
        have_modules_loaded(chosen, families)
        self.kernel = IpvsKernel(
            families,
            chosen,
            excluded=ipvs.exclude_cidrs,
            node_ports=node_port_cidrs(configuration.node_port_addresses, {}),
            drain_seconds=settings.ipvs.drain_timeout.seconds,
        )
        features = self.kernel.probe(scheduler)
        self._stock_local_fallback = settings.ipvs.stock_local_fallback
        options = Options(
            scheduler=scheduler,
            random_fully=features.random_fully,
            stock_local_fallback=self._stock_local_fallback,
        )
        self.dataplane = IpvsDataplane(self.kernel, options)

    def large_families(self, state: ClusterState) -> Callable[[], frozenset[Family]]:  # noqa: ARG002
        """See `kproxy.modes.base.Mode`. It does not matter to this one."""
        return frozenset

    def observers(self, registry: CollectorRegistry) -> Sequence[Observer]:
        """See `kproxy.modes.base.Mode`."""
        return [_Measured(self.kernel.families, IptablesMetrics(registry)), Drained(self.kernel)]

    def readings(self, state: ClusterState) -> Callable[[], Iterable[Reading]]:
        """See `kproxy.modes.base.Mode`."""
        return lambda: _readings(self.kernel, state.owner)

    def explain(self, packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
        """See `kproxy.modes.base.Mode`."""
        return explain(packet, routes, node, stock_local_fallback=self._stock_local_fallback)

    def is_exposed(self) -> bool:
        """See `kproxy.modes.base.Mode`."""
        return True

    def watch(self) -> None:
        """See `kproxy.modes.base.Mode`. IPVS tells nobody of changes."""

    def settings(self) -> Sequence[Setting]:
        """See `kproxy.modes.base.Mode`."""
        return settings_here(strict_arp=self._ipvs.strict_arp)

    def prepare(self) -> None:
        """See `kproxy.modes.base.Mode`."""
        for setting in sysctl.apply(self.settings()):
            log.info("set", file=f"/{setting.path}", value=setting.value)
        timeouts = (self._ipvs.tcp_timeout, self._ipvs.tcp_fin_timeout, self._ipvs.udp_timeout)
        self.kernel.set_timeouts(*(int(timeout.seconds) for timeout in timeouts))

    def close(self) -> None:
        """See `kproxy.modes.base.Mode`."""
        self.kernel.close()


def _readings(kernel: IpvsKernel, owner: Owner) -> Iterator[Reading]:
    """New connections, as IPVS counts them."""
    for key, connections in kernel.connections().items():
        frontend = Frontend(key.family, key.address, key.protocol, key.port)
        if owner(frontend) is None:  # then it may be a node port, on one of the node's addresses
            frontend = frontend._replace(address="")
        service_port = owner(frontend)
        if service_port is None:
            continue
        match key:
            case RealServerKey(endpoint_address=address, endpoint_port=port):
                yield Reading(service_port, Endpoint(address, port), key, connections)
            case VirtualServerKey():
                yield Reading(service_port, frontend, key, connections)


class _Measured(Observer):
    def __init__(self, families: Sequence[Family], metrics: IptablesMetrics) -> None:
        self._families = families
        self._metrics = metrics

    def sync_failed(self, error: Exception, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        if isinstance(error, ApplyError):
            for family in self._families:
                self._metrics.failures.labels(family.name).inc()


class Drained(Observer):
    """Deletes real servers that are done with their connections, in a thread of its own."""

    def __init__(self, kernel: IpvsKernel) -> None:
        self._kernel = kernel
        self._synced = threading.Event()
        threading.Thread(target=self._run, name="drain", daemon=True).start()

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        """See `kproxy.proxy.Observer`."""
        self._synced.set()  # also without changes: what an earlier process left draining is found by reading

    def _run(self) -> None:
        while True:
            self._synced.wait(self._kernel.due())
            self._synced.clear()
            if self._kernel.due() == 0:
                try:
                    if done := self._kernel.drain():
                        log.info("deleted real servers that had been draining", servers=done)
                except OSError as error:
                    log.warning("real servers that drain cannot be looked at; trying again", error=str(error))
