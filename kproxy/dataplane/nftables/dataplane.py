"""nftables mode: render, read and apply together, and what affinity needs beyond entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from kproxy.dataplane.base import Change, Entries, Key, Value
from kproxy.dataplane.nftables.chains import base_entries
from kproxy.dataplane.nftables.containers import CONTAINERS, container
from kproxy.dataplane.nftables.describe import describe
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.render import render_route
from kproxy.model import Family, NodeFacts, Route, ServiceName

SLOT_LENGTH = 4

_Frontend = tuple[Family, bytes]  # with packed address (none for node ports), protocol and port

_SHARED_CONTAINERS = frozenset(n for n, c in CONTAINERS.items() if c.name in ("cluster-ips", "hairpin"))
_ENDPOINTS = frozenset(n for n, c in CONTAINERS.items() if c.name.endswith("endpoints") and c.data_fields)
_POLICIES = frozenset(n for n, c in CONTAINERS.items() if c.name.endswith("policies"))
_LEARNS = frozenset(n for n, c in CONTAINERS.items() if c.name.startswith("learn"))


class NftablesDataplane:
    """The nftables mode in the network namespace in which `kernel` was made."""

    def __init__(self, kernel: NftablesKernel) -> None:
        self._kernel = kernel
        self._sticky: set[_Frontend] = set()  # frontends with affinity, as far as was read or written

    def render_base(self, facts: NodeFacts) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return base_entries(facts)

    def render_route(self, route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return render_route(route, facts, present)

    def rerenders(self, before: NodeFacts, after: NodeFacts) -> bool:
        """See `kproxy.dataplane.base.Dataplane`."""
        return before.ips != after.ips

    def is_shared(self, key: Key) -> bool:
        """See `kproxy.dataplane.base.Dataplane`."""
        # Tables, sets and chains are nobody's alone: something may still refer to one when a Service gives it up.
        return not isinstance(key, bytes) or key[0] in _SHARED_CONTAINERS

    def read(self) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        entries = self._kernel.read()
        self._sticky = {_frontend(key) for key in entries if isinstance(key, bytes) and key[0] in _LEARNS}
        return entries

    def apply(self, changes: Iterable[Change]) -> None:
        """See `kproxy.dataplane.base.Dataplane`. Clients of endpoints that leave lose their affinity with them."""
        changes = list(changes)
        departed = _Departures(changes, self._sticky)
        forgotten = list(self._forgotten(departed))
        self._kernel.apply(changes + forgotten)
        for change in changes:
            if isinstance(change.key, bytes) and change.key[0] in _LEARNS:
                (self._sticky.discard if change.new is None else self._sticky.add)(_frontend(change.key))
        # A connection that was being translated meanwhile may have been noted after the list was made.
        late = list(self._forgotten(departed))
        if late:
            self._kernel.apply(late)

    def _forgotten(self, departed: _Departures) -> Iterator[Change]:
        for family in departed.families:
            for key, value in self._kernel.affinity(family).items():
                if departed.concerns(family, key, value):
                    yield Change(key, value, None)

    def describe(self, key: Key, value: Value) -> str:
        """See `kproxy.dataplane.base.Dataplane`."""
        return describe(key, value)

    def labels(self, entries: Mapping[Key, Value]) -> Mapping[Key, ServiceName]:
        """See `kproxy.dataplane.base.Dataplane`. What has no comment goes by the frontend, or else by its address."""
        found: dict[Key, ServiceName] = {}
        services: dict[_Frontend, ServiceName] = {}
        for key, value in entries.items():
            comment = value[1] if isinstance(value, tuple) else value
            if isinstance(key, bytes) and isinstance(comment, str) and "/" in comment:
                namespace, _, name = comment.partition(":")[0].partition("/")
                service = found[key] = ServiceName(namespace, name)
                family, frontend = _frontend(key)
                services[family, frontend] = services[family, frontend[: family.bits // 8]] = service
        for key in entries:
            if isinstance(key, bytes) and key not in found and _frontend(key) in services:
                found[key] = services[_frontend(key)]
        return found


class _Departures:
    """What a transaction takes away from clients that stick: endpoints, or all of a frontend's affinity."""

    def __init__(self, changes: Iterable[Change], sticky: set[_Frontend]) -> None:
        self._sticky = sticky
        self._reset: set[_Frontend] = set()
        self._lost: defaultdict[_Frontend, set[Value]] = defaultdict(set)
        moved: defaultdict[tuple[int, _Frontend], tuple[set[Value], set[Value]]] = defaultdict(lambda: (set(), set()))
        for change in changes:
            key = change.key
            if not isinstance(key, bytes):
                continue
            frontend = _frontend(key)
            if key[0] in _LEARNS:
                self._reset.add(frontend)  # affinity begins, ends or has another timeout
            elif frontend in sticky and change.old is not None:
                if key[0] in _POLICIES:
                    self._reset.add(frontend)
                elif key[0] in _ENDPOINTS:
                    moved[key[0], frontend][0].add(change.old)
            if key[0] in _ENDPOINTS and change.new is not None and frontend in sticky:
                moved[key[0], frontend][1].add(change.new)
        for (_, frontend), (left, came) in moved.items():
            self._lost[frontend] |= left - came

    @property
    def families(self) -> set[Family]:
        """Families in which there is something to forget."""
        return {family for family, _ in (*self._reset, *(where for where, values in self._lost.items() if values))}

    def concerns(self, family: Family, key: bytes, value: bytes) -> bool:
        """Whether a client's affinity is for something that departs."""
        source = container(family, "affinity").key_fields[0].registers * 4
        original = key[1 + source :]
        at_address, node_port = (family, original), (family, original[source:])
        if self._takes_from(at_address, value):
            return True
        # A service port of the same number as a node port has clients of its own.
        return at_address not in self._sticky and self._takes_from(node_port, value)

    def _takes_from(self, frontend: _Frontend, value: bytes) -> bool:
        return frontend in self._reset or value in self._lost.get(frontend, ())


def _frontend(key: bytes) -> _Frontend:
    """The frontend that an element is about."""
    found = CONTAINERS[key[0]]
    if key[0] in _ENDPOINTS:
        return found.family, key[1:-SLOT_LENGTH]
    if found.has_intervals:  # the frontend and the ends of a range of sources
        return found.family, key[1 : 1 + found.key_length - found.key_fields[-1].registers * 4]
    return found.family, key[1:]
