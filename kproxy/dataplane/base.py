"""Entries, changes and the interface of a proxy mode.

The kernel's state is a keyed collection: each mode describes it as entries (key → value), for instance an element of
a map, a chain with its rules, a virtual server. What is wanted and what is there have the same type, so one `diff`
serves start-up, every sync, drift, dry-run, clean-up and tests. Keys and values are opaque outside their mode.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol

import msgspec

from kproxy.model import NodeFacts, Route, ServiceName

Key = Hashable
Value = object
Entries = dict[Key, Value]


class Change(msgspec.Struct, frozen=True):
    """One entry that differs. `old` None: to be added. `new` None: to be removed."""

    key: Key
    old: Value | None
    new: Value | None


class ApplyError(Exception):
    """The kernel refused a change or all of them; nothing of the transaction is in force.

    `culprits` are the keys the kernel complained about; empty where it did not say. `transient`: it has nothing to do
    with what was asked (no memory, no permission, a busy object), so the same changes may go in later.
    """

    def __init__(self, message: str, culprits: tuple[Key, ...] = (), *, transient: bool = False) -> None:
        super().__init__(message)
        self.culprits = culprits
        self.transient = transient


class UnsupportedError(Exception):
    """This mode cannot work on this machine; the message names what is missing."""


def diff(wanted: Mapping[Key, Value], actual: Mapping[Key, Value]) -> list[Change]:
    """The changes that turn `actual` into `wanted`."""
    changes = [Change(key, actual.get(key), value) for key, value in wanted.items() if actual.get(key) != value]
    changes.extend(Change(key, value, None) for key, value in actual.items() if key not in wanted)
    return changes


class Dataplane(Protocol):
    """A proxy mode. `render_*` are pure; `read` and `apply` talk to the kernel."""

    def render_base(self, facts: NodeFacts) -> Entries:
        """What is there whatever the Services are."""

    def render_route(self, route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:
        """What one service port needs. `present` is what is in place, so that an arrangement can be kept."""

    def rerenders(self, before: NodeFacts, after: NodeFacts) -> bool:
        """Whether service ports need other entries when the node's facts change like this."""

    def is_shared(self, key: Key) -> bool:
        """Whether several service ports may need this very entry with this very value."""

    def read(self) -> Entries:
        """What the kernel holds of ours. Changes nothing. Raises OSError."""

    def apply(self, changes: Iterable[Change]) -> None:
        """Make the changes, in one transaction where the kernel can. Raises ApplyError."""

    def describe(self, key: Key, value: Value) -> str:
        """One line for people."""

    def labels(self, entries: Mapping[Key, Value]) -> Mapping[Key, ServiceName]:
        """The Services that entries were made for, by what the kernel itself notes of them (comments)."""
