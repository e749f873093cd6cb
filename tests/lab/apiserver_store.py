"""What the API stand-in remembers: objects of a few resources, their history, and who may see which.

Every object is encoded once, when it is written; lists and watches join these bytes. Only what selectors read is kept
beside them, so 30,000 Services with 300,000 endpoints stay small and are listed at the speed of the network.
"""

from __future__ import annotations

import re
import threading
import uuid
from bisect import bisect_left, bisect_right
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

import msgspec

Object = dict[str, Any]
HISTORY = 50_000  # events of a resource that a watch may go back, at least


class Resource(NamedTuple):
    """A kind of object and where it is served."""

    group_version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def root(self) -> str:
        """Path prefix of the group and version."""
        return f"/apis/{self.group_version}" if "/" in self.group_version else f"/api/{self.group_version}"


RESOURCES = (
    Resource("v1", "services", "Service"),
    Resource("v1", "nodes", "Node", namespaced=False),
    Resource("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    Resource("networking.k8s.io/v1", "servicecidrs", "ServiceCIDR", namespaced=False),
    Resource("events.k8s.io/v1", "events", "Event"),
)
BY_KIND = {resource.kind: resource for resource in RESOURCES}


class ApiError(Exception):
    """A refusal, as the API words it: HTTP status and the `reason` and `message` of its Status object."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.details = code, reason, details or {}

    def status(self) -> Object:
        """The Status object."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.details.get("metadata", {}),
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }


class Key(NamedTuple):
    """Identity of an object within its resource; cluster-scoped objects have the namespace ""."""

    namespace: str
    name: str


class Stored(NamedTuple):
    """An object in one version: its bytes without kind and apiVersion, and what selectors ask about."""

    key: Key
    version: int
    encoded: bytes
    labels: dict[str, str]
    fields: dict[str, str]

    def at(self, version: int) -> bytes:
        """The bytes with another resourceVersion, as a DELETED event carries them."""
        decoded = msgspec.json.decode(self.encoded)
        decoded["metadata"]["resourceVersion"] = str(version)
        return msgspec.json.encode(decoded)


class Write(NamedTuple):
    """A step of the history: an object before and after; None where it did not exist."""

    version: int
    before: Stored | None
    after: Stored | None


class Selection(NamedTuple):
    """Which objects a request asks for."""

    namespace: str | None
    labels: tuple[tuple[str, str, frozenset[str]], ...] = ()  # (key, operator, values)
    fields: tuple[tuple[str, bool, str], ...] = ()  # (field, equal?, value)

    def __contains__(self, stored: Stored) -> bool:
        if self.namespace is not None and stored.key.namespace != self.namespace:
            return False
        for key, operator, values in self.labels:
            value = stored.labels.get(key)
            match operator:
                case "exists":
                    wanted = value is not None
                case "absent":
                    wanted = value is None
                case "in":
                    wanted = value in values
                case _:
                    wanted = value not in values
            if not wanted:
                return False
        return all((stored.fields.get(name, "") == value) is equal for name, equal, value in self.fields)


_SET_TERM = re.compile(r"(\S+)\s+(in|notin)\s*\(([^)]*)\)")


