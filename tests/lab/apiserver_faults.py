"""Faults that the API stand-in commits on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple


class Answer(NamedTuple):
    """Answer the request with this instead of serving it."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()  # for instance (("Retry-After", "1"),)
    body: bytes = b""  # empty: a Status object


class OnRequest(Enum):
    """What else may happen to a request."""

    DROP = "close the connection without an answer"
    HANG = "say nothing until the fault is cleared or the server goes down"


class OnEvent(Enum):
    """What may happen to the next event of a watch."""

    DROP_MID_EVENT = "send the first half of it and close the connection"
    SWALLOW = "never send it"
    GARBLE = "send a line that is not JSON in its place"
    GONE = "send an ERROR event with code 410 in its place and end the watch"
    FREEZE = "send neither it nor anything after it, and keep the connection open"


Action = Answer | OnRequest | OnEvent


class Fault(NamedTuple):
    """An action, on which requests, and how often (None: until cleared)."""

    action: Action
    resource: str = ""  # plural; "": any
    verb: str = ""  # list, watch, get, create, update, patch, delete; "": any
    times: int | None = 1


class Faults:
    """The faults in force. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.cleared = 0  # how often; a request that hangs waits for the next time

    def add(self, action: Action, *, resource: str = "", verb: str = "", times: int | None = 1) -> None:
        """Put a fault in force."""
        with self._lock:
            self._faults.append(Fault(action, resource, verb, times))

    def clear(self) -> None:
        """End all faults, also for requests that hang in one."""
        with self._lock:
            self._faults.clear()
            self.cleared += 1

    def on_request(self, resource: str, verb: str) -> Answer | OnRequest | None:
        """The fault that a request meets; counted as used."""
        with self._lock:
            action = self._take(lambda fault: isinstance(fault.action, Answer | OnRequest), resource, verb)
        return action if isinstance(action, Answer | OnRequest) else None

    def on_event(self, resource: str) -> OnEvent | None:
        """The fault that an event of a watch meets; counted as used."""
        with self._lock:
            action = self._take(lambda fault: isinstance(fault.action, OnEvent), resource, "watch")
        return action if isinstance(action, OnEvent) else None

    def _take(self, suits: Callable[[Fault], bool], resource: str, verb: str) -> Action | None:
        for index, fault in enumerate(self._faults):
            if suits(fault) and fault.resource in ("", resource) and fault.verb in ("", verb):
                if fault.times is not None:
                    left = fault._replace(times=fault.times - 1)
                    self._faults[index : index + 1] = [left] if left.times else []
                return fault.action
        return None
