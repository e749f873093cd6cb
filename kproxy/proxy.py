"""The running proxy: takes events in, decides when to sync, and tells everyone concerned what came of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from enum import Enum, auto
from queue import Empty, SimpleQueue

import msgspec
import structlog

from kproxy.api.events import Alive, Changed, Event, Listed
from kproxy.api.objects import Kind, Node
from kproxy.cluster import ClusterState
from kproxy.dataplane.base import ApplyError
from kproxy.model import NodeFacts
from kproxy.reconcile import Reconciler, SyncReport

log = structlog.get_logger(__name__)

FIRST_RETRY_SECONDS = 0.5
QUARANTINE_RETRY_SECONDS = 300.0
NODE_PATIENCE_SECONDS = 30.0  # how long to wait for the lists of Nodes and ServiceCIDRs before going on without
FACTS_PATIENCE_SECONDS = 300.0  # how long to wait for what the node's facts depend on (pod CIDRs)


class _Notice(Enum):
    """What is told beside the source's events."""

    TOUCHED = auto()  # someone else wrote to our part of the kernel
    MOVED = auto()  # the node's addresses have changed
    STOP = auto()


class StartError(Exception):
    """What the proxy cannot do without did not come."""


class Pace(msgspec.Struct, frozen=True):
    """How often to sync, in seconds: at least `minimum` between the end of one and the start of the next; after a
    failure again with growing delays up to `retry`; and a comparison with the kernel every `verify`, although nothing
    seems to have happened."""

    minimum: float = 0.0
    retry: float = 30.0
    verify: float = 3600.0


class Observer:
    """Who wants to know how syncing goes. Called from the sync thread; must not block. Does nothing by itself."""

    def events_taken(self, state: ClusterState) -> None:
        """Events were taken into the state."""

    def sync_wanted(self) -> None:
        """Something has changed that a sync must bring to the kernel."""

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        """A sync succeeded."""

    def sync_failed(self, error: Exception, seconds: float) -> None:
        """A sync failed and will be tried again."""

    def node_changed(self, node: Node) -> None:
        """The own Node was added or changed."""

    def alive(self, kind: Kind) -> None:
        """The source is current for this kind."""