def parse_label_selector(text: str) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Terms of a label selector: `key`, `!key`, `key=v`, `key!=v`, `key in (a,b)`, `key notin (a,b)`."""
    terms = []
    for term in (part.strip() for part in re.split(r",(?![^(]*\))", text)):
        if not term:
            continue
        if found := _SET_TERM.fullmatch(term):
            values = frozenset(value.strip() for value in found[3].split(","))
            terms.append((found[1], found[2], values))
        elif "!=" in term:
            key, _, value = term.partition("!=")
            terms.append((key.strip(), "notin", frozenset({value.strip()})))
        elif "=" in term:
            key, _, value = term.replace("==", "=").partition("=")
            terms.append((key.strip(), "in", frozenset({value.strip()})))
        elif term.startswith("!"):
            terms.append((term[1:].strip(), "absent", frozenset()))
        elif re.fullmatch(r"[\w./-]+", term):
            terms.append((term, "exists", frozenset()))
        else:
            raise ApiError(400, "BadRequest", f"unable to parse requirement: {term!r}")
    return tuple(terms)


def parse_field_selector(text: str, resource: Resource) -> tuple[tuple[str, bool, str], ...]:
    """Terms of a field selector; only the fields that the real server supports for the resource."""
    supported = {"metadata.name", "metadata.namespace"}
    if resource.kind == "Service":
        supported |= {"spec.clusterIP", "spec.type"}
    terms = []
    for term in (part for part in text.split(",") if part):
        found = re.fullmatch(r"([^!=]+)(==|!=|=)(.*)", term)
        if not found:
            raise ApiError(400, "BadRequest", f"invalid selector: {term!r}; can't understand {term!r}")
        if found[1] not in supported:
            raise ApiError(400, "BadRequest", f'field label not supported: "{found[1]}"')
        terms.append((found[1], found[2] != "!=", found[3]))
    return tuple(terms)


class Table:
    """The objects of one resource and their history. Its owner holds the store's lock."""

    def __init__(self) -> None:
        self.objects: dict[Key, Stored] = {}
        self.history: list[Write] = []
        self.compacted = 0  # versions up to this one can no longer be read or watched from
        self.dropped = 0  # the newest write that is no longer in the history
        self._ordered: list[Stored] | None = None

    def record(self, key: Key, write: Write) -> None:
        """Make a write: the object takes its new state and watches will see it."""
        if write.after is None:
            del self.objects[key]
        else:
            self.objects[key] = write.after
        self._ordered = None
        self.history.append(write)
        if len(self.history) > 2 * HISTORY:
            self.compact(self.history[-HISTORY].version - 1)

    def compact(self, version: int) -> None:
        """Forget the history up to a version."""
        self.compacted = max(self.compacted, version)
        if past := self.history[: bisect_right(self.history, version, key=lambda write: write.version)]:
            self.dropped = past[-1].version
            del self.history[: len(past)]

    def since(self, version: int) -> list[Write]:
        """The writes after a version."""
        return self.history[bisect_right(self.history, version, key=lambda write: write.version) :]

    def ordered(self, version: int) -> list[Stored]:
        """The objects as of a version that is not compacted, by namespace and name."""
        if self._ordered is None:
            self._ordered = [self.objects[key] for key in sorted(self.objects)]
        if not (later := self.since(version)):
            return self._ordered
        past = dict(self.objects)
        for write in reversed(later):
            if write.before is not None:
                past[write.before.key] = write.before
            elif write.after is not None:
                past.pop(write.after.key, None)
        return [past[key] for key in sorted(past)]


