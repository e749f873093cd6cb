"""The kernel side of the nftables mode: read what it holds of ours, and change it in one transaction."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, Self

from kproxy.dataplane.base import ApplyError, Change, Entries, UnsupportedError, Value
from kproxy.dataplane.nftables import structure
from kproxy.dataplane.nftables.containers import CONTAINERS, Container, container
from kproxy.dataplane.nftables.describe import describe
from kproxy.dataplane.nftables.elements import LIST_ELEMENTS, Step, element_at, location, parse, parse_counters
from kproxy.dataplane.nftables.expressions import NFPROTO, Rule
from kproxy.dataplane.nftables.features import OWNED_AND_PERSISTENT, Features, probe
from kproxy.dataplane.nftables.fields import FAMILY_WORDS
from kproxy.dataplane.nftables.nfnetlink import Flag, MessageError, Msg, NetlinkSocket, Nfproto, parsed, string
from kproxy.dataplane.nftables.plan import Unit, plan
from kproxy.dataplane.nftables.ruleset import (
    KUBE_PROXY_TABLE,
    TABLE_NAME,
    Chain,
    ChainKey,
    Hook,
    KubeProxyTableKey,
    SetKey,
    Table,
    TableKey,
    UnknownSet,
)
from kproxy.model import Family
from kproxy.netlink import DumpInterruptedError

COUNTED_ENDPOINTS = 20_000
_READ_SECONDS = 10.0
_COUNTED_ATTEMPTS = 3  # before a set's own count of its elements (since Linux 6.16) is doubted instead of the dump
_EXPIRY_ATTEMPTS = 5
_FRAME_BYTES = 24  # headers and padding of a message, at most
_GENERATION = 1  # NFTA_GEN_ID
_TABLE_NAME_ATTRIBUTE = 1
_OF_ELEMENTS = frozenset((Msg.NEWSETELEM, Msg.DELSETELEM, Msg.DESTROYSETELEM))
# Not the fault of what was asked for: the same may work later.
_TRANSIENT = frozenset((errno.EPERM, errno.EBUSY, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR))


class NftablesKernel:
    """Our tables in the network namespace of the thread that creates it.

    Where the kernel has it (6.9), the tables belong to this object until it is closed: nobody else can change or flush
    them, and they stay when it goes. Raises UnsupportedError if there is no nfnetlink.

    `counted_endpoints`: a map of endpoints that begins with more of them has no counters, for each takes memory for
    every CPU, and makes reading back slower (docs/decisions.md). 0: nothing is counted.
    """

    def __init__(
        self,
        families: Sequence[Family],
        features: Features | None = None,
        *,
        counted_endpoints: int = COUNTED_ENDPOINTS,
    ) -> None:
        try:
            self._socket = NetlinkSocket()
        except OSError as error:
            raise UnsupportedError(f"nftables mode: no netlink socket to netfilter: {error.strerror}") from error
        self._families = tuple(families)
        self._counted_endpoints = counted_endpoints
        self._known_features = features
        self._settled: set[Family] = set()  # families whose table needs no taking over

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the tables; they stay in force."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port that our changes come from; a monitor leaves them out by it."""
        return self._socket.port

    @property
    def features(self) -> Features:
        """What the kernel can do beyond the necessary."""
        if self._known_features is None:
            self._known_features = probe(self._socket, self._families)
        return self._known_features

    def probe(self) -> None:
        """Try all that the mode needs, without leaving a trace. Raises UnsupportedError."""
        self._known_features = probe(self._socket, self._families)

    def protected(self) -> bool:
        """Whether nobody else can change our tables. Raises OSError."""
        tables = [self._table(family) or {} for family in self._families]
        return all(int.from_bytes(table.get(structure.TABLE_OWNER, b""), "big") == self.port for table in tables)

    def tables(self) -> Entries:
        """Our tables that are there, without what is in them, and those of kube-proxy. Raises OSError."""
        entries: Entries = {}
        for family in self._families:
            if self._table(family) is not None:
                entries[TableKey(family)] = Table()
            if self._table(family, KUBE_PROXY_TABLE) is not None:
                entries[KubeProxyTableKey(family)] = Table()
        return entries

    # --- reading ---

    def read(self) -> Entries:
        """What the kernel holds of ours, except what packets put there. Raises OSError.

        kube-proxy's table counts too: its rules would translate the same packets a second time, so nobody wants it.
        Where our table is there but is not one that changes can turn into ours, it is all there is: a `Table` with the
        fault, so that everything is written into a new one.
        """
        for attempt in _attempts():
            generation = self._generation()
            try:
                entries = self._read_once(counted=attempt < _COUNTED_ATTEMPTS)
            except DumpInterruptedError:
                continue
            if generation == self._generation():
                return entries
        raise OSError(errno.EAGAIN, "the ruleset was changed again and again while it was read")

    def _generation(self) -> bytes:
        return parsed(self._socket.get(Msg.GETGEN, Nfproto.UNSPEC).attributes)[_GENERATION]

    def _read_once(self, *, counted: bool) -> Entries:
        entries: Entries = {}
        for family in self._families:
            if self._table(family, KUBE_PROXY_TABLE) is not None:
                entries[KubeProxyTableKey(family)] = Table()
            found = self._table(family)
            if found is None:
                continue
            flags = int.from_bytes(found.get(structure.TABLE_FLAGS, b""), "big")
            if flags & structure.TABLE_DORMANT:
                entries[TableKey(family)] = Table("dormant")
                continue
            inside = self._read_sets(family, counted=counted)
            if isinstance(inside, str):
                entries[TableKey(family)] = Table(inside)
                continue
            entries[TableKey(family)] = Table()
            entries.update(inside)
            entries.update(self._read_chains(family))
        return entries

    def _table(self, family: Family, name: str = TABLE_NAME) -> dict[int, bytes] | None:
        try:
            return parsed(
                self._socket.get(Msg.GETTABLE, NFPROTO[family], string(_TABLE_NAME_ATTRIBUTE, name)).attributes
            )
        except FileNotFoundError:
            return None

    def _read_sets(self, family: Family, *, counted: bool) -> Entries | str:
        """Sets with their elements, or why the table is none of this layout."""
        entries: Entries = {}
        counts: list[tuple[Container, int | None]] = []
        for received in self._dump(Msg.GETSET, family):
            name, found = structure.read_set(family, received)
            match found:
                case str(fault):
                    return fault
                case UnknownSet():
                    pass
                case Container(learned=False):
                    counts.append((found, structure.element_count(received)))
            entries[SetKey(family, name)] = found
        for found, count in counts:
            before = len(entries)
            for elements in self._dump_elements(found):
                entries.update(parse(found, elements))
            # A hash table that grows in the background moves elements about under the dump.
            if counted and count is not None and len(entries) - before < count:
                raise DumpInterruptedError(errno.EINTR, f"{found} was read in part")
        return entries

    def _read_chains(self, family: Family) -> Entries:
        hooks: dict[str, Hook | None] = {}
        rules: dict[str, list[Rule]] = {}
        for received in self._dump(Msg.GETCHAIN, family):
            name, hooks[name] = structure.read_hook(received)
            rules[name] = []
        for received in self._dump(Msg.GETRULE, family):
            name, rule = structure.read_rule(received)
            rules.setdefault(name, []).append(rule)
        return {ChainKey(family, name): Chain(hook, tuple(rules[name])) for name, hook in hooks.items()}

    def _dump(self, kind: Msg, family: Family) -> list[bytes]:
        """Objects of our table; all of them, since the kernel takes no other request before a dump has ended."""
        table = string(_TABLE_NAME_ATTRIBUTE, TABLE_NAME)
        dumped = [received.attributes for received in self._socket.dump(kind, NFPROTO[family], table)]
        return [attributes for attributes in dumped if attributes.startswith(table)]  # chains come from all tables

    def _dump_elements(self, where: Container) -> Iterator[bytes]:
        for received in self._socket.dump(Msg.GETSETELEM, NFPROTO[where.family], location(where)):
            yield parsed(received.attributes).get(LIST_ELEMENTS, b"")

    def counters(self, where: Container) -> Iterator[tuple[bytes, Value, int]]:
        """Elements of a container, key and value, with the packets that they matched. Raises OSError.

        None where they are not counted, or have become too many to be listed again and again. A change during the
        listing is no error: a count may then be missing once, or be there twice.
        """
        try:
            found = self._socket.get(Msg.GETSET, NFPROTO[where.family], structure.set_name(where)).attributes
            many = where.data != "verdict" and (structure.element_count(found) or 0) > 2 * self._counted_endpoints
            if many or not structure.is_counted(found):
                return
            for elements in self._dump_elements(where):
                yield from parse_counters(where, elements)
        except (DumpInterruptedError, FileNotFoundError):
            return

    def affinity(self, family: Family) -> dict[bytes, bytes]:
        """Which endpoint each client of sticky services got: key of the element → address and port. Raises OSError."""
        learned = container(family, "affinity")
        for _ in _attempts():
            found: dict[bytes, bytes] = {}
            try:
                for elements in self._dump_elements(learned):
                    found.update((key, value) for key, value in parse(learned, elements) if isinstance(value, bytes))
            except DumpInterruptedError:
                continue
            except FileNotFoundError:
                return {}
            return found
        raise OSError(errno.EAGAIN, "the ruleset was changed again and again while it was read")

    # --- writing ---

    def apply(self, changes: Iterable[Change]) -> None:
        """Make the changes in one transaction.

        Where the send buffer may not be widened (user namespaces of older kernels), a large change takes several
        transactions, additions first.
        Removals of learned elements may name some that have expired. Raises ApplyError.
        """
        changes = list(changes)
        for attempt in range(_EXPIRY_ATTEMPTS):
            units = self._plan(changes)
            try:
                self._send(units)
            except _Expired:
                if attempt + 1 == _EXPIRY_ATTEMPTS:
                    raise ApplyError(
                        "clients' affinities expire faster than they can be removed", transient=True
                    ) from None
                continue
            break
        self._note_settled(changes)

    def _plan(self, changes: list[Change]) -> list[Unit]:
        try:
            owner, destroy = self.features
            taken_over = self._taken_over(changes) if owner else []
            present = changes if destroy else self._without_expired(changes)
        except OSError as error:
            raise ApplyError(f"nftables: {error.strerror}", transient=True) from error
        flags = OWNED_AND_PERSISTENT if owner else 0
        removal = Msg.DESTROYSETELEM if destroy else Msg.DELSETELEM
        return taken_over + plan(present, flags, removal, self._counted_endpoints)

    def _taken_over(self, changes: list[Change]) -> list[Unit]:
        """What makes tables ours whose owner has gone."""
        units: list[Unit] = []
        replaced = {change.key for change in changes if isinstance(change.key, TableKey)}
        for family in self._families:
            if family in self._settled:
                continue
            table = self._table(family)
            if table is None:
                continue
            owner = int.from_bytes(table.get(structure.TABLE_OWNER, b""), "big")
            if owner and owner != self.port:
                raise ApplyError(_owned_by_another(family, owner), transient=True)
            flags = int.from_bytes(table.get(structure.TABLE_FLAGS, b""), "big")
            # The kernel lets a table be taken over only if it was made to outlive its owner.
            if flags & structure.TABLE_PERSIST and TableKey(family) not in replaced:
                message = structure.new_table(family, OWNED_AND_PERSISTENT, Flag.NONE)
                units.append((Step(message, (TableKey(family),)),))
        return units

    def _note_settled(self, changes: list[Change]) -> None:
        if not changes:
            return
        self._settled.update(self._families)
        self._settled.difference_update(c.key.family for c in changes if isinstance(c.key, TableKey) and c.new is None)

    def _without_expired(self, changes: list[Change]) -> list[Change]:
        """Without removals of learned elements that are not there any more, for a kernel that would refuse them."""
        learned = {container(family, "affinity").number: family for family in self._families}
        removed = [c.key for c in changes if c.new is None and isinstance(c.key, bytes) and c.key[0] in learned]
        there: set[bytes] = set()
        for family in {learned[key[0]] for key in removed}:
            there.update(self.affinity(family))
        gone = {key for key in removed if key not in there}
        return [change for change in changes if change.key not in gone] if gone else changes

    def _send(self, units: list[Unit]) -> None:
        size = sum(_size(unit) for unit in units)
        room = self._socket.room(size + 2 * _FRAME_BYTES) - 2 * _FRAME_BYTES
        batch: list[Step] = []
        filled = 0
        for unit in units:
            if batch and filled + _size(unit) > room:
                self._transact(batch)
                batch, filled = [], 0
            batch.extend(unit)
            filled += _size(unit)
        if batch:
            self._transact(batch)

    def _transact(self, steps: list[Step]) -> None:
        try:
            errors = self._socket.transact([step.message for step in steps])
        except OSError as error:
            raise ApplyError(
                f"nftables: the transaction could not be sent: {error.strerror}", transient=True
            ) from error
        if not errors:
            return
        if any(error.errno == errno.ENOENT and _removes_learned(steps[error.position]) for error in errors):
            raise _Expired
        busy = {steps[e.position].keys for e in errors if e.position >= 0 and _deletes_busy_chain(e, steps[e.position])}
        busy -= {step.keys for step in steps if step.message.type is Msg.NEWCHAIN}
        if busy and all(steps[e.position].keys in busy for e in errors):
            # Kernels before 6.2 count the references of a removed element a moment longer. An unused chain does no
            # harm; the next read finds it.
            self._transact([step for step in steps if step.keys not in busy])
            return
        _refuse(errors, steps)


