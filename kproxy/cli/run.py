"""Runs the proxy until a signal ends it."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from kproxy import __version__, events, logs
from kproxy.api.objects import KINDS, Node, ObjectMeta
from kproxy.cli import actions
from kproxy.cli.assembly import Machine, api_connection, machine, source
from kproxy.cli.invocation import Invocation
from kproxy.cli.reload import ConfigurationFile
from kproxy.cli.signals import SIGNALS, hold_back, wake_by_signals
from kproxy.config.defaults import ModeSettings, advice, mode_settings
from kproxy.config.feature_gates import FEATURE_GATES, Stage
from kproxy.config.v1alpha1 import ProxyMode, to_v1alpha1
from kproxy.config.validation import KUBERNETES_VERSION
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.events import EventRecorder
from kproxy.guard import Guarded
from kproxy.health.proxy import ProxyHealth, probe_handler
from kproxy.health.services import ServiceHealthChecks
from kproxy.http.address import ListenAddress
from kproxy.http.message import Handler
from kproxy.http.server import HttpServer
from kproxy.metrics.connections import ConnectionCounters
from kproxy.metrics.families import OwnMetrics, ProxyMetrics, Registry, StateAge, register_process
from kproxy.metrics.server import metrics_handler
from kproxy.model import Family, ServiceName
from kproxy.modes.remains import Succession
from kproxy.node_addresses import AddressMonitor
from kproxy.observers import Announced, Cleaned, HealthChecked, Healthy, Logged, Measured
from kproxy.proxy import Observer, Pace, Proxy, StartError
from kproxy.reconcile import SyncReport
from kproxy.sysctl import set_oom_score_adjustment

if TYPE_CHECKING:
    from kproxy.api.client import Connection

log = structlog.get_logger(__name__)


class _Addresses:
    """The node's addresses, followed as they change."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._monitor = AddressMonitor(self._on_change, exclude=DEVICE)
        self._now = self._monitor.start()

    def __call__(self) -> frozenset[str]:
        return self._now

    def _on_change(self, addresses: frozenset[str]) -> None:
        self._now = addresses
        self.changed()


def run(invocation: Invocation, argv: Sequence[str]) -> int:
    """Run the proxy. Returns when a signal ends it, with the exit code that the signal would have given.

    When the configuration file changes, the process starts itself anew instead, with the same command line.

    Rules stay in the kernel. Raises what ends a start: UnsupportedError, ConfigError, SysctlError, StartError …
    """
    set_oom_score_adjustment(invocation.configuration.oom_score_adj)
    registry = Registry()
    metrics = ProxyMetrics(registry)
    connection = api_connection(invocation, metrics.count_request)  # first: without it nothing is written
    actions.initialise(invocation.configuration)
    addresses = _Addresses()
    parts = machine(invocation, writes=True, addresses=addresses)
    for line in advice(parts.configuration, parts.mode):
        log.warning(line)
    log.info("starting", version=__version__, mode=parts.mode.value, node=parts.state.node_name)
    return _Running(invocation, argv, parts, addresses, connection, registry, metrics).run()


def _pace(settings: ModeSettings, mode: ProxyMode) -> Pace:
    pace = Pace(settings.min_sync_period.seconds, settings.sync_period.seconds)
    # IPVS tells nobody of changes.
    return msgspec.structs.replace(pace, verify=pace.retry) if mode is ProxyMode.IPVS else pace


class _Thrifty(Observer):
    """Spares the cycle collector what lives as long as the process: millions of objects without cycles."""

    def __init__(self) -> None:
        gc.set_threshold(50_000, 50, 1000)  # while everything is read for the first time
        self._settled = False

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        if not self._settled:
            self._settled = True
            gc.freeze()
            gc.set_threshold(5_000, 20, 100)


