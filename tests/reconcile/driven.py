"""A proxy that is driven by the test: its clock stands still until it is moved, everything else is real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import msgspec

from kproxy.api.events import Alive, Changed, Deleted, Listed
from kproxy.api.objects import KINDS, Kind
from kproxy.cluster import ClusterState
from kproxy.dataplane.nftables.dataplane import NftablesDataplane
from kproxy.dataplane.nftables.features import Features
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.model import Family, NodeFacts
from kproxy.proxy import Observer, Pace, Proxy
from kproxy.reconcile import Reconciler, SyncReport
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually
from tests.reconcile.objects import NODE, Object

FACTS = NodeFacts(name=NODE)


def changed(item: Object) -> Changed:
    """An object was created or changed."""
    return Changed(item["kind"], msgspec.convert(item, KINDS[item["kind"]]))


def deleted(item: Object) -> Deleted:
    """An object was deleted."""
    return Deleted(item["kind"], msgspec.convert(item, KINDS[item["kind"]]))


class Part(NamedTuple):
    """A reconciler with its own connection to the kernel of a namespace."""

    reconciler: Reconciler
    kernel: NftablesKernel
    notes: list[str]

    @property
    def in_step(self) -> bool:
        """Whether the kernel, read anew, holds all that is wanted and nothing else."""
        return self.reconciler.plan() == []

    def put(self, *items: Object) -> None:
        """Objects were created or changed."""
        for item in items:
            self.reconciler.state.apply(changed(item))

    def delete(self, *items: Object) -> None:
        """Objects were deleted."""
        for item in items:
            self.reconciler.state.apply(deleted(item))

    def sync(self) -> SyncReport:
        """Bring the kernel up to date."""
        return self.reconciler.sync()


def part(
    netns: Namespace,
    *objects: Object,
    features: Features | None = None,
    dataplane: Callable[[NftablesKernel], NftablesDataplane] = NftablesDataplane,
) -> Part:
    """State with these objects, and what brings it to the kernel of a namespace. The caller closes the kernel."""
    kernel = netns.run(NftablesKernel, tuple(Family), features)
    notes: list[str] = []
    state = ClusterState(NODE, note=notes.append)
    for kind in KINDS:
        state.apply(Listed(kind, frozenset()))
    made = Part(Reconciler(state, dataplane(kernel), FACTS), kernel, notes)
    made.put(*objects)
    return made


class _Seen(Observer):
    """What an observer is told."""

    def __init__(self) -> None:
        self.wanted = 0
        self.reports: list[SyncReport] = []
        self.failures: list[Exception] = []
        self.rounds = 0

    def sync_wanted(self) -> None:
        self.wanted += 1

    def sync_done(self, report: SyncReport, seconds: float) -> None:
        self.reports.append(report)

    def sync_failed(self, error: Exception, seconds: float) -> None:
        self.failures.append(error)

    def alive(self, kind: Kind) -> None:
        self.rounds += 1


class Driven:
    """A running proxy and its clock; a context manager."""

    def __init__(
        self,
        netns: Namespace,
        *,
        pace: Pace = Pace(),  # noqa: B008 - frozen
        facts: Callable[[], NodeFacts | None] = lambda: FACTS,
        listed: tuple[Kind, ...] = tuple(KINDS),
    ) -> None:
        self.now = 0.0
        self.clock_read: Callable[[], object] = lambda: None  # called in the proxy's thread whenever it reads the clock
        self.seen = _Seen()
        self.error: Exception | None = None
        self._kernel = netns.run(NftablesKernel, tuple(Family))
        state = ClusterState(NODE, note=lambda text: None)
        self.reconciler = Reconciler(state, NftablesDataplane(self._kernel), FACTS)
        self.proxy = Proxy(state, self.reconciler, facts=facts, observers=[self.seen], pace=pace, clock=self._clock)
        self._thread = threading.Thread(target=self._run, name="driven")
        self.list(*listed)

    def _clock(self) -> float:
        self.clock_read()
        return self.now

    def _run(self) -> None:
        try:
            self.proxy.run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.proxy.stop()
        self._thread.join(10)
        self._kernel.close()

    def list(self, *kinds: Kind) -> None:
        """The source has listed these kinds; nothing is there."""
        for kind in kinds:
            self.proxy.post(Listed(kind, frozenset()))

    def put(self, *objects: Object) -> None:
        """Objects were created or changed."""
        for item in objects:
            self.proxy.post(changed(item))

    def settle(self) -> None:
        """Wait until the proxy has done all there is to do at this time, or has ended."""
        for _ in range(2):  # what one round has begun is over when the next one has begun
            before = self.seen.rounds
            self.proxy.post(Alive("Node"))
            eventually(lambda before=before: self.seen.rounds > before or not self._thread.is_alive(), "a round")

    def at(self, now: float) -> Self:
        """Move the clock, and wait for what the proxy does then."""
        self.now = now
        self.settle()
        return self

    def ended(self, *, seconds: float = 10.0) -> bool:
        """Whether the proxy ends within this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def syncs(self) -> int:
        """How many syncs have succeeded."""
        return len(self.seen.reports)

    @property
    def failures(self) -> int:
        """How many syncs have failed."""
        return len(self.seen.failures)
