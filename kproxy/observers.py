"""Who follows the proxy's syncs: health, metrics, service health checks, conntrack and Events.

Their methods are those of `kproxy.proxy.Observer`, where they are explained.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from kproxy import events
from kproxy.api.objects import Kind, Node
from kproxy.cluster import ClusterState
from kproxy.conntrack import Conntrack, ConntrackError, UDPService
from kproxy.dataplane.base import Key
from kproxy.events import EventRecorder
from kproxy.health.proxy import ProxyHealth
from kproxy.health.services import ServiceHealthChecks
from kproxy.metrics.families import OwnMetrics, ProxyMetrics, StateAge
from kproxy.model import Family, ServiceName
from kproxy.node_addresses import matching
from kproxy.proxy import Observer
from kproxy.reconcile import Reconciler, SyncReport

log = structlog.get_logger(__name__)

CONNTRACK_RETRY_SECONDS = 30.0


class Logged(Observer):
    """Says what syncs did: the first full one, and those that found something to do, at info, the rest at debug."""

    def __init__(self) -> None:
        self._began = False
        self._stuck: frozenset[Key] = frozenset()

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        say = log.info if report.full and (report.changes or not self._began) else log.debug
        self._began = True
        say(
            "compared everything with the kernel" if report.full else "synced",
            services=len(report.services),
            changes=report.changes.total(),
            milliseconds=round(seconds * 1000, 1),
        )
        if report.drift:
            log.warning(
                "repaired what someone else had changed in the kernel"
                if report.changes
                else "someone else has changed the kernel to what it should hold; is another kproxy running?",
                **{_FOUND[change]: count for change, count in report.drift.items()},
            )
        for key, reason in report.stuck.items():
            if key not in self._stuck:
                log.warning("the kernel keeps what is no longer used; does somebody else refer to it?", reason=reason)
        if report.full:
            self._stuck = frozenset(report.stuck)
        for service, reason in report.quarantined.items():
            log.error("the kernel refuses this Service; others are not affected", service=str(service), reason=reason)


class Healthy(Observer):
    """Feeds `/healthz`, `/livez` and `/readyz`."""

    def __init__(self, health: ProxyHealth, families: Sequence[Family]) -> None:
        self._health = health
        self._families = families

    def sync_wanted(self) -> None:
        for family in self._families:
            self._health.queued(family)

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        for family in self._families:
            self._health.succeeded(family)

    def node_changed(self, node: Node) -> None:
        self._health.node_changed(node)


class HealthChecked(Observer):
    """Opens and closes the health check node ports of Services, and tells them how many endpoints are here."""

    def __init__(self, reconciler: Reconciler, checks: Mapping[Family, ServiceHealthChecks]) -> None:
        self._reconciler = reconciler
        self._checks = checks

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        summaries = self._reconciler.summaries
        for family, checks in self._checks.items():
            counts = {service: dict(summary.ready_here) for service, summary in summaries.items()}
            served = {service: count[family] for service, count in counts.items() if family in count}
            checks.sync_services({service: summaries[service].health_check_port for service in served})
            checks.sync_endpoints(served)


class Measured(Observer):
    """Feeds the metrics."""

    def __init__(
        self,
        reconciler: Reconciler,
        families: Sequence[Family],
        *,
        proxy: ProxyMetrics,
        own: OwnMetrics,
        age: StateAge,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._reconciler = reconciler
        self._families = families
        self._proxy = proxy
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
            families = {port.family for port in state.service_ports(service)}
            # Taken also where nothing is served: slices without a Service would gather them for ever.
            for triggered in state.trigger_times.pop(service, ()):
                for family in families:
                    self._proxy.observe_network_programming(family, now - triggered)

    def sync_failed(self, error: Exception, seconds: float) -> None:
        for family in self._families:
            self._proxy.sync_duration.labels(family.name).observe(seconds)

    def alive(self, kind: Kind) -> None:
        self._age.alive(kind)


_FOUND: Mapping[str, str] = {"add": "missing", "change": "changed", "remove": "foreign"}


class Announced(Observer):
    """Writes Events about what an administrator should know."""

    def __init__(self, recorder: EventRecorder, node: str) -> None:
        self._recorder = recorder
        self._node = node

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        for service, reason in report.quarantined.items():
            self._recorder.record(events.service_quarantined(self._node, service, reason))
        if report.drift:
            found = ", ".join(f"{count} {_FOUND[change]}" for change, count in sorted(report.drift.items()))
            self._recorder.record(events.drift_repaired(self._node, f"{found} entries"))


class Cleaned(Observer):
    """Deletes UDP conntrack entries that contradict the services, in a thread of its own: a table can be large."""

    def __init__(
        self,
        reconciler: Reconciler,
        addresses: Callable[[], frozenset[str]],
        metrics: ProxyMetrics | None,
        retry_seconds: float = CONNTRACK_RETRY_SECONDS,
    ) -> None:
        self._reconciler = reconciler
        self._addresses = addresses
        self._metrics = metrics
        self._retry_seconds = retry_seconds
        self._conntracks = {family: Conntrack() for family in reconciler.facts.families}
        self._udp: frozenset[ServiceName] = frozenset()
        self._wake = threading.Condition()  # guards the next one
        self._wanted: _Wanted | None = None

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        udp = self._reconciler.state.udp_services
        touched = any(service in udp or service in self._udp for service in report.services)
        if touched:
            self._udp = frozenset(udp)
            wanted = _Wanted(self._udp_services(), self._node_port_addresses())
            with self._wake:
                self._wanted = wanted
                self._wake.notify()

    def _udp_services(self) -> dict[Family, list[UDPService]]:
        state = self._reconciler.state
        services: dict[Family, list[UDPService]] = {family: [] for family in self._conntracks}
        for service in state.udp_services:
            for port in state.service_ports(service):
                frontends = tuple(frontend for _, frontend in state.frontends(port))
                services[port.family].append(UDPService(frontends, tuple(state.endpoints(port))))
        return services

    def _node_port_addresses(self) -> tuple[str, ...]:
        facts = self._reconciler.facts
        addresses = self._addresses()
        chosen = ((family, facts.node_port_addresses.get(family)) for family in facts.families)
        return tuple(
            a for family, those in chosen for a in (matching(addresses, family, None) if those is None else those)
        )

    def start(self) -> None:
        """Begin to clean after syncs."""
        threading.Thread(target=self._run, name="conntrack", daemon=True).start()

    def clean_now(self) -> None:
        """Clean what the last sync asked for, in the calling thread. Raises ConntrackError."""
        if self._wanted is not None:
            self._clean(self._wanted)
            self._wanted = None

    def _run(self) -> None:
        failed: _Wanted | None = None
        while True:
            with self._wake:
                if self._wanted is None:
                    self._wake.wait(None if failed is None else self._retry_seconds)
                wanted, self._wanted = self._wanted or failed, None
            if wanted is None:
                continue
            try:
                self._clean(wanted)
                failed = None
            except ConntrackError as error:
                failed = wanted
                log.warning("conntrack clean-up failed", error=str(error), retry_in_seconds=self._retry_seconds)

    def _clean(self, wanted: _Wanted) -> None:
        for family, services in wanted.services.items():
            started = time.monotonic()
            deleted = 0
            try:
                deleted = self._conntracks[family].reconcile(services, wanted.node_addresses)
            except ConntrackError as error:
                deleted = error.deleted
                raise
            finally:
                if self._metrics:
                    self._metrics.conntrack_duration.labels(family.name).observe(time.monotonic() - started)
                    self._metrics.conntrack_deleted.labels(family.name).inc(deleted)
            if deleted:
                log.info("deleted stale UDP conntrack entries", family=family.name, entries=deleted)


class _Wanted(NamedTuple):
    services: dict[Family, list[UDPService]]
    node_addresses: tuple[str, ...]