class Store:
    """All tables under one lock and one version counter; `changed` is notified of every write."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1
        self.tables = {resource: Table() for resource in RESOURCES}

    def get(self, resource: Resource, key: Key) -> Object:
        """An object with kind and apiVersion. Raises ApiError 404."""
        with self.changed:
            return self._typed(resource, self._existing(resource, key))

    def create(self, resource: Resource, new: Object) -> Object:
        """Store a new object. Raises ApiError 409 where it exists."""
        with self.changed:
            metadata = new.setdefault("metadata", {})
            if not metadata.get("name") and metadata.get("generateName"):
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            key = self.key_of(resource, new)
            if key in self.tables[resource].objects:
                raise ApiError(409, "AlreadyExists", f'{resource.plural} "{key.name}" already exists')
            return self._write(resource, key, None, new)

    def replace(self, resource: Resource, new: Object) -> Object:
        """Replace an object. Raises ApiError 404, or 409 if its resourceVersion is given and not the present one."""
        with self.changed:
            before = self._existing(resource, self.key_of(resource, new))
            given = new["metadata"].get("resourceVersion") or str(before.version)
            if given != str(before.version):
                raise ApiError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {resource.plural} "{before.key.name}": the object has been '
                    "modified; please apply your changes to the latest version and try again",
                )
            return self._write(resource, before.key, before, new)

    def put(self, resource: Resource, new: Object) -> Object:
        """Create or replace, whatever version is there."""
        with self.changed:
            key = self.key_of(resource, new)
            return self._write(resource, key, self.tables[resource].objects.get(key), new)

    def patch(self, resource: Resource, key: Key, change: Object) -> Object:
        """Merge a change into an object (RFC 7386). Raises ApiError 404 or 409."""
        with self.changed:
            merged = merge_patch(self._typed(resource, self._existing(resource, key)), change)
            if "resourceVersion" not in change.get("metadata", {}):
                merged["metadata"].pop("resourceVersion", None)
            return self.replace(resource, merged)

    def delete(self, resource: Resource, key: Key) -> Object:
        """Remove an object and return its last state. Raises ApiError 404."""
        with self.changed:
            before = self._existing(resource, key)
            self.version += 1
            self.tables[resource].record(key, Write(self.version, before, None))
            self.changed.notify_all()
            return self._typed(resource, before)

    def objects(self, resource: Resource) -> list[Object]:
        """Every object of a resource, by namespace and name."""
        with self.changed:
            return [self._typed(resource, stored) for stored in self.tables[resource].ordered(self.version)]

    def compact(self) -> None:
        """Forget all history: a watch or a page from before now is answered with 410."""
        with self.changed:
            self.version += 1  # so that even the newest version anybody saw is older than this
            for table in self.tables.values():
                table.compact(self.version - 1)

    def page(
        self, resource: Resource, selection: Selection, version: int, start: Key, limit: int
    ) -> tuple[list[bytes], Key | None, int]:
        """Encoded objects as of a version from `start` on, the key of the next page, and how many follow in all."""
        with self.changed:
            everything = self.tables[resource].ordered(version)
        first = bisect_left(everything, start, key=lambda stored: stored.key)
        following = (stored for stored in islice(everything, first, None) if stored in selection)
        chosen = list(islice(following, limit or None))
        beyond = next(following, None)
        remaining = 0 if beyond is None else len(everything) - first - len(chosen)
        return [stored.encoded for stored in chosen], beyond and beyond.key, remaining

    def key_of(self, resource: Resource, new: Object) -> Key:
        """Identity of a given object. Raises ApiError 422 if it has no name."""
        metadata = new.get("metadata") or {}
        if not metadata.get("name"):
            raise ApiError(422, "Invalid", f"{resource.kind} is invalid: metadata.name: Required value")
        return Key((metadata.get("namespace") or "default") if resource.namespaced else "", metadata["name"])

    def _existing(self, resource: Resource, key: Key) -> Stored:
        stored = self.tables[resource].objects.get(key)
        if stored is None:
            raise ApiError(404, "NotFound", f'{resource.plural} "{key.name}" not found')
        return stored

    def _typed(self, resource: Resource, stored: Stored) -> Object:
        decoded: Object = msgspec.json.decode(stored.encoded)
        return {"kind": resource.kind, "apiVersion": resource.group_version, **decoded}

    def _write(self, resource: Resource, key: Key, before: Stored | None, new: Object) -> Object:
        given = new["metadata"]
        if before is None:
            born = {"uid": str(uuid.uuid4()), "creationTimestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"} | given
            unchanged = None
        else:
            known = msgspec.json.decode(before.encoded)["metadata"]
            born = {**given, "uid": known["uid"], "creationTimestamp": known["creationTimestamp"]}
            unchanged = self._encode(key, before.version, born, new)
        if before is not None and unchanged == before:  # a write that changes nothing makes no version and no event
            return self._typed(resource, before)
        after = self._encode(key, self.version + 1, born, new)
        self.version += 1
        self.tables[resource].record(key, Write(self.version, before, after))
        self.changed.notify_all()
        return self._typed(resource, after)

    def _encode(self, key: Key, version: int, given: Object, new: Object) -> Stored:
        metadata = {**given, "name": key.name, "resourceVersion": str(version)}
        if key.namespace:
            metadata["namespace"] = key.namespace
        content = {name: value for name, value in new.items() if name not in ("kind", "apiVersion", "metadata")}
        spec = new.get("spec")
        fields = {"metadata.name": key.name, "metadata.namespace": key.namespace}
        if isinstance(spec, dict):
            fields |= {"spec.clusterIP": str(spec.get("clusterIP", "")), "spec.type": str(spec.get("type", ""))}
        encoded = msgspec.json.encode({"metadata": dict(sorted(metadata.items())), **content})
        return Stored(key, version, encoded, metadata.get("labels") or {}, fields)


def merge_patch(target: Any, change: Any) -> Any:
    """RFC 7386: members of `change` replace those of `target`, null removes one."""
    if not isinstance(change, dict):
        return change
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in change.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