def _attempts() -> Iterator[int]:
    """Numbers, for as long as it makes sense to try again."""
    deadline = time.monotonic() + _READ_SECONDS
    for attempt in itertools.count():
        yield attempt
        if time.monotonic() > deadline:
            return


class _Expired(Exception):  # noqa: N818 - not an error: try again
    """A learned element that was to be removed is no more."""


def _size(unit: Unit) -> int:
    return sum(len(step.message.attributes) + _FRAME_BYTES for step in unit)


def _removes_learned(step: Step) -> bool:
    key = step.keys[0] if step.keys else None
    return step.message.type is Msg.DELSETELEM and isinstance(key, bytes) and CONTAINERS[key[0]].learned


def _deletes_busy_chain(error: MessageError, step: Step) -> bool:
    return error.errno == errno.EBUSY and step.message.type is Msg.DELCHAIN


def _owned_by_another(family: Family, port: int) -> str:
    return (
        f"table {FAMILY_WORDS[family]} {TABLE_NAME} belongs to another running process (netlink port {port}, as a rule "
        "its process id); end it, or let it have the node"
    )


def _refuse(errors: list[MessageError], steps: list[Step]) -> NoReturn:
    """Raise what the kernel said. Once a chain or set is refused, so is all that refers to it: name the first cause."""
    first = errors[0]
    if first.position < 0:
        reason = "CAP_NET_ADMIN is missing" if first.errno == errno.EPERM else os.strerror(first.errno)
        raise ApplyError(f"nftables: the kernel refused the transaction: {reason}", transient=True)
    refused = [(error, steps[error.position]) for error in errors if error.position >= 0]
    structural = [(error, step) for error, step in refused if step.message.type not in _OF_ELEMENTS]
    culprits = dict.fromkeys(key for error, step in structural or refused for key in _culprits(error, step))
    error, step = (structural or refused)[0]
    what = _culprits(error, step)
    subject = describe(what[0], None) if what else f"one of {len(step.keys)} elements"
    said = error.text or os.strerror(error.errno)
    if error.errno == errno.EPERM:
        said += "; the table belongs to another running process"
    raise ApplyError(
        f"nftables: {step.message.type.name} {subject}: {said} ({errno.errorcode.get(error.errno, error.errno)})",
        tuple(culprits),
        transient=all(error.errno in _TRANSIENT for error, _ in refused),
    )


def _culprits(error: MessageError, step: Step) -> tuple[object, ...]:
    if step.message.type not in _OF_ELEMENTS or len(step.keys) == 1:
        return step.keys
    key = element_at(step, error.offset) if error.offset else None
    return () if key is None else (key,)
