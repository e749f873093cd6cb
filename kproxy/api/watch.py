"""List and watch of one kind: everything once, then each change, and everything again whenever there is a doubt.

client-go's reflector is the model for what servers expect: resource versions are continued after an orderly end of a
watch, bookmarks move them on, 410 means to list again. Beyond it, everything is listed again from time to time and
compared by whoever receives it, so that an event which was lost on the way does not stay lost.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import structlog

from kproxy.api.decode import STATUS, WATCH_EVENT, ObjectDecoder, UnreadableError, WatchEvent
from kproxy.api.errors import ApiError, SilentError
from kproxy.api.events import Alive, Changed, Deleted, Event, Listed, Sink, Unavailable
from kproxy.api.objects import KINDS, Object
from kproxy.api.resources import Resource, concerns_us

if TYPE_CHECKING:
    from kproxy.api.client import Connection, Response

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is asked again all the same
WARN_AGAIN = 300.0  # seconds between warnings while it goes on failing
# Of a watch: forgotten (410), unknown (400), or newer than what this server knows (504), as after a restored backup.
_VERSION_REFUSED = (400, 410, 504)
_STREAM_REFUSED = (400, 405, 406, 415, 422, 501)
_log = structlog.get_logger(__name__)


class Pace(msgspec.Struct, frozen=True):
    """How much is asked for at once, and how often. Times in seconds."""

    page: int = 500  # objects
    silence: float = 100.0  # longest of a watch; servers send a bookmark every minute
    list_silence: float = 30.0  # longest while a page is on its way
    stream_silence: float = 10.0  # longest of a streamed list; a server that cannot stream says nothing at its end
    watch: tuple[float, float] = (300.0, 600.0)  # length of a watch, at random so that nodes do not come together
    relist: float = 900.0  # after so long everything is listed and compared, ± 10 %
    first_retry: float = 0.4
    longest_retry: float = 30.0
    missing_retry: float = 600.0  # for kinds that the server does not have or does not show us


class _RelistError(Exception):
    """What is known may be out of date; the message says why."""


class _NoStreamError(Exception):
    """The server does not list by watching; the message says how we know."""


class _Listing(msgspec.Struct):
    """A list under way: which objects (namespace, name) there are, and as of which version."""

    version: str = ""
    keys: set[tuple[str, str]] = set()


class Watch:
    """Follows one kind until it is stopped; `run` is a thread's work. `stream` asks for lists by watching first."""

    def __init__(
        self,
        connection: Connection,
        resource: Resource,
        sink: Sink,
        *,
        stream: bool,
        pace: Pace,
        clock: Callable[[], float] = time.monotonic,
        randomness: random.Random | None = None,
    ) -> None:
        self._connection = connection
        self._resource = resource
        self.kind = resource.kind
        self._sink = sink
        self._stream = stream
        self._pace = pace
        self._clock = clock
        self._random = randomness or random.SystemRandom()
        self._decoder = ObjectDecoder(resource.kind)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._response: Response | None = None
        self._version = ""  # from which to watch; empty: list first
        self._relist_at = 0.0
        self._failures = 0
        self._warn_at = 0.0
        self._listed = False
        self._taken_for_empty = False

    def stop(self) -> None:
        """End soon; returns at once. Nothing is delivered after what is being delivered now."""
        with self._lock:
            self._stopped.set()
            if self._response is not None:
                self._response.shutdown()

    def run(self) -> None:
        """List, watch, and begin again, until stopped."""
        while not self._stopped.is_set():
            delay = 0.0
            try:
                if self._version and self._clock() < self._relist_at:
                    self._watch(None)
                elif self._stream:
                    self._watch(_Listing())
                else:
                    self._complete(self._list_by_pages(self._pace.page))
                    self._watch(None)
            except _NoStreamError as error:
                self._stream = False
                _log.info(
                    "lists come in pages, since the server does not stream them", kind=self.kind, reason=str(error)
                )
            except _RelistError as doubt:
                self._version = ""
                delay = self._doubted(doubt)
            except ApiError as error:
                delay = self._failed(error)
            except Exception as error:  # noqa: BLE001 - without this thread nothing would ever change again
                _log.debug("unexpected", exc_info=error)
                self._version = ""
                delay = self._failed(ApiError(f"{self._url()}: {type(error).__name__}: {error}"))
            if delay:
                self._stopped.wait(delay)

    # --- list

    def _complete(self, listing: _Listing) -> None:
        if not listing.version:
            raise ApiError(f"{self._url()}: the list has no resourceVersion")
        self._version = listing.version
        self._relist_at = self._clock() + self._pace.relist * self._random.uniform(0.9, 1.1)
        self._listed = True
        self._deliver(Listed(self.kind, frozenset(listing.keys)))
        self._deliver(Alive(self.kind))

    def _list_by_pages(self, size: int) -> _Listing:
        listing = _Listing()
        query = dict(self._resource.selectors)
        if size:
            query["limit"] = str(size)
        while True:
            try:
                # The pages after the first belong to the same list and do not count for the rate limit.
                with self._open(query, self._pace.list_silence, limited="continue" not in query) as response:
                    page = self._decoder.page(response.read())
            except msgspec.DecodeError as error:
                raise ApiError(f"{self._url()}: this is not a list: {error}") from error
            except ApiError as error:
                if error.status != 410 or "continue" not in query:
                    raise
                # It took so long that the server has forgotten the version that we began with: all at once, then.
                _log.info("a list expired between its pages and is asked for in one piece", kind=self.kind)
                return self._list_by_pages(0)
            for item in page.objects:
                self._list_object(item, listing)
            for unreadable in page.unreadable:
                self._list_unreadable(unreadable, listing)
            listing.version = listing.version or page.metadata.resource_version
            if not page.metadata.continue_:
                return listing
            query["continue"] = page.metadata.continue_

    def _list_object(self, item: Object, listing: _Listing) -> None:
        if concerns_us(item):
            listing.keys.add((item.metadata.namespace, item.metadata.name))
            self._deliver(Changed(self.kind, item))

    def _list_unreadable(self, error: UnreadableError, listing: _Listing) -> None:
        _log.warning("an object cannot be read; what was known of it stays", error=str(error))
        listing.keys.add((error.metadata.namespace, error.metadata.name))

    def _took_initial(self, event: WatchEvent, listing: _Listing) -> bool:
        """Add an initial event to the list; whether it was the last one."""
        match event.type:
            case "BOOKMARK":
                bookmark = _bookmark(event)
                if bookmark.annotations.get(INITIAL_EVENTS_END) != "true":
                    raise _NoStreamError("a bookmark came before the end of the initial events was announced")
                listing.version = bookmark.resource_version
                return True
            case "ERROR":
                raise _RelistError(_error_text(event))
        try:
            item = self._decoder.object(event.object)
        except UnreadableError as error:
            self._list_unreadable(error, listing)
        else:
            if event.type == "DELETED":  # it can follow the initial event of the same object
                listing.keys.discard((item.metadata.namespace, item.metadata.name))
                self._deliver(Deleted(self.kind, item))
            else:
                self._list_object(item, listing)
        return False

    # --- watch

    def _watch(self, listing: _Listing | None) -> None:
        """Watch from the known version or, given a list to fill, from the list that the watch itself begins with."""
        query = self._watch_query(streamed=listing is not None)
        began = self._clock()
        established = heard = False
        try:
            with self._open(query, self._pace.stream_silence if listing else self._pace.silence) as response:
                established = True
                if listing is None:
                    self._deliver(Alive(self.kind))
                self._recovered()
                for line in response.lines():
                    heard = True
                    if listing is None:
                        self._took(_event(line))
                        self._failures = 0  # not before: a list may succeed and each watch after it fail
                        if self._clock() >= self._relist_at:
                            return
                    elif self._took_initial(_event(line), listing):
                        self._complete(listing)
                        listing = None
                        response.allow_silence(self._pace.silence)
        except SilentError as error:
            if not established:
                raise
            if listing is not None:
                raise _NoStreamError("the end of the initial events was not announced") from error
            # Half open, or a server without bookmarks: a new watch tells which.
            _log.debug("a silent watch is begun anew", kind=self.kind, error=str(error))
            return
        except ApiError as error:
            if listing is not None and error.status in _STREAM_REFUSED:
                raise _NoStreamError(str(error)) from error
            if error.status in _VERSION_REFUSED:
                raise _RelistError(str(error)) from error
            raise
        if listing is not None and not self._stopped.is_set():
            raise _NoStreamError("the stream ended before the end of the initial events was announced")
        if self._clock() - began >= 1.0:
            self._failures = 0
        elif not heard:
            raise ApiError(f"{self._url()}: the watch ended at once")

    def _watch_query(self, *, streamed: bool) -> dict[str, str]:
        query = dict(self._resource.selectors)
        if streamed:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
            until_list = self._pace.relist
        else:
            query["resourceVersion"] = self._version
            until_list = self._relist_at - self._clock()
        length = max(1, int(min(self._random.uniform(*self._pace.watch), until_list)))
        return query | {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(length)}

    def _took(self, event: WatchEvent) -> None:
        match event.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                self._took_object(event)
            case "BOOKMARK":
                self._version = _bookmark(event).resource_version or self._version
                self._deliver(Alive(self.kind))
            case "ERROR":
                raise _RelistError(_error_text(event))
            case _:
                raise _RelistError(f"an event of unknown type {event.type!r}")

    def _took_object(self, event: WatchEvent) -> None:
        try:
            item = self._decoder.object(event.object)
        except UnreadableError as error:
            metadata = error.metadata
            if event.type == "DELETED" and metadata.name:
                self._deliver(Deleted(self.kind, KINDS[self.kind](metadata=metadata)))
            else:
                _log.warning("an object cannot be read; what was known of it stays", error=str(error))
        else:
            metadata = item.metadata
            if event.type == "DELETED" or not concerns_us(item):
                self._deliver(Deleted(self.kind, item))
            else:
                self._deliver(Changed(self.kind, item))
        self._version = metadata.resource_version or self._version

    # --- both

    @contextmanager
    def _open(self, query: dict[str, str], silence: float, *, limited: bool = True) -> Iterator[Response]:
        response = self._connection.request("GET", self._resource.path, query, read_seconds=silence, limited=limited)
        with self._lock:
            self._response = response
            if self._stopped.is_set():
                response.shutdown()
        try:
            with response:
                yield response
        finally:
            with self._lock:
                self._response = None

    def _deliver(self, event: Event) -> None:
        if not self._stopped.is_set():
            self._sink(event)

    def _recovered(self) -> None:
        if self._warn_at:
            _log.info("the API server answers again", kind=self.kind, server=self._connection.server)
            self._warn_at = 0.0

    def _doubted(self, doubt: _RelistError) -> float:
        """Tell of a doubt: a single one is everyday business. Returns the seconds until everything is listed again."""
        if self._failures:
            return self._failed(ApiError(f"{self._url()}: {doubt}"))
        _log.info("everything is listed again", kind=self.kind, reason=str(doubt))
        return self._retry_delay()

    def _failed(self, error: ApiError) -> float:
        """Tell of a failure. Returns the seconds until the next attempt."""
        if self._stopped.is_set():
            return 0.0
        if self._resource.optional and error.status in (403, 404):
            return self._missing(error)
        delay = self._retry_delay()
        if error.retry_after:
            delay = max(delay, min(error.retry_after, LONGEST_RETRY_AFTER))
        message = f"{error}; trying again in {delay:.1f} s, until then what is known stays in force"
        if self._clock() >= self._warn_at:
            self._warn_at = self._clock() + WARN_AGAIN
            _log.warning("the API server cannot be read", kind=self.kind, error=message)
        else:
            _log.debug("the API server still cannot be read", kind=self.kind, error=message)
        self._deliver(Unavailable(self.kind, message))
        return delay

    def _missing(self, error: ApiError) -> float:
        delay = self._pace.missing_retry * self._random.uniform(0.75, 1.25)
        if self._listed:
            self._deliver(Unavailable(self.kind, f"{error}; trying again in {delay:.0f} s"))
        elif not self._taken_for_empty:
            self._taken_for_empty = True
            _log.info(
                "this kind is not served to us, which is taken for an empty list", kind=self.kind, error=str(error)
            )
            self._deliver(Listed(self.kind, frozenset()))
        return delay

    def _retry_delay(self) -> float:
        delay = min(self._pace.first_retry * 2.0**self._failures, self._pace.longest_retry)
        self._failures = min(self._failures + 1, 32)
        return delay * self._random.uniform(0.5, 1.0)

    def _url(self) -> str:
        return f"{self._connection.server}{self._resource.path}"


class _Bookmark(msgspec.Struct, rename="camel", frozen=True):
    resource_version: str = ""
    annotations: dict[str, str] = {}


class _BookmarkObject(msgspec.Struct, frozen=True):
    metadata: _Bookmark


_BOOKMARK_OBJECT = msgspec.json.Decoder(_BookmarkObject)


def _event(line: bytes) -> WatchEvent:
    try:
        return WATCH_EVENT.decode(line)
    except msgspec.DecodeError as error:
        raise _RelistError(f"a line of the watch is not an event: {error}") from error


def _bookmark(event: WatchEvent) -> _Bookmark:
    try:
        return _BOOKMARK_OBJECT.decode(event.object).metadata
    except msgspec.DecodeError as error:
        raise _RelistError(f"a bookmark cannot be read: {error}") from error


def _error_text(event: WatchEvent) -> str:
    try:
        status = STATUS.decode(event.object)
    except msgspec.DecodeError:
        return "the server ended the watch with an error"
    return f"the server ended the watch: {status.code} {status.message}"
