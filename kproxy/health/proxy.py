"""Whether the proxy keeps up and the node should get traffic: `/healthz`, `/livez`, `/readyz` (reference: 6.1)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http import HTTPStatus

import msgspec

from kproxy.api.objects import Node
from kproxy.http.message import NOT_FOUND, Handler, Request, Response, json
from kproxy.model import Family

TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"

_NANOSECONDS = 1_000_000_000
_NEVER = "0001-01-01T00:00:00Z"  # Go's zero time, which kube-proxy prints before the first sync


class FamilyHealth(msgspec.Struct, frozen=True):
    """What is known of one family at one moment."""

    last_updated: int  # nanoseconds since 1970
    healthy: bool


class Health(msgspec.Struct, frozen=True):
    """The proxy's health at one moment."""

    now: int  # nanoseconds since 1970
    families: dict[Family, FamilyHealth]
    node_eligible: bool
    unsynced: tuple[Family, ...]  # families whose first sync has not succeeded yet

    @property
    def healthy(self) -> bool:
        """Whether no family has had a change waiting for too long."""
        return all(family.healthy for family in self.families.values())

    @property
    def last_updated(self) -> int | None:
        """When any family was last in step, nanoseconds since 1970."""
        return max((family.last_updated for family in self.families.values()), default=None)


class _FamilyState:
    def __init__(self) -> None:
        self.last_updated: int | None = None
        self.oldest_pending: float | None = None
        self.synced = False


class ProxyHealth:
    """Tracks, for each family, whether queued changes reach the kernel within two sync periods.

    `sync_period` is in seconds. `now` gives wall time in nanoseconds, for people; `monotonic` seconds, for ages.
    """

    def __init__(
        self,
        families: Iterable[Family],
        sync_period: float,
        *,
        now: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout = 2 * sync_period
        self._now = now
        self._monotonic = monotonic
        self._families = {family: _FamilyState() for family in sorted(families)}
        self._node_eligible = False
        self._lock = threading.Lock()

    def started(self, family: Family) -> None:
        """The sync loop runs: from here on the family counts."""
        self._in_step(family)

    def queued(self, family: Family) -> None:
        """A sync was requested."""
        with self._lock:
            state = self._families[family]
            if state.oldest_pending is None:
                state.oldest_pending = self._monotonic()

    def succeeded(self, family: Family) -> None:
        """A sync has brought the kernel in step."""
        self._in_step(family)
        self._families[family].synced = True

    def node_changed(self, node: Node) -> None:
        """The own Node was added or changed. Its deletion changes nothing: the last state stays."""
        tainted = any(taint.key == TO_BE_DELETED_TAINT for taint in node.spec.taints or ())
        self._node_eligible = node.metadata.deletion_timestamp is None and not tainted

    def check(self) -> Health:
        """The health now."""
        with self._lock:
            now, age = self._now(), self._monotonic()
            return Health(
                now=now,
                families={
                    family: FamilyHealth(
                        last_updated=state.last_updated,
                        healthy=state.oldest_pending is None or age - state.oldest_pending < self._timeout,
                    )
                    for family, state in self._families.items()
                    if state.last_updated is not None
                },
                node_eligible=self._node_eligible,
                unsynced=tuple(family for family, state in self._families.items() if not state.synced),
            )

    def _in_step(self, family: Family) -> None:
        with self._lock:
            state = self._families[family]
            state.oldest_pending = None
            state.last_updated = self._now()


def probe_handler(health: ProxyHealth, answered: Callable[[str, int], None]) -> Handler:
    """Answers `/healthz`, `/livez` and `/readyz`. `answered` is told the path and status of the first two."""

    def handle(request: Request) -> Response:
        now = health.check()
        match request.path:
            case "/healthz":
                response = _health_response(now, now.healthy and now.node_eligible, with_node=True)
            case "/livez":
                response = _health_response(now, now.healthy, with_node=False)
            case "/readyz":
                return _readiness_response(now)
            case _:
                return NOT_FOUND
        answered(request.path, response.status)
        return response

    return handle


def _health_response(health: Health, good: bool, *, with_node: bool) -> Response:
    # While all is well the time is the current one, as it was when kube-proxy synced at least every minute.
    updated = health.now if good else health.last_updated
    body: dict[str, object] = {
        "lastUpdated": rfc3339(updated) if updated is not None else _NEVER,
        "currentTime": rfc3339(health.now),
    }
    if with_node:
        body["nodeEligible"] = health.node_eligible
    body["healthy"] = health.healthy
    if health.families:
        body["status"] = {
            family.name: {"lastUpdated": rfc3339(state.last_updated), "healthy": state.healthy}
            for family, state in health.families.items()
        }
    return json(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, msgspec.json.encode(body))


def _readiness_response(health: Health) -> Response:
    """Own addition: whether every family has been written to the kernel once since this process started."""
    body = {"ready": not health.unsynced, "waitingFor": [family.name for family in health.unsynced]}
    return json(HTTPStatus.SERVICE_UNAVAILABLE if health.unsynced else HTTPStatus.OK, msgspec.json.encode(body))


def rfc3339(nanoseconds: int) -> str:
    """The time in UTC with as many digits of the second as it needs, the form Go calls RFC3339Nano."""
    seconds, fraction = divmod(nanoseconds, _NANOSECONDS)
    digits = f".{fraction:09d}".rstrip("0") if fraction else ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{digits}Z"
