"""The iptables mode on this machine, in the variant of iptables that it uses."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kproxy.cluster import ClusterState
from kproxy.cluster.size import ClusterSize
from kproxy.config.defaults import mode_settings
from kproxy.config.v1alpha1 import Configuration, ProxyMode
from kproxy.dataplane.base import UnsupportedError, diff
from kproxy.dataplane.iptables import accounting, localhost, variant
from kproxy.dataplane.iptables.dataplane import IptablesDataplane
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.options import INVALID_DROPPED, LOCALHOST_ACCEPTED, Options
from kproxy.dataplane.iptables.watch import LegacyWatch, NftWatch, watch
from kproxy.explain import Explanation, Node, Packet, iptables
from kproxy.metrics.connections import Reading
from kproxy.metrics.families import IptablesMetrics
from kproxy.model import Family, Route
from kproxy.node_addresses import PRIMARY, accepts_ipv4_loopback, node_port_cidrs
from kproxy.proxy import Observer
from kproxy.reconcile import SyncReport
from kproxy.sysctl import Setting, current
from kproxy.traffic import RuleTraffic

log = structlog.get_logger(__name__)

_BE_LIBERAL = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal"
_COUNTERS = (INVALID_DROPPED, LOCALHOST_ACCEPTED)


class Iptables:
    """See `kproxy.modes.base.Mode`. `writes`: make the counters that rules refer to.

    Raises UnsupportedError and OSError.
    """

    def __init__(self, configuration: Configuration, families: Sequence[Family], *, writes: bool) -> None:
        chosen = variant.find(families)
        self._opens_localhost = (
            Family.IPv4 in families
            and configuration.iptables.localhost_node_ports
            and list(configuration.node_port_addresses) != [PRIMARY]
            and accepts_ipv4_loopback(node_port_cidrs(configuration.node_port_addresses, {})[Family.IPv4])
        )
        self.kernel = IptablesKernel(families, chosen, guards_localhost=self._opens_localhost)
        features = self.kernel.probe(makes_tables=writes)
        log.debug("iptables", variant=chosen.value, versions=features.versions)
        self._counters = _counters(make=writes) if features.nfacct else frozenset[str]()
        self.kernel.counters = self._counters
        options = Options(
            random_fully=features.random_fully,
            drop_invalid=not current(_BE_LIBERAL),
            localhost_node_ports=self._opens_localhost,
            counters=self._counters,
        )
        self.dataplane = IptablesDataplane(self.kernel, options)
        self._period = mode_settings(configuration, ProxyMode.IPTABLES).sync_period.seconds
        self._sized: list[Observer] = []
        try:
            strangers = variant.ours(chosen.other, families)
        except UnsupportedError as error:
            log.warning("whether the other variant of iptables holds rules of ours cannot be told", reason=str(error))
            strangers = []
        if strangers:
            log.warning(
                "the other variant of iptables holds rules of a kube-proxy or kproxy, too: packets meet both;"
                " remove them with kproxy --cleanup while neither runs",
                variant=chosen.other.value,
                used=chosen.value,
                chains=len(strangers),
            )

    def open_localhost(self) -> None:
        """Do what node ports on localhost take beside their own rules, if wanted. Raises ApplyError and OSError."""
        if self._opens_localhost:
            wanted = localhost.GUARDED | {localhost.ROUTE_LOCALNET: 1}
            there = self.kernel.read()
            self.kernel.apply(diff(wanted, {key: there[key] for key in wanted if key in there}))

    def large_families(self, state: ClusterState) -> Callable[[], frozenset[Family]]:
        """See `kproxy.modes.base.Mode`."""
        size = ClusterSize(state)
        self._sized.append(_Sized(size))
        return size.large_families

    def observers(self, registry: CollectorRegistry) -> Sequence[Observer]:
        """See `kproxy.modes.base.Mode`."""
        if self._counters:
            _Accounting(registry, self._counters)
        return [*self._sized, _Measured(self.kernel, IptablesMetrics(registry))]

    def readings(self, state: ClusterState) -> Callable[[], Iterable[Reading]]:
        """See `kproxy.modes.base.Mode`."""
        return RuleTraffic(self.kernel.variant, self.kernel.families, state.owner).readings

    def explain(self, packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
        """See `kproxy.modes.base.Mode`."""
        return iptables.explain(packet, routes, node, localhost_node_ports=self._opens_localhost)

    def is_exposed(self) -> bool:
        """See `kproxy.modes.base.Mode`. Not before the first sync, which reads everything anyhow."""
        return self.kernel.has_read

    def watch(self) -> NftWatch | LegacyWatch:
        """See `kproxy.modes.base.Mode`."""
        return watch(self.kernel, self._period)

    def settings(self) -> Sequence[Setting]:
        """See `kproxy.modes.base.Mode`. There are none."""
        return ()

    def prepare(self) -> None:
        """See `kproxy.modes.base.Mode`. There is nothing to do."""

    def close(self) -> None:
        """See `kproxy.modes.base.Mode`. There is nothing to let go of."""


def _counters(*, make: bool) -> frozenset[str]:
    """The counters that rules may refer to: those that exist, or would be made."""
    if make:
        return accounting.ensure_counters(_COUNTERS)
    return frozenset(_COUNTERS) if accounting.is_supported() else frozenset()


class _Sized(Observer):
    """Has the node's facts taken anew when the cluster has become large, or is no longer."""

    def __init__(self, size: ClusterSize) -> None:
        self._size = size
        self._large: frozenset[Family] = frozenset()

    def events_taken(self, state: ClusterState) -> None:
        before, self._large = self._large, self._size.large_families()
        state.facts_changed |= before != self._large


class _Measured(Observer):
    def __init__(self, kernel: IptablesKernel, metrics: IptablesMetrics) -> None:
        self._kernel = kernel
        self._metrics = metrics
        self._refused: Count[Family] = Count()
        self._refused_parts: Count[Family] = Count()

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        for (family, table), count in self._kernel.rules.items():
            if table in ("filter", "nat"):
                self._metrics.rules.labels(table, family.name).set(count)
                self._metrics.written.labels(table, family.name).set(self._kernel.written[family, table])
        self._count_failures()

    def sync_failed(self, error: Exception, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        self._count_failures()

    def _count_failures(self) -> None:
        kernel, metrics = self._kernel, self._metrics
        for family in kernel.families:
            metrics.failures.labels(family.name).inc(kernel.refused[family] - self._refused[family])
            if parts := kernel.refused_parts[family] - self._refused_parts[family]:
                metrics.partial_failures.labels(family.name).inc(parts)
        self._refused, self._refused_parts = kernel.refused.copy(), kernel.refused_parts.copy()


class _Accounting(Collector):
    """kube-proxy's metrics of what rules count outside of themselves."""

    def __init__(self, registry: CollectorRegistry, counters: frozenset[str]) -> None:
        self._counters = counters
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        packets = accounting.packets()
        for counter, name, text in (
            (INVALID_DROPPED, "ct_state_invalid_dropped", "Packets dropped because conntrack finds them invalid"),
            (LOCALHOST_ACCEPTED, "localhost_nodeports_accepted", "First packets to node ports on localhost"),
        ):
            if counter in self._counters and counter in packets:
                family = CounterMetricFamily(f"kubeproxy_iptables_{name}_packets", f"[ALPHA] {text}")
                family.add_metric([], packets[counter])
                yield family
