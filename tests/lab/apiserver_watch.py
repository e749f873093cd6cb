"""What a watch of the API stand-in says: initial events, changes, bookmarks, and that it is too old."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from tests.lab.apiserver_store import ApiError, Object, Resource, Selection, Stored, Write

if TYPE_CHECKING:
    from tests.lab.apiserver import ApiServer


class Watch:
    """What one watch has to say next. Sees the store only; knows no socket."""

    def __init__(self, server: ApiServer, resource: Resource, selection: Selection) -> None:
        self._server, self.resource, self._selection = server, resource, selection
        self._store = server.store
        self._table = server.store.tables[resource]
        self._served = server.generation
        self._bookmarks = server.bookmarks_ordered
        self._next_bookmark = time.monotonic() + server.bookmark_seconds
        self.cursor = 0

    @property
    def over(self) -> bool:
        """Whether the server went down meanwhile."""
        return self._server.generation != self._served

    def initial(self, *, bookmark: bool) -> bytes:
        """The present state as ADDED events, and the bookmark that ends them."""
        with self._store.changed:
            self.cursor = self._store.version
            present = self._table.ordered(self.cursor)
        events = [self._event(b"ADDED", stored.encoded) for stored in present if stored in self._selection]
        if bookmark:
            events.append(self.bookmark({"k8s.io/initial-events-end": "true"}))
        return b"".join(events)

    def next(self, until: float) -> list[bytes] | None:
        """The events since the last call; waits for one, a bookmark or the moment `until`. None: they are forgotten."""
        with self._store.changed:
            while True:
                if self.cursor < self._table.dropped:
                    return None
                writes = self._table.since(self.cursor)
                remaining = min(until, self._next_bookmark) - time.monotonic()
                if writes or self.over or self.bookmark_due() or remaining <= 0:
                    break
                self._store.changed.wait(remaining)
            self.cursor = self._store.version
        return [event for write in writes if (event := self._of(write)) is not None]

    def _of(self, write: Write) -> bytes | None:
        """An object that begins to match is ADDED, one that no longer does is DELETED."""
        before = write.before if write.before is not None and write.before in self._selection else None
        after = write.after if write.after is not None and write.after in self._selection else None
        match before, after:
            case None, Stored():
                return self._event(b"ADDED", after.encoded)
            case Stored(), Stored():
                return self._event(b"MODIFIED", after.encoded)
            case Stored(), None:
                return self._event(b"DELETED", before.at(write.version))
        return None

    def bookmark_due(self) -> bool:
        """Whether a bookmark is due by time or by order."""
        return time.monotonic() >= self._next_bookmark or self._bookmarks != self._server.bookmarks_ordered

    def bookmark(self, annotations: dict[str, str] | None = None) -> bytes:
        """A bookmark for everything said so far."""
        self._next_bookmark = time.monotonic() + self._server.bookmark_seconds
        self._bookmarks = self._server.bookmarks_ordered
        metadata: Object = {"resourceVersion": str(self.cursor), "creationTimestamp": None}
        if annotations:
            metadata["annotations"] = annotations
        return self._event(b"BOOKMARK", msgspec.json.encode({"metadata": metadata}))

    def gone(self) -> bytes:
        """The ERROR event that ends a watch whose version is too old."""
        message = f"too old resource version: {self.cursor} ({self._table.compacted + 1})"
        status = ApiError(410, "Expired", message).status()
        return msgspec.json.encode({"type": "ERROR", "object": status}) + b"\n"

    def _event(self, kind: bytes, encoded: bytes) -> bytes:
        of = b'"kind":"%s","apiVersion":"%s",' % (self.resource.kind.encode(), self.resource.group_version.encode())
        return b'{"type":"%s","object":{%s%s}\n' % (kind, of, encoded[1:])
