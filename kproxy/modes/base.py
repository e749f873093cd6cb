"""What the command line needs of a proxy mode beside its dataplane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import Dataplane
from kproxy.explain import Explanation, Node, Packet
from kproxy.metrics.connections import Reading
from kproxy.model import Family, Route
from kproxy.proxy import Observer
from kproxy.sysctl import Setting


class Watch(Protocol):
    """Notices foreign changes of our part of the kernel, in the network namespace in which it was made."""

    def touches(self) -> Iterator[str]:
        """Wait for changes; who made them, as far as that is known. Ends on `stop`. Raises OSError."""

    def stop(self) -> None:
        """End `touches` from any thread."""

    def close(self) -> None:
        """Release what it holds; `touches` must have ended."""


class Mode(Protocol):
    """A proxy mode, open in the network namespace of the thread that made it."""

    @property
    def dataplane(self) -> Dataplane:
        """What the reconciler works with."""

    def large_families(self, state: ClusterState) -> Callable[[], frozenset[Family]]:
        """Tells `NodeFacts.large_families`, where the mode wants to know."""

    def observers(self, registry: CollectorRegistry) -> Sequence[Observer]:
        """Who keeps the metrics that only this mode has."""

    def readings(self, state: ClusterState) -> Callable[[], Iterable[Reading]]:
        """Reads the connection counters, from any thread."""

    def explain(self, packet: Packet, routes: Iterable[Route], node: Node) -> Explanation:
        """What becomes of the first packet of a connection on a node where these are all the routes."""

    def is_exposed(self) -> bool:
        """Whether there is something of ours in the kernel that others may change, so that it must be watched."""

    def watch(self) -> Watch | None:
        """A watch for foreign changes from now on, or since the kernel was last read. Raises OSError.

        None: nothing tells of changes, so that comparing now and then must do.
        """

    def settings(self) -> Sequence[Setting]:
        """The sysctls that the mode needs, beside what it has as entries."""

    def prepare(self) -> None:
        """Write those, and what else is set once at start. Raises SysctlError and OSError."""

    def close(self) -> None:
        """Let go of the kernel; what is there stays in force."""