class Proxy:
    """Owns the state and the reconciler; everything that changes them happens in the thread that calls `run`.

    `facts` computes what the node is now, None while that is not known; it is called in that thread when the Node, the
    service CIDRs or the node's addresses have changed.
    """

    def __init__(
        self,
        state: ClusterState,
        reconciler: Reconciler,
        *,
        facts: Callable[[], NodeFacts | None],
        observers: Iterable[Observer],
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._reconciler = reconciler
        self._facts = facts
        self._observers = tuple(observers)
        self._pace = pace
        self._clock = clock
        self._inbox: SimpleQueue[Event | _Notice] = SimpleQueue()
        # Times of `clock`; only used in the thread of `run`.
        self._complete_at: float | None = None  # when the API server, which may have been down, had answered
        self._has_facts = False
        self._earliest = 0.0
        self._failures = 0
        self._verify_at = clock() + pace.verify
        self._quarantine_retry_at: float | None = None
        self._wanted = False

    def post(self, event: Event) -> None:
        """Take in an event; from any thread."""
        self._inbox.put(event)

    def kernel_touched(self) -> None:
        """Someone else changed what is ours; from any thread."""
        self._inbox.put(_Notice.TOUCHED)

    def addresses_changed(self) -> None:
        """The node's addresses are different now; from any thread."""
        self._inbox.put(_Notice.MOVED)

    def stop(self) -> None:
        """Have `run` return soon; from any thread."""
        self._inbox.put(_Notice.STOP)

    def run(self) -> None:
        """Sync until stopped. What is in the kernel stays there. Raises StartError, and what `facts` raises."""
        self._take_facts()
        while self._take():
            if self._due():
                self._sync()

    def _take(self) -> bool:
        """Wait for something to do and take it in. False when it is time to stop."""
        events, notices = self._received()
        if _Notice.STOP in notices:
            return False
        for event in events:
            self._take_event(event)
        if self._complete_at is None and self._state.complete:
            self._complete_at = self._clock()
        if events:
            for observer in self._observers:
                observer.events_taken(self._state)
        if self._state.facts_changed or _Notice.MOVED in notices:
            self._state.facts_changed = False
            self._take_facts()
        if _Notice.TOUCHED in notices:
            self._reconciler.doubt()
        return True

    def _received(self) -> tuple[list[Event], set[_Notice]]:
        """What has come, waiting for it as long as there is nothing else to do."""
        patience = self._patience()
        try:
            received = [self._inbox.get(timeout=None if patience is None else max(patience, 0.0))]
        except Empty:
            return [], set()
        received += [self._inbox.get_nowait() for _ in range(self._inbox.qsize())]
        notices = {item for item in received if isinstance(item, _Notice)}
        return [item for item in received if not isinstance(item, _Notice)], notices

    def _take_facts(self) -> None:
        facts = self._facts()
        if facts is not None:
            self._has_facts = True
            self._reconciler.set_facts(facts)

    @property
    def _waits_for(self) -> tuple[str, float]:
        """What must be known before the first sync, and until when to wait for it; an empty string if nothing."""
        if self._complete_at is None:
            return "the lists of Services and EndpointSlices", math.inf
        patience_ends = self._complete_at + NODE_PATIENCE_SECONDS
        if not self._state.surroundings_listed and self._clock() < patience_ends:
            return "the lists of Nodes and ServiceCIDRs", patience_ends
        if not self._has_facts:
            return "the Node's pod CIDRs", self._complete_at + FACTS_PATIENCE_SECONDS
        return "", 0.0

    def _take_event(self, event: Event) -> None:
        self._state.apply(event)
        match event:
            case Changed("Node", Node() as node) if node is self._state.node:
                for observer in self._observers:
                    observer.node_changed(node)
            case Alive(kind) | Listed(kind):
                for observer in self._observers:
                    observer.alive(kind)
            case _:
                pass

    def _patience(self) -> float | None:
        """Seconds until something is due by itself; None if nothing ever is."""
        now = self._clock()
        what, deadline = self._waits_for
        if what:
            return None if deadline == math.inf else deadline - now
        until = [self._verify_at - now]
        if self._reconciler.pending:
            until.append(self._earliest - now)
        if self._quarantine_retry_at is not None:
            until.append(self._quarantine_retry_at - now)
        return min(until)

    def _due(self) -> bool:
        now = self._clock()
        what, deadline = self._waits_for
        if what:
            if now > deadline:
                raise StartError(f"waited {FACTS_PATIENCE_SECONDS:.0f} s for {what}, in vain")
            return False
        if now >= self._verify_at:
            self._verify_at = now + self._pace.verify
            self._reconciler.doubt()
        if self._quarantine_retry_at is not None and now >= self._quarantine_retry_at:
            self._quarantine_retry_at = now + QUARANTINE_RETRY_SECONDS
            self._reconciler.retry_quarantined()
        if not self._reconciler.pending:
            return False
        if not self._wanted:
            self._wanted = True
            for observer in self._observers:
                observer.sync_wanted()
        return now >= self._earliest

    def _sync(self) -> None:
        started = self._clock()
        try:
            report = self._reconciler.sync()
        except (ApplyError, OSError) as error:
            self._failed(error, self._clock() - started)
            return
        ended = self._clock()
        self._wanted = False
        self._failures = 0
        self._earliest = ended + self._pace.minimum
        if not self._reconciler.quarantine:
            self._quarantine_retry_at = None
        elif self._quarantine_retry_at is None:
            self._quarantine_retry_at = ended + QUARANTINE_RETRY_SECONDS
        for observer in self._observers:
            observer.sync_done(report, ended - started)

    def _failed(self, error: Exception, seconds: float) -> None:
        delay = min(self._pace.retry, FIRST_RETRY_SECONDS * 2 ** min(self._failures, 16))
        delay *= random.uniform(0.8, 1.0)  # noqa: S311 - spreads retries, keeps no secret
        self._failures += 1
        self._earliest = self._clock() + delay
        log.error("sync failed, nothing is forgotten", error=str(error), retry_in_seconds=round(delay, 1))
        for observer in self._observers:
            observer.sync_failed(error, seconds)
