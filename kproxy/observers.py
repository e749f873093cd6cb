"""Who follows the proxy's syncs: health, metrics, service health checks, conntrack and Events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from kproxy import events
from kproxy.api.objects import Kind, Node
from kproxy.cluster import ClusterState
from kproxy.conntrack import Conntrack, ConntrackError, UDPService
from kproxy.dataplane.base import ApplyError
from kproxy.events import EventRecorder
from kproxy.health.proxy import ProxyHealth
from kproxy.health.services import ServiceHealthChecks
from kproxy.metrics.families import NftablesMetrics, OwnMetrics, ProxyMetrics, StateAge
from kproxy.model import Family, ServiceName
from kproxy.reconcile import Reconciler, SyncReport

log = structlog.get_logger(__name__)

CONNTRACK_RETRY_SECONDS = 30.0


class Quiet:
    """An observer that does nothing; the others say only what concerns them."""

    def events_taken(self, state: ClusterState) -> None:
        """See `kproxy.proxy.Observer`."""

    def sync_wanted(self) -> None:
        """See `kproxy.proxy.Observer`."""

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        """See `kproxy.proxy.Observer`."""

    def sync_failed(self, error: Exception, seconds: float) -> None:
        """See `kproxy.proxy.Observer`."""

    def node_changed(self, node: Node) -> None:
        """See `kproxy.proxy.Observer`."""

    def alive(self, kind: Kind) -> None:
        """See `kproxy.proxy.Observer`."""


class Logged(Quiet):
    """Says what syncs did: everything at info for a full one, the rest at debug."""

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        say = log.info if report.full else log.debug
        say(
            "compared everything with the kernel" if report.full else "synced",
            services=len(report.services),
            changes=report.changes.total(),
            milliseconds=round(seconds * 1000, 1),
        )
        if report.drift:
            log.warning("repaired what someone else had changed in the kernel", **report.drift)
        for service, reason in report.quarantined.items():
            log.error("the kernel refuses this Service; others are not affected", service=str(service), reason=reason)


class Healthy(Quiet):
    """Feeds `/healthz`, `/livez` and `/readyz`."""

    def __init__(self, health: ProxyHealth, families: Sequence[Family]) -> None:
        self._health = health
        self._families = families

    def sync_wanted(self) -> None:
        for family in self._families:
            self._health.queued(family)

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        for family in self._families:
            self._health.succeeded(family)

    def node_changed(self, node: Node) -> None:
        self._health.node_changed(node)


class HealthChecked(Quiet):
    """Opens and closes the health check node ports of Services, and tells them how many endpoints are here."""

    def __init__(self, reconciler: Reconciler, checks: Sequence[ServiceHealthChecks]) -> None:
        self._reconciler = reconciler
        self._checks = checks

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        summaries = {s: summary for s, summary in self._reconciler.summaries.items() if summary.health_check_port}
        for checks in self._checks:
            checks.sync_services({service: summary.health_check_port for service, summary in summaries.items()})
            checks.sync_endpoints({service: summary.local_ready for service, summary in summaries.items()})


class Measured(Quiet):
    """Feeds the metrics."""

    def __init__(
        self,
        reconciler: Reconciler,
        families: Sequence[Family],
        *,
        proxy: ProxyMetrics,
        nftables: NftablesMetrics,
        own: OwnMetrics,
        age: StateAge,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reconciler = reconciler
        self._families = families
        self._proxy = proxy
        self._nftables = nftables
        self._own = own
        self._age = age
        self._now = now
        self._service_events = self._slice_events = 0

    def events_taken(self, state: ClusterState) -> None:
        self._proxy.service_changes.inc(state.service_events - self._service_events)
        self._proxy.endpoint_changes.inc(state.slice_events - self._slice_events)
        self._service_events, self._slice_events = state.service_events, state.slice_events
        self._pending(state)

    def _pending(self, state: ClusterState) -> None:
        self._proxy.service_changes_pending.set(len(state.changed_services))
        self._proxy.endpoint_changes_pending.set(len(state.changed_slices))

    def sync_wanted(self) -> None:
        for family in self._families:
            self._proxy.last_queued.labels(family.name).set(self._now())

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        now = self._now()
        duration = self._proxy.full_sync_duration if report.full else self._proxy.partial_sync_duration
        for family in self._families:
            self._proxy.sync_duration.labels(family.name).observe(seconds)
            duration.labels(family.name).observe(seconds)
            self._proxy.last_sync.labels(family.name).set(now)
            for policy in ("internal", "external"):
                count = self._reconciler.no_local[policy, family]
                self._proxy.no_local_endpoints.labels(policy, family.name).set(count)
        for change, count in report.changes.items():
            self._own.changes.labels(change).inc(count)
        for change, count in report.drift.items():
            self._own.drift.labels(_FOUND[change]).inc(count)
        self._own.quarantined.set(len(self._reconciler.quarantine))
        self._network_programming(report, now)
        state = self._reconciler.state
        state.changed_services.clear()
        state.changed_slices.clear()
        self._pending(state)

    def _network_programming(self, report: SyncReport, now: float) -> None:
        state = self._reconciler.state
        if not state.trigger_times:
            return
        for service in report.services:
            for triggered in state.trigger_times.pop(service, ()):
                for family in {port.family for port in state.service_ports(service)}:
                    self._proxy.observe_network_programming(family, now - triggered)

    def sync_failed(self, error: Exception, seconds: float) -> None:
        for family in self._families:
            self._proxy.sync_duration.labels(family.name).observe(seconds)
            if isinstance(error, ApplyError):
                self._nftables.sync_failures.labels(family.name).inc()

    def alive(self, kind: Kind) -> None:
        self._age.alive(kind)


_FOUND: Mapping[str, str] = {"add": "missing", "change": "changed", "remove": "foreign"}


class Announced(Quiet):
    """Writes Events about what an administrator should know."""

    def __init__(self, recorder: EventRecorder, node: str) -> None:
        self._recorder = recorder
        self._node = node

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        for service, reason in report.quarantined.items():
            self._recorder.record(events.service_quarantined(self._node, service, reason))
        if report.drift:
            found = ", ".join(f"{count} {_FOUND[change]}" for change, count in sorted(report.drift.items()))
            self._recorder.record(events.drift_repaired(self._node, f"{found} entries"))


class Cleaned(Quiet):
    """Deletes UDP conntrack entries that contradict the services, in a thread of its own: a table can be large."""

    def __init__(
        self,
        state: ClusterState,
        node_addresses: Callable[[], frozenset[str]],
        metrics: ProxyMetrics | None,
        families: Iterable[Family],
        retry_seconds: float = CONNTRACK_RETRY_SECONDS,
    ) -> None:
        self._state = state
        self._node_addresses = node_addresses
        self._metrics = metrics
        self._families = tuple(families)
        self._retry_seconds = retry_seconds
        self._conntrack = Conntrack()
        self._udp: set[ServiceName] = set()
        self._wake = threading.Condition()
        self._wanted: list[UDPService] | None = None
        self._thread: threading.Thread | None = None

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        udp = self._state.udp_services
        touched = any(service in udp or service in self._udp for service in report.services)
        self._udp = set(udp)
        if touched:
            with self._wake:
                self._wanted = self._udp_services()
                self._wake.notify()

    def _udp_services(self) -> list[UDPService]:
        return [
            UDPService(tuple(f for _, f in self._state.frontends(port)), tuple(self._state.endpoints(port)))
            for service in self._state.udp_services
            for port in self._state.service_ports(service)
        ]

    def start(self) -> None:
        """Begin to clean after syncs."""
        self._thread = threading.Thread(target=self._run, name="conntrack", daemon=True)
        self._thread.start()

    def clean_now(self) -> None:
        """Clean what the last sync asked for, in the calling thread. Raises ConntrackError."""
        if self._wanted is not None:
            self._clean(self._wanted)
            self._wanted = None

    def _run(self) -> None:
        failed: list[UDPService] | None = None
        while True:
            with self._wake:
                if self._wanted is None:
                    self._wake.wait(None if failed is None else self._retry_seconds)
                wanted = failed if self._wanted is None else self._wanted
                self._wanted = None
            if wanted is None:
                continue
            try:
                self._clean(wanted)
                failed = None
            except ConntrackError as error:
                failed = wanted
                log.error("conntrack clean-up failed", error=str(error), retry_in_seconds=self._retry_seconds)

    def _clean(self, services: list[UDPService]) -> None:
        started = time.monotonic()
        deleted = 0
        try:
            deleted = self._conntrack.reconcile(services, self._node_addresses())
        except ConntrackError as error:
            deleted = error.deleted
            raise
        finally:
            if self._metrics:
                for family in self._families:
                    self._metrics.conntrack_duration.labels(family.name).observe(time.monotonic() - started)
                self._metrics.conntrack_deleted.labels(self._families[0].name).inc(deleted)
        if deleted:
            log.info("deleted stale UDP conntrack entries", entries=deleted)
