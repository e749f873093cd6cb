"""Kubernetes Events (events.k8s.io/v1) about the Node and its Services, sent aside so that nothing waits for them.

The Events and their wording are kube-proxy's (reference: 9.5), with two of our own: ServiceQuarantined, DriftRepaired.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Literal

import msgspec
import structlog

from kproxy.model import ServiceName

CONTROLLER = "kube-proxy"
QUEUE_LENGTH = 100
BURST = 25  # Events that may be sent at once, then
REFILL_SECONDS = 12.0  # one more: a thousand nodes with the same trouble must not become the API server's
REPEAT_SECONDS = 600.0  # the same Event again within this time is only counted
REMEMBERED = 1000  # different Events whose repetitions are counted
ATTEMPTS = 3
BACKOFF_SECONDS = 5.0  # before the second attempt; doubled for each further one
NOTE_LENGTH = 1024  # bytes the API accepts

Post = Callable[[str, bytes], int]  # path, JSON body → HTTP status, 0 where no answer came

log = structlog.get_logger(__name__)


class Reference(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The object that an Event is about."""

    kind: str
    name: str
    namespace: str = ""
    uid: str = ""
    api_version: str = ""


class Event(msgspec.Struct, frozen=True):
    """What happened. Two equal ones are one Event that happened twice."""

    regarding: Reference
    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


def starting(node: str) -> Event:
    """The proxy begins to serve."""
    return Event(_node(node), "Normal", "Starting", "StartKubeProxy", "")


def proxier_healthcheck_failed(node: str, error: str) -> Event:
    """The proxy health server could not be bound, and that is to be fatal."""
    return Event(_node(node), "Warning", "FailedToStartProxierHealthcheck", "StartKubeProxy", error)


def metric_server_failed(node: str, error: str) -> Event:
    """The metrics server could not be bound, and that is to be fatal."""
    return Event(_node(node), "Warning", "FailedToStartMetricServer", "StartKubeProxy", error)


def service_healthcheck_failed(node: str, service: ServiceName, port: int, error: str, uid: str = "") -> Event:
    """A Service's health check node port could not be bound."""
    note = f'node {node} failed to start healthcheck "{service}" on port {port}: {error}'
    return Event(_service(service, uid), "Warning", "FailedToStartServiceHealthcheck", "Listen", note)


def service_quarantined(node: str, service: ServiceName, error: str, uid: str = "") -> Event:
    """The kernel refuses what a Service asks for; the others go on without it."""
    note = f"node {node} leaves this Service out until it changes: {error}"
    return Event(_service(service, uid), "Warning", "ServiceQuarantined", "SyncProxyRules", note)


def drift_repaired(node: str, what: str) -> Event:
    """Somebody else had changed the proxy's state in the kernel."""
    return Event(_node(node), "Warning", "DriftRepaired", "SyncProxyRules", what)


def _node(name: str) -> Reference:
    # Its own name stands for the uid, as in the kubelet's Events: `kubectl describe node` looks for that.
    return Reference("Node", name, uid=name)


def _service(service: ServiceName, uid: str) -> Reference:
    return Reference("Service", service.name, service.namespace, uid, "v1")


class EventRecorder:
    """Sends Events from a thread of its own. `record` returns at once and never raises.

    Without `post` (no API server) Events are logged. `dropped` is told, from any thread, why an Event is not delivered:
    "repeated" (it is counted in the next one that is sent), "rate", "queue", "refused", "unreachable".
    """

    def __init__(
        self,
        node: str,
        post: Post | None,
        *,
        dropped: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._instance = f"{CONTROLLER}-{node}"[:128]
        self._dropped = dropped
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._lock = threading.Lock()
        self._series: OrderedDict[Event, _Series] = OrderedDict()
        self._tokens = float(BURST)
        self._refilled = clock()
        self._stamp = 0
        self._queue: queue.Queue[_Occurrence | None] = queue.Queue(QUEUE_LENGTH)
        self._thread: threading.Thread | None = None
        if post:
            self._thread = threading.Thread(target=self._run, args=(post,), name="events", daemon=True)
            self._thread.start()

    def record(self, event: Event) -> None:
        """Send the Event soon, or count it if it was sent lately."""
        with self._lock:
            occurrence, refusal = self._admit(event)
        if occurrence is None:
            self._dropped(refusal)
        elif self._thread is None:
            about = "/".join(filter(None, (event.regarding.namespace, event.regarding.name)))
            log.info("event", reason=event.reason, object=f"{event.regarding.kind} {about}", note=event.note)
        else:
            try:
                self._queue.put_nowait(occurrence)
            except queue.Full:
                self._dropped("queue")

    def close(self, patience: float) -> None:
        """Send what is queued and end the thread, but give up after `patience` seconds."""
        if self._thread:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return  # the API server does not answer; the thread ends with the process
            self._thread.join(patience)

    def _admit(self, event: Event) -> tuple[_Occurrence | None, str]:
        """The occurrence to be sent, or the reason why there is none."""
        now = self._clock()
        series = self._series.get(event)
        if series and now - series.sent < REPEAT_SECONDS:
            series.repeated += 1
            return None, "repeated"
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) / REFILL_SECONDS)
        self._refilled = now
        if self._tokens < 1:
            return None, "rate"
        self._tokens -= 1
        self._series[event] = _Series(now)
        self._series.move_to_end(event)
        if len(self._series) > REMEMBERED:
            self._series.popitem(last=False)
        self._stamp = max(self._now(), self._stamp + 1)  # part of the name, so never twice
        return _Occurrence(event, 1 + (series.repeated if series else 0), self._stamp), ""

    def _run(self, post: Post) -> None:
        while (occurrence := self._queue.get()) is not None:
            self._send(post, occurrence)

    def _send(self, post: Post, occurrence: _Occurrence) -> None:
        event = occurrence.event
        namespace = event.regarding.namespace or "default"  # where Events about cluster-wide objects live
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        body = msgspec.json.encode(_wire(occurrence, namespace, self._instance))
        reason, problem = "", ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                status = post(path, body)
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the proxy goes on
                reason, problem = "unreachable", str(error)
                continue
            match status:
                case 0:
                    reason, problem = "unreachable", "the API server does not answer"
                case HTTPStatus.CONFLICT:  # an earlier attempt had succeeded
                    return
                case status if status < 300:
                    return
                case _:
                    reason, problem = "refused", f"the API server answered {status}"
                    if status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS:
                        break
        self._dropped(reason)
        log.warning("cannot send an Event", reason=event.reason, object=event.regarding.name, error=problem)


class _Series(msgspec.Struct):
    """When an Event was last sent, and how often it has happened since."""

    sent: float
    repeated: int = 0


class _Occurrence(msgspec.Struct, frozen=True):
    """An Event to be sent: how often it has happened, and when (nanoseconds since 1970)."""

    event: Event
    count: int
    at: int


def _wire(occurrence: _Occurrence, namespace: str, instance: str) -> dict[str, object]:
    event = occurrence.event
    seconds, fraction = divmod(occurrence.at, 1_000_000_000)
    time_text = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction // 1000:06d}Z"
    wire: dict[str, object] = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{event.regarding.name[:200].rstrip('-.')}.{occurrence.at:x}",
            "namespace": namespace,
        },
        "eventTime": time_text,
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
        "action": event.action,
        "reason": event.reason,
        "regarding": event.regarding,
        "note": event.note.encode()[:NOTE_LENGTH].decode(errors="ignore"),
        "type": event.type,
    }
    if occurrence.count > 1:
        wire["series"] = {"count": occurrence.count, "lastObservedTime": time_text}
    return wire
