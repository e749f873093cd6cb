"""The requests of the API stand-in: routing, lists, watches and writes as the Kubernetes API defines them."""

from __future__ import annotations

import base64
import binascii
import re
import select
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import msgspec

from tests.lab.apiserver_faults import Answer, OnEvent, OnRequest
from tests.lab.apiserver_store import (
    RESOURCES,
    ApiError,
    Key,
    Object,
    Resource,
    Selection,
    Store,
    parse_field_selector,
    parse_label_selector,
)
from tests.lab.apiserver_watch import Watch

if TYPE_CHECKING:
    from tests.lab.apiserver import ApiServer

_PATH = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+)(?P<status>/status)?)?"
)
_START = Key("", "")
_WATCH_SECONDS = 1800.0  # of a watch that does not say how long
_LOOK_SECONDS = 1.0  # how soon a watch notices that its client has gone


class Target(NamedTuple):
    """What a request is about."""

    resource: Resource
    namespace: str | None
    name: str
    status: bool

    @property
    def key(self) -> Key:
        """Identity of the named object."""
        return Key(self.namespace or "", self.name)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "kproxy-lab"
    disable_nagle_algorithm = True
    server: ApiServer  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.store: Store = self.server.store

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: tests read `ApiServer.requests`."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.server.note_request(self.command, url.path, query, self.headers)
        try:
            self._authenticate()
            if (found := discovery(url.path)) is not None:
                self._send(200, found)
                return
            target = find_target(url.path)
            verb = self._verb(target, query)
            if (fault := self.server.faults.on_request(target.resource.plural, verb)) is not None:
                self._commit(fault)
            elif verb == "watch":
                self._watch(target, query)
            elif verb == "list":
                self._list(target, query)
            else:
                self._send(*self._single(target, verb, body))
        except ApiError as error:
            self._send(error.code, error.status())

    def _authenticate(self) -> None:
        tokens = self.server.tokens
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if tokens is not None and (scheme.lower() != "bearer" or token not in tokens):
            raise ApiError(401, "Unauthorized", "Unauthorized")

    def _verb(self, target: Target, query: dict[str, str]) -> str:
        if self.command == "GET":
            watched = query.get("watch", "") in ("1", "true")
            return "get" if target.name else "watch" if watched else "list"
        return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[self.command]

    def _commit(self, fault: Answer | OnRequest) -> None:
        match fault:
            case Answer(code, headers, body):
                refusal = ApiError(code, "Injected", f"the server answers {code} by order of the test")
                self._send(code, body or refusal.status(), headers)
            case OnRequest.HANG:
                self.server.wait_for_mercy(self._client_has_gone)
                self.close_connection = True
            case OnRequest.DROP:
                self.close_connection = True

    def _single(self, target: Target, verb: str, body: bytes) -> tuple[int, Object]:
        resource = target.resource
        if verb == "get":
            return 200, self.store.get(resource, target.key)
        if verb == "delete":
            self.store.delete(resource, target.key)
            return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        kind = self.headers.get("Content-Type", "").partition(";")[0]
        if verb == "patch" and kind != "application/merge-patch+json":
            raise ApiError(415, "UnsupportedMediaType", f"the stand-in knows merge patches only, not {kind}")
        try:
            content: Object = msgspec.json.decode(body, type=dict)
        except msgspec.DecodeError as error:
            raise ApiError(400, "BadRequest", f"the body is not a JSON object: {error}") from None
        if verb == "create":
            if target.namespace is not None:
                content.setdefault("metadata", {})["namespace"] = target.namespace
            return 201, self.store.create(resource, content)
        if target.status:
            return 200, self.store.patch(resource, target.key, {"status": content.get("status", {})})
        if verb == "patch":
            return 200, self.store.patch(resource, target.key, content)
        content.setdefault("metadata", {}).update(namespace=target.namespace or "", name=target.name)
        return 200, self.store.replace(resource, content)

    def _selection(self, target: Target, query: dict[str, str]) -> Selection:
        if not self.server.selectors:
            return Selection(target.namespace)
        return Selection(
            target.namespace,
            parse_label_selector(query.get("labelSelector", "")),
            parse_field_selector(query.get("fieldSelector", ""), target.resource),
        )

    def _list(self, target: Target, query: dict[str, str]) -> None:
        selection, limit, token = self._selection(target, query), int(query.get("limit") or 0), query.get("continue")
        asked, current = query.get("resourceVersion", ""), self.store.version
        start, version = _START, current
        if token:
            if asked not in ("", "0"):
                raise ApiError(400, "BadRequest", "specifying resource version is not allowed when using continue")
            version, start = decode_continue(token)
            version = current if version < 0 else version
        elif asked not in ("", "0"):
            version = self._known_version(asked)
            if query.get("resourceVersionMatch") != "Exact":
                version = current
        elif asked == "0":
            limit = 0  # answered from the watch cache, which does not page
        if version <= self.store.tables[target.resource].compacted:
            raise expired(start)
        items, following, remaining = self.store.page(target.resource, selection, version, start, limit)
        metadata: Object = {"resourceVersion": str(version)}
        if following is not None:
            metadata["continue"] = encode_continue(version, following)
            if not (selection.labels or selection.fields):
                metadata["remainingItemCount"] = remaining
        resource = target.resource
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.group_version, "metadata": metadata}
        self._send(200, msgspec.json.encode(head)[:-1] + b',"items":[' + b",".join(items) + b"]}\n")

    def _known_version(self, text: str) -> int:
        if not text.isdigit():
            raise ApiError(400, "BadRequest", f"invalid resource version {text!r}")
        if int(text) > self.store.version:
            raise ApiError(
                504, "Timeout", f"Too large resource version: {text}, current: {self.store.version}", {"causes": []}
            )
        return int(text)

    def _watch(self, target: Target, query: dict[str, str]) -> None:
        selection, resource = self._selection(target, query), target.resource
        if target.name:
            selection = selection._replace(fields=(*selection.fields, ("metadata.name", True, target.name)))
        streamed = query.get("sendInitialEvents") == "true"
        match self.server.stream_lists:
            case "refuse" if "sendInitialEvents" in query:
                raise ApiError(422, "Invalid", "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch")
            case "ignore":
                streamed = False
            case _ if streamed and query.get("resourceVersionMatch") != "NotOlderThan":
                raise ApiError(
                    422, "Invalid", "resourceVersionMatch: Forbidden: sendInitialEvents requires NotOlderThan"
                )
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        asked = query.get("resourceVersion", "")
        since = self._known_version(asked) if asked not in ("", "0") else 0
        with self.server.watch_of(resource):
            events = Watch(self.server, resource, selection)
            too_old = 0 < since <= self.store.tables[resource].compacted
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            ends = time.monotonic() + float(query.get("timeoutSeconds") or _WATCH_SECONDS)
            if streamed or not since:
                self._chunk(events.initial(bookmark=streamed and bookmarks))
            else:
                events.cursor = since
            if too_old:
                self._chunk(events.gone())
                self._finish()
                return
            while self._stream(events, ends, bookmarks):
                pass

    def _stream(self, events: Watch, ends: float, bookmarks: bool) -> bool:
        """Send what is due next; False when the watch is over."""
        due = events.next(min(ends, time.monotonic() + _LOOK_SECONDS))
        if due is None:
            self._chunk(events.gone())
            return self._finish()
        for event in due:
            match self.server.faults.on_event(events.resource.plural):
                case None:
                    self._chunk(event)
                case OnEvent.SWALLOW:
                    pass
                case OnEvent.GARBLE:
                    self._chunk(b'{"type":"MODIFIED","object":{"metadata":{"name\n')
                case OnEvent.GONE:
                    self._chunk(events.gone())
                    return self._finish()
                case OnEvent.FREEZE:
                    self.server.wait_for_mercy(self._client_has_gone, until_cleared=False)
                    self.close_connection = True
                    return False
                case OnEvent.DROP_MID_EVENT:
                    self.wfile.write(b"%x\r\n%s" % (len(event), event[: len(event) // 2]))
                    self.close_connection = True
                    return False
        if self._client_has_gone() or events.over:
            self.close_connection = True
            return False
        if time.monotonic() >= ends:
            if bookmarks:
                self._chunk(events.bookmark())
            return self._finish()
        if bookmarks and events.bookmark_due():
            self._chunk(events.bookmark())
        return True

    def _finish(self) -> bool:
        self.wfile.write(b"0\r\n\r\n")
        return False

    def _chunk(self, content: bytes) -> None:
        if content:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def _client_has_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))  # nobody sends anything during a watch: readable means closed

    def _send(self, code: int, content: Object | bytes, headers: tuple[tuple[str, str], ...] = ()) -> None:
        body = content if isinstance(content, bytes) else msgspec.json.encode(content) + b"\n"
        self.send_response(code)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def find_target(path: str) -> Target:
    """What a path is about. Raises ApiError 404."""
    if found := _PATH.fullmatch(path):
        for resource in RESOURCES:
            if (resource.root, resource.plural) == (found["root"], found["plural"]):
                return Target(resource, found["namespace"], found["name"] or "", bool(found["status"]))
    raise ApiError(404, "NotFound", "the server could not find the requested resource")


def discovery(path: str) -> Object | None:
    """The answers that a client such as kubectl wants before it asks for objects."""
    groups = sorted({resource.group_version for resource in RESOURCES} - {"v1"})
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0-kproxy-lab"}
    if path in ("/healthz", "/livez", "/readyz"):
        return {"status": "ok"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
        named = [{"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v} for v in versions]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
    served = [resource for resource in RESOURCES if resource.root == path]
    if not served:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": r.plural, "singularName": r.kind.lower(), "namespaced": r.namespaced, "kind": r.kind, "verbs": verbs}
        for r in served
    ]
    return {"kind": "APIResourceList", "groupVersion": served[0].group_version, "resources": resources}


def encode_continue(version: int, start: Key) -> str:
    """The token of the next page."""
    return base64.urlsafe_b64encode(msgspec.json.encode([version, *start])).decode()


def decode_continue(token: str) -> tuple[int, Key]:
    """Version (-1: whatever is current) and first key of a page. Raises ApiError 400."""
    try:
        version, namespace, name = msgspec.json.decode(base64.urlsafe_b64decode(token), type=tuple[int, str, str])
    except (binascii.Error, msgspec.DecodeError, ValueError):
        raise ApiError(400, "BadRequest", "continue key is not valid") from None
    return version, Key(namespace, name)


def expired(start: Key) -> ApiError:
    """The refusal of a list whose version is forgotten, with a token that goes on with the present state."""
    message = "The provided continue parameter is too old to display a consistent list result."
    return ApiError(410, "Expired", message, {"metadata": {"continue": encode_continue(-1, start)}})