class _Running:
    def __init__(
        self,
        invocation: Invocation,
        argv: Sequence[str],
        parts: Machine,
        addresses: _Addresses,
        connection: Connection | None,
        registry: Registry,
        metrics: ProxyMetrics,
    ) -> None:
        self._invocation = invocation
        self._file = ConfigurationFile(argv, invocation, self._restart, self._reject)
        self._restarts = False
        self._parts = parts
        self._addresses = addresses
        self._configuration = parts.configuration
        self._server = HttpServer()
        self._registry = registry
        self._metrics = metrics
        self._source = source(invocation, connection)
        self._own = OwnMetrics(self._registry)
        self._fatal: str = ""
        settings = mode_settings(self._configuration, parts.mode)
        self._health = ProxyHealth(parts.families, settings.sync_period.seconds)
        self._recorder = EventRecorder(
            parts.state.node_name,
            connection.post if connection else None,
            dropped=self._count_dropped,
        )
        self._cleaned = Cleaned(parts.reconciler, addresses, self._metrics)
        self._guarded = Guarded(parts.opened, self._touched)
        self._proxy = Proxy(
            parts.state,
            parts.reconciler,
            facts=parts.facts,
            observers=self._observers(),
            pace=_pace(settings, parts.mode),
        )

    def _observers(self) -> list[Observer]:
        parts = self._parts
        return [
            Logged(),
            Healthy(self._health, parts.families),
            Measured(
                parts.reconciler,
                parts.families,
                proxy=self._metrics,
                own=self._own,
                age=StateAge(self._registry, KINDS),
            ),
            HealthChecked(parts.reconciler, {family: self._service_checks(family) for family in parts.families}),
            Announced(self._recorder, parts.state.node_name),
            self._cleaned,
            self._guarded,
            *parts.opened.observers(self._registry),
            Succession(
                parts.families,
                parts.mode,
                excluded=self._configuration.ipvs.exclude_cidrs,
                drain_seconds=self._invocation.settings.ipvs.drain_timeout.seconds,
                masquerade_mark=1 << mode_settings(self._configuration, parts.mode).masquerade_bit,
            ),
            _Thrifty(),
        ]

    def _service_checks(self, family: Family) -> ServiceHealthChecks:
        def failed(service: ServiceName, port: int, error: OSError) -> None:
            node = self._parts.state.node_name
            log.warning("cannot open health check node port", service=str(service), port=port, error=str(error))
            self._recorder.record(events.service_healthcheck_failed(node, service, port, str(error)))

        return ServiceHealthChecks(
            self._server,
            family,
            lambda: self._parts.reconciler.facts.node_port_addresses.get(family),
            proxy_healthy=lambda: self._health.check().healthy,
            listen_failed=failed,
        )

    def run(self) -> int:
        received: list[int] = []

        wake_by_signals(self._proxy.stop)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: received.append(number))
        self._end_with_any_thread()
        self._serve()
        self._cleaned.start()
        self._guarded.start()
        self._addresses.changed = self._proxy.addresses_changed
        for family in self._parts.families:
            self._health.started(family)
        self._recorder.record(events.starting(self._parts.state.node_name))
        self._file.start()
        self._source.start(self._proxy.post)
        self._proxy.run()
        fatal = self._fatal  # what fails now fails because the end has begun
        self._source.stop()
        self._server.close()
        self._recorder.close(1.0)
        self._parts.opened.close()
        if fatal:
            raise StartError(fatal)
        if self._restarts and not received:
            log.info("the configuration file has changed; starting again")
            atexit._run_exitfuncs()  # the kubernetes package has made files with credentials
            hold_back()
            if not received:
                os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the very command line that started this
        log.info("ended; what is in the kernel stays in force", signal=signal.Signals(received[0]).name)
        return 128 + received[0]

    def _end_with_any_thread(self) -> None:
        """From now on a thread that fails takes all others with it: half a proxy would look healthy."""
        tell = threading.excepthook

        def failed(fault: threading.ExceptHookArgs) -> None:
            tell(fault)
            if fault.exc_type is SystemExit:
                return
            self._fatal = f"the thread {fault.thread.name if fault.thread else ''} has failed"
            self._proxy.stop()

        threading.excepthook = failed

    def _serve(self) -> None:
        """Open the health and metrics addresses; a taken one is tried again, or fatal if so configured."""
        configuration, node = self._configuration, self._parts.state.node_name
        registry = self._registry
        register_process(registry, __version__, KUBERNETES_VERSION)
        for name, gate in FEATURE_GATES.items():
            stage = "" if gate.stage is Stage.STABLE else gate.stage.name
            self._metrics.feature_enabled.labels(name, stage).set(configuration.enabled(name))
        if self._invocation.manifests:  # without an API server nobody says that the node is being drained
            self._health.node_changed(Node(metadata=ObjectMeta(name=node)))
        if self._invocation.settings.service_metrics.enabled:
            limit = self._invocation.settings.service_metrics.limit
            ConnectionCounters(registry, self._parts.opened.readings(self._parts.state), limit)
        metrics = metrics_handler(
            registry,
            self._parts.mode.value,
            to_v1alpha1(configuration),
            set_verbosity=logs.set_verbosity if configuration.enable_profiling else None,
        )
        probes = probe_handler(self._health, self._metrics.count_probe)
        self._listen(configuration.healthz_bind_address, probes, events.proxier_healthcheck_failed)
        self._listen(configuration.metrics_bind_address, metrics, events.metric_server_failed)

    def _listen(self, address: str, handler: Handler, event: Callable[[str, str], events.Event]) -> None:
        if not address:
            return

        def failed(error: OSError) -> None:
            reason = os.strerror(error.errno) if error.errno else str(error)  # Python adds where in itself it was
            log.error("cannot listen", address=address, error=reason)
            if self._configuration.bind_address_hard_fail:
                self._recorder.record(event(self._parts.state.node_name, f"{address}: {reason}"))
                self._fatal = f"cannot listen on {address}: {reason}"
                self._proxy.stop()

        self._server.listen_or_retry(ListenAddress.parse(address), handler, failed)

    def _restart(self) -> None:
        self._restarts = True
        self._proxy.stop()

    def _reject(self, rejected: bool) -> None:
        self._own.configuration_rejected.set(rejected)

    def _touched(self, who: str) -> None:
        log.warning("our part of the kernel was changed by someone else; comparing", by=who)
        self._proxy.kernel_touched()

    def _count_dropped(self, reason: str) -> None:
        self._own.events_dropped.labels(reason).inc()
