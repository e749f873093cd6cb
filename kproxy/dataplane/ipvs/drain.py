"""Graceful termination: real servers that get no new connections, and are deleted when they have none left.

The reference (section 4.2.3) waits for ever and forgets at a restart what it waited for. Here a server that never gets
rid of its connections goes after a time, and one that was left by an earlier process is found again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from kproxy.dataplane.ipvs.entries import RealServerKey, VirtualServerKey

DRAIN_SECONDS = 900.0  # as long as IPVS itself remembers a TCP connection on which nothing is said
LOOK_SECONDS = 15.0  # between two looks at the connections


class Draining:
    """Which real servers are waited for, and until when. `clock`: seconds of a clock that only goes forward."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._deadlines: dict[RealServerKey, float] = {}
        self._last_look = -math.inf
        self._next_look = 0.0

    def __contains__(self, key: RealServerKey) -> bool:
        return key in self._deadlines

    def __len__(self) -> int:
        return len(self._deadlines)

    def begin(self, key: RealServerKey) -> None:
        """Wait for a real server from now on, unless it is waited for already."""
        if not self._deadlines:
            self._next_look = self._clock() + LOOK_SECONDS
        self._deadlines.setdefault(key, self._clock() + self._seconds)

    def end(self, keys: Iterable[RealServerKey]) -> None:
        """Stop waiting: they are gone, or wanted again."""
        for key in keys:
            self._deadlines.pop(key, None)

    def end_of(self, virtual_servers: Iterable[VirtualServerKey]) -> None:
        """Stop waiting for all real servers of virtual servers that are gone."""
        gone = set(virtual_servers)
        self.end([key for key in self._deadlines if key.virtual_server in gone])

    def due(self) -> float | None:
        """Seconds until somebody should look at their connections; None while there is none.

        One whose time was up at the last look, but which is still there, waits for the next.
        """
        if not self._deadlines:
            return None
        ahead = [deadline for deadline in self._deadlines.values() if deadline > self._last_look]
        return max(min([self._next_look, *ahead]) - self._clock(), 0.0)

    def look(self) -> tuple[set[RealServerKey], set[RealServerKey]]:
        """Those that are waited for, and of them those for which that is over. The next look is due later."""
        now = self._last_look = self._clock()
        self._next_look = now + LOOK_SECONDS
        return set(self._deadlines), {key for key, deadline in self._deadlines.items() if deadline <= now}
