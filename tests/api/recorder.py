"""A sink that keeps what a consumer would know, and lets a test wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kproxy.api.events import Alive, Changed, Deleted, Event, Listed, Unavailable
from kproxy.api.objects import Kind, Object

PATIENCE = 10.0  # seconds; far more than anything here takes


class Recorder:
    """Objects as the events left them, by kind and `namespace/name`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[Event] = []
        self.objects: dict[Kind, dict[str, Object]] = {
            "Service": {},
            "EndpointSlice": {},
            "Node": {},
            "ServiceCIDR": {},
        }

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            match event:
                case Changed(kind, item):
                    self.objects[kind][_name(item)] = item
                case Deleted(kind, item):
                    self.objects[kind].pop(_name(item), None)
                case Listed(kind, keys):
                    listed = {"/".join(key) for key in keys}
                    self.objects[kind] = {k: v for k, v in self.objects[kind].items() if k in listed}
            self._changed.notify_all()

    def until(self, holds: Callable[[], object], what: str = "") -> None:
        """Wait for a condition. Fails with what is known by then."""
        with self._changed:
            deadline = time.monotonic() + PATIENCE
            while not holds():
                remaining = deadline - time.monotonic()
                # a condition may also look at the server, which does not notify
                self._changed.wait(min(remaining, 0.05))
                assert remaining > 0, f"{what or 'the condition'} did not come true; last events: {self.events[-5:]}"

    def names(self, kind: Kind = "Service") -> set[str]:
        """Names of the objects of a kind that are known."""
        return set(self.objects[kind])

    def lists(self, kind: Kind = "Service") -> int:
        """How often a kind was listed."""
        return sum(isinstance(event, Listed) and event.kind == kind for event in self.events)

    def alive(self, kind: Kind = "Service") -> int:
        """How often a kind was said to be current."""
        return sum(isinstance(event, Alive) and event.kind == kind for event in self.events)

    def complaints(self, kind: Kind = "Service") -> list[str]:
        """What was said of failures."""
        return [event.message for event in self.events if isinstance(event, Unavailable) and event.kind == kind]

    @property
    def complete(self) -> bool:
        """Whether every kind was listed."""
        return {event.kind for event in self.events if isinstance(event, Listed)} == set(self.objects)


def _name(item: Object) -> str:
    return f"{item.metadata.namespace}/{item.metadata.name}"
