"""Every metric family that does not belong to one mode alone, under kube-proxy's names (reference: 7.1), and our own.

A mode adds its own families to the registry it is given, one line each:

    failures = Counter("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "…", [FAMILY], registry=registry)
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kproxy.model import Family

FAMILY = "ip_family"  # label; the values are those of `Family.name`
SYNC_BUCKETS = tuple(0.001 * 2**k for k in range(15))
PROGRAMMING_BUCKETS = (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
REST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)


class Registry(CollectorRegistry):
    """A registry that exposes what Go's does: no family without samples, no creation times as series."""

    def collect(self) -> Iterable[Metric]:
        """All families that have samples."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            if family.samples:
                yield family


class ProxyMetrics:
    """kube-proxy's metrics of all modes. A combination of labels appears once it has been used."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "kubeproxy_sync_proxy_rules"
        self.sync_duration = Histogram(
            f"{prefix}_duration_seconds",
            "[ALPHA] Duration of a sync",
            [FAMILY],
            buckets=SYNC_BUCKETS,
            registry=registry,
        )
        self.full_sync_duration = Histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "[ALPHA] Duration of a sync of everything",
            [FAMILY],
            buckets=SYNC_BUCKETS,
            registry=registry,
        )
        self.partial_sync_duration = Histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "[ALPHA] Duration of a sync of what had changed",
            [FAMILY],
            buckets=SYNC_BUCKETS,
            registry=registry,
        )
        self.last_sync = Gauge(
            f"{prefix}_last_timestamp_seconds",
            "[ALPHA] When a sync last succeeded, seconds since 1970",
            [FAMILY],
            registry=registry,
        )
        self.last_queued = Gauge(
            f"{prefix}_last_queued_timestamp_seconds",
            "[ALPHA] When a sync was last requested, seconds since 1970",
            [FAMILY],
            registry=registry,
        )
        self.network_programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "[ALPHA] Time from a change of endpoints in the cluster to the end of the sync that wrote it",
            [FAMILY],
            buckets=PROGRAMMING_BUCKETS,
            registry=registry,
        )
        self.endpoint_changes_pending = Gauge(
            f"{prefix}_endpoint_changes_pending",
            "[ALPHA] EndpointSlice changes that wait for a sync",
            registry=registry,
        )
        self.endpoint_changes = Counter(
            f"{prefix}_endpoint_changes_total",
            "[ALPHA] EndpointSlice changes received",
            registry=registry,
        )
        self.service_changes_pending = Gauge(
            f"{prefix}_service_changes_pending",
            "[ALPHA] Services with changes that wait for a sync",
            registry=registry,
        )
        self.service_changes = Counter(
            f"{prefix}_service_changes_total",
            "[ALPHA] Service changes received",
            registry=registry,
        )
        self.no_local_endpoints = Gauge(
            f"{prefix}_no_local_endpoints_total",
            "[ALPHA] Service ports with a Local traffic policy that have endpoints, but none on this node",
            ["traffic_policy", FAMILY],
            registry=registry,
        )
        self.conntrack_duration = Histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "[ALPHA] Duration of a search for stale conntrack entries",
            [FAMILY],
            buckets=SYNC_BUCKETS,
            registry=registry,
        )
        self.conntrack_deleted = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total",
            "[ALPHA] Stale conntrack entries deleted",
            [FAMILY],
            registry=registry,
        )
        self.healthz = Counter(
            "kubeproxy_proxy_healthz_total", "[ALPHA] Answers of /healthz", ["code"], registry=registry
        )
        self.livez = Counter("kubeproxy_proxy_livez_total", "[ALPHA] Answers of /livez", ["code"], registry=registry)
        self.rest_requests = Counter(
            "rest_client_requests_total",
            "[ALPHA] Requests to the API server",
            ["code", "method", "host"],
            registry=registry,
        )
        self.rest_duration = Histogram(
            "rest_client_request_duration_seconds",
            "[ALPHA] Time until the API server's answer began",
            ["verb", "host"],
            buckets=REST_BUCKETS,
            registry=registry,
        )
        self.feature_enabled = Gauge(
            "kubernetes_feature_enabled", "[BETA] State of a feature gate", ["name", "stage"], registry=registry
        )

    def observe_network_programming(self, family: Family, seconds: float) -> None:
        """Record one trigger time's latency. Clocks of nodes differ: what is negative counts as nothing."""
        self.network_programming.labels(family.name).observe(max(0.0, seconds))

    def count_request(self, method: str, host: str, code: str, seconds: float) -> None:
        """Count a request to the API server."""
        self.rest_requests.labels(code, method, host).inc()
        self.rest_duration.labels(method, host).observe(seconds)

    def count_probe(self, path: str, status: int) -> None:
        """Count an answer of `/healthz` or `/livez`."""
        (self.healthz if path == "/healthz" else self.livez).labels(str(status)).inc()


