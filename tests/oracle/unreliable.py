"""A dataplane that refuses now and then before the kernel is asked, and counts what gets through."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from kproxy.dataplane.base import ApplyError, Change, Dataplane, Entries, Key, Value
from kproxy.model import NodeFacts, Route, ServiceName


class Unreliable:
    """Delegates to a real dataplane. `rate`: how many of the transactions fail, 0.0 … 1.0."""

    def __init__(self, real: Dataplane, rate: float, seed: int) -> None:
        self.rate = rate
        self.written = 0  # transactions
        self.refused = 0
        self._real = real
        self._luck = random.Random(seed)

    def render_base(self, facts: NodeFacts) -> Entries:
        return self._real.render_base(facts)

    def render_route(self, route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:
        return self._real.render_route(route, facts, present)

    def rerenders(self, before: NodeFacts, after: NodeFacts) -> bool:
        return self._real.rerenders(before, after)

    def is_shared(self, key: Key) -> bool:
        return self._real.is_shared(key)

    def read(self) -> Entries:
        return self._real.read()

    def apply(self, changes: Iterable[Change]) -> None:
        """Fails as kernels do: for lack of something, because of one entry, or without a word of which."""
        changes = list(changes)
        if self._luck.random() < self.rate:
            self.refused += 1
            culprits = (self._luck.choice(changes).key,) if changes and self._luck.random() < 0.5 else ()
            raise ApplyError("the test refuses", culprits, transient=self._luck.random() < 0.5)
        self._real.apply(changes)
        self.written += 1

    def describe(self, key: Key, value: Value) -> str:
        return self._real.describe(key, value)

    def labels(self, entries: Mapping[Key, Value]) -> Mapping[Key, ServiceName]:
        return self._real.labels(entries)
