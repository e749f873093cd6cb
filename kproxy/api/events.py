"""What a source says: the seam between where objects come from and the state they build.

A source runs in threads of its own and puts these, in order for each kind, into the `Sink` it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from kproxy.api.objects import Kind, Object


class Listed(msgspec.Struct, frozen=True):
    """A list of one kind is complete: its objects came as `Changed` just before, page by page as they were decoded.

    Whatever is not named in `keys` (namespace, name) has gone. The first one completes the kind. Objects are not
    carried here, so that a list of 30,000 is never in memory as a whole.
    """

    kind: Kind
    keys: frozenset[tuple[str, str]]


class Changed(msgspec.Struct, frozen=True):
    """An object was added or changed; it replaces what was known of it."""

    kind: Kind
    object: Object


class Deleted(msgspec.Struct, frozen=True):
    """An object has gone, or no longer matches the selectors. `object` is its last state, where known in full."""

    kind: Kind
    object: Object


class Alive(msgspec.Struct, frozen=True):
    """The source is current for this kind as of now (a bookmark, a finished list, an established watch)."""

    kind: Kind


class Unavailable(msgspec.Struct, frozen=True):
    """The source could not be read; what is known stays in force. `message` says what was tried and what follows."""

    kind: Kind
    message: str


Event = Listed | Changed | Deleted | Alive | Unavailable
Sink = Callable[[Event], None]


class Source(Protocol):
    """Delivers events until it is stopped."""

    def start(self, sink: Sink) -> None:
        """Begin to deliver. Returns at once; `sink` is called from the source's threads."""

    def stop(self) -> None:
        """End the threads; no event comes after it returns."""