class NftablesMetrics:
    """kube-proxy's metrics of the nftables mode."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sync_failures = Counter(
            "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
            "[ALPHA] Transactions that the kernel refused",
            [FAMILY],
            registry=registry,
        )
        self.cleanup_failures = Counter(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
            "[ALPHA] Removals of what is no longer used that the kernel refused",
            [FAMILY],
            registry=registry,
        )


class IptablesMetrics:
    """kube-proxy's metrics of the iptables mode; the failures are those of ipvs mode, too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "kubeproxy_sync_proxy_rules_iptables"
        self.failures = Counter(
            f"{prefix}_restore_failures_total",
            "[ALPHA] Writes that iptables or the kernel refused",
            [FAMILY],
            registry=registry,
        )
        self.partial_failures = Counter(
            f"{prefix}_partial_restore_failures_total",
            "[ALPHA] Of them, those of what had changed only",
            [FAMILY],
            registry=registry,
        )
        self.rules = Gauge(f"{prefix}_total", "[ALPHA] Rules that are ours", ["table", FAMILY], registry=registry)
        self.written = Gauge(
            f"{prefix}_last", "[ALPHA] Rules written by the last sync", ["table", FAMILY], registry=registry
        )


class OwnMetrics:
    """What kube-proxy does not have. See docs/metrics.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.changes = Counter(
            "kproxy_sync_changes_total",
            "Entries written to the kernel or removed from it",
            ["change"],
            registry=registry,
        )
        self.drift = Counter(
            "kproxy_drift_detected_total",
            "Entries found in the kernel other than they were written, and repaired",
            ["found"],
            registry=registry,
        )
        # From zero on, so that already the first one shows as an increase.
        for change in ("add", "change", "remove"):
            self.changes.labels(change)
        for found in ("missing", "changed", "foreign"):
            self.drift.labels(found)
        self.quarantined = Gauge(
            "kproxy_quarantined_services",
            "Services left out because the kernel refuses what they ask for",
            registry=registry,
        )
        self.configuration_rejected = Gauge(
            "kproxy_configuration_rejected",
            "1 while the configuration file says what cannot be used, and what it said before is in force",
            registry=registry,
        )
        self.events_dropped = Counter(
            "kproxy_events_dropped_total",
            "Kubernetes Events that were not delivered",
            ["reason"],
            registry=registry,
        )


class StateAge(Collector):
    """`kproxy_state_age_seconds`: how long ago each kind of object was last known to be current.

    A kind that has never been current is as old as this object. `alive` may be called from any thread.
    """

    def __init__(
        self, registry: CollectorRegistry, kinds: Iterable[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._current = dict.fromkeys(kinds, clock())
        registry.register(self)

    def alive(self, kind: str) -> None:
        """The kind is current now."""
        self._current[kind] = self._clock()

    def collect(self) -> Iterable[Metric]:
        """One gauge with a sample a kind."""
        now = self._clock()
        family = GaugeMetricFamily(
            "kproxy_state_age_seconds",
            "Time since this kind of object was last known to be current",
            labels=["kind"],
        )
        for kind, current in self._current.copy().items():
            family.add_metric([kind], now - current)
        yield family


def register_process(registry: CollectorRegistry, version: str, kubernetes_version: str) -> None:
    """Add what describes the process: its versions, resources and garbage collection.

    `kubernetes_version` (`v1.36.2`) is the release whose behaviour is kept; version alerts compare it between nodes.
    """
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    python = platform.python_version()
    major, minor = kubernetes_version.removeprefix("v").split(".")[:2]
    Gauge(
        "kproxy_build_info",
        "Versions of the program, always 1",
        ["version", "python_version", "kubernetes"],
        registry=registry,
    ).labels(version, python, kubernetes_version).set(1)
    labels = {
        "major": major,
        "minor": minor,
        "git_version": kubernetes_version,
        "git_commit": "",
        "git_tree_state": "",
        "build_date": "",
        "go_version": "",
        "compiler": platform.python_implementation(),
        "platform": f"linux/{platform.machine()}",
    }
    Gauge(
        "kubernetes_build_info",
        "[ALPHA] The Kubernetes release whose behaviour is kept, always 1",
        list(labels),
        registry=registry,
    ).labels(**labels).set(1)
