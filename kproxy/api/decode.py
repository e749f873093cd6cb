"""From the API's JSON to objects: lists, watch events, and what to say of an object that cannot be read.

msgspec looks into a type when it is first used, and crashes where threads do that at once (0.22.0). So all decoders are
made before there are threads: here, and in `Watch`.
"""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import msgspec

from kproxy.api.objects import KINDS, Kind, Object, ObjectMeta

T = TypeVar("T")


class UnreadableError(Exception):
    """An object that does not have the form of its kind. `metadata` is what could be read of its identity."""

    def __init__(self, kind: Kind, metadata: ObjectMeta, reason: str) -> None:
        super().__init__(f"{object_name(kind, metadata.namespace, metadata.name)}: {reason}")
        self.metadata = metadata


class ListMeta(msgspec.Struct, rename="camel", frozen=True):
    """`metadata` of a list."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct, Generic[T], frozen=True):
    metadata: ListMeta = ListMeta()
    items: list[T] | None = None


class WatchEvent(msgspec.Struct, frozen=True):
    """A line of a watch. `type` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: msgspec.Raw


class Status(msgspec.Struct, frozen=True):
    """What is read of a `v1` Status."""

    code: int = 0
    message: str = ""


class _Identity(msgspec.Struct, frozen=True):
    metadata: ObjectMeta = ObjectMeta()


class _Names(msgspec.Struct, rename="camel", frozen=True):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _BareIdentity(msgspec.Struct, frozen=True):
    metadata: _Names = _Names()


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)
WATCH_EVENT = msgspec.json.Decoder(WatchEvent)
STATUS = msgspec.json.Decoder(Status)
_IDENTITY = msgspec.json.Decoder(_Identity)
_BARE_IDENTITY = msgspec.json.Decoder(_BareIdentity)
_RAW_PAGE = msgspec.json.Decoder(_Page[msgspec.Raw])


class Page(msgspec.Struct, frozen=True):
    """A page of a list. `unreadable` are the objects that could not be read, as errors."""

    metadata: ListMeta
    objects: list[Object]
    unreadable: list[UnreadableError]


class ObjectDecoder:
    """Decodes the objects of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._object = msgspec.json.Decoder(KINDS[kind])
        page: Any = _Page
        self._page: msgspec.json.Decoder[_Page[Object]] = msgspec.json.Decoder(page[KINDS[kind]])

    def page(self, body: bytes) -> Page:
        """A page of a list. Raises msgspec.DecodeError where it is not one."""
        try:
            page = self._page.decode(body)
        except _UNREADABLE:
            return self._page_by_items(body)
        return Page(page.metadata, page.items or [], [])

    def _page_by_items(self, body: bytes) -> Page:
        page = _RAW_PAGE.decode(body)
        objects: list[Object] = []
        unreadable: list[UnreadableError] = []
        for raw in page.items or []:
            try:
                objects.append(self.object(raw))
            except UnreadableError as error:
                unreadable.append(error)
        return Page(page.metadata, objects, unreadable)

    def object(self, raw: msgspec.Raw) -> Object:
        """One object. Raises UnreadableError."""
        try:
            item: Object = self._object.decode(raw)
        except _UNREADABLE as error:
            raise UnreadableError(self._kind, _metadata(raw), explain(error)) from error
        return item


def _metadata(raw: msgspec.Raw) -> ObjectMeta:
    try:
        return _IDENTITY.decode(raw).metadata
    except _UNREADABLE:
        pass
    try:
        names = _BARE_IDENTITY.decode(raw).metadata
    except _UNREADABLE:
        return ObjectMeta()
    return ObjectMeta(name=names.name, namespace=names.namespace, resource_version=names.resource_version)


def object_name(kind: str, namespace: str, name: str) -> str:
    """`Service default/web`, `Node worker-1`, or `Service without a name`."""
    if not name:
        return f"{kind} without a name"
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


_WHERE = re.compile(r"(?P<what>.*) - at `(?:key in )?\$\.?(?P<path>.*)`", re.DOTALL)


def explain(error: Exception, path: str = "") -> str:
    """`spec.ports[0].port: Expected int, got str`, from msgspec's own words; `path` is where the value was."""
    match = _WHERE.fullmatch(str(error))
    what = (match["what"] if match else str(error)).replace("`", "")
    within = match["path"] if match else ""
    where = f"{path}.{within}" if path and within and not within.startswith("[") else path + within
    return f"{where}: {what}" if where else what
