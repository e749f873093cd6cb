"""New connections per Service and per endpoint, read from the kernel's own counters at each scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import structlog
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kproxy.metrics.families import FAMILY
from kproxy.model import Endpoint, Family, Frontend, ServicePortName, join_host_port

log = structlog.get_logger(__name__)

_SERVICE_LABELS = ("namespace", "service", "port", "protocol", FAMILY)


class Reading(NamedTuple):
    """One counter as it stands in the kernel.

    `element` identifies the counter itself: several may count for one frontend or endpoint, and each starts again at
    zero when the kernel replaces it. `packets` are first packets of connections.
    """

    service_port: ServicePortName
    at: Frontend | Endpoint
    element: Hashable
    packets: int


class ConnectionCounters(Collector):
    """`kproxy_service_connections_total` and `kproxy_endpoint_connections_total`.

    `read` is called once a scrape; if it raises OSError, the last known figures are given again. At most `limit`
    Service series and as many endpoint series exist; what is beyond is summed in one series of each family.
    """

    def __init__(self, registry: CollectorRegistry, read: Callable[[], Iterable[Reading]], limit: int) -> None:
        self._read = read
        self._services = _Totals(limit)
        self._endpoints = _Totals(limit)
        self._lock = threading.Lock()
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Read the counters and bring the totals forward."""
        with self._lock:
            try:
                self._update()
            except OSError as error:
                log.warning("cannot read the connection counters, giving the last ones", error=str(error))
            yield self._services.family(
                "kproxy_service_connections",
                "New connections to a frontend of a Service",
                (*_SERVICE_LABELS, "frontend"),
            )
            yield self._endpoints.family(
                "kproxy_endpoint_connections",
                "New connections given to an endpoint of a Service",
                (*_SERVICE_LABELS, "endpoint"),
            )
            folded = GaugeMetricFamily(
                "kproxy_folded_connection_counters",
                "Counters beyond the limit of series, summed under service=(other)",
                labels=["object"],
            )
            folded.add_metric(["service"], self._services.folded)
            folded.add_metric(["endpoint"], self._endpoints.folded)
            yield folded

    def _update(self) -> None:
        readings = list(self._read())  # complete, or no total moves
        self._services.begin()
        self._endpoints.begin()
        for reading in readings:
            match reading.at:
                case Frontend(family=family, address=address, port=port):
                    where = join_host_port(address, port) if address else f":{port}"
                    self._services.add(_labels(reading, family, where), reading)
                case endpoint:
                    labels = _labels(reading, Family.of(endpoint.address), str(endpoint))
                    self._endpoints.add(labels, reading)
        self._services.end()
        self._endpoints.end()


_Labels = tuple[str, ...]


def _labels(reading: Reading, family: Family, where: str) -> _Labels:
    name = reading.service_port
    return (name.namespace, name.name, name.port, name.protocol.value, family.name, where)


class _Totals:
    """Running totals by series that outlive the kernel counters they are fed from."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._totals: dict[_Labels, int] = {}
        self._seen: dict[tuple[_Labels, Hashable], int] = {}  # the last value of each counter
        self._seen_now: dict[tuple[_Labels, Hashable], int] = {}
        self._present: set[_Labels] = set()
        self._other = 0
        self._other_seen = 0
        self._other_seen_now = 0
        self.folded = 0

    def begin(self) -> None:
        self._seen_now = {}
        self._present = set()
        self._other_seen_now = self.folded = 0

    def add(self, labels: _Labels, reading: Reading) -> None:
        if labels not in self._totals:
            if len(self._totals) >= self._limit:
                self.folded += 1
                self._other_seen_now += reading.packets
                return
            self._totals[labels] = 0
        key = labels, reading.element
        before = self._seen.get(key, 0)
        # Less than before: the counter was replaced by a new one.
        self._totals[labels] += reading.packets - (before if reading.packets >= before else 0)
        self._seen_now[key] = reading.packets
        self._present.add(labels)

    def end(self) -> None:
        self._seen = self._seen_now
        for labels in self._totals.keys() - self._present:
            del self._totals[labels]
        # Of the rest only the sum is remembered: it may miss some where counters were replaced, but never falls.
        self._other += max(0, self._other_seen_now - self._other_seen)
        self._other_seen = self._other_seen_now

    def family(self, name: str, help_text: str, labels: _Labels) -> Metric:
        family = CounterMetricFamily(name, help_text, labels=labels)
        for values, total in self._totals.items():
            family.add_metric(values, total)
        if self.folded or self._other:
            family.add_metric(["", "(other)", *[""] * (len(labels) - 2)], self._other)
        return family
