"""From changes to the messages of a transaction, in an order that the kernel accepts.

Tables come before sets, sets before chains, chains before rules, rules before elements; removals go the other way.
A `Unit` must not be torn where a transaction is too large for the socket: between units, what is there works.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from kproxy.dataplane.base import ApplyError, Change, Value
from kproxy.dataplane.nftables import structure
from kproxy.dataplane.nftables.containers import CONTAINERS, Container
from kproxy.dataplane.nftables.elements import Step, additions, removals
from kproxy.dataplane.nftables.nfnetlink import Flag, Message, Msg
from kproxy.dataplane.nftables.ruleset import (
    KUBE_PROXY_TABLE,
    TABLE_NAME,
    Chain,
    ChainKey,
    KubeProxyTableKey,
    SetKey,
    TableKey,
)
from kproxy.model import Family

Unit = tuple[Step, ...]
_EXCHANGED_TOGETHER = 400  # elements, so that a unit fits the smallest default send buffer (208 KiB)


def plan(changes: Iterable[Change], table_flags: int, removal_of_learned: Msg, counted_endpoints: int) -> list[Unit]:
    """What to send for changes. Raises ApplyError for an entry that cannot be expressed.

    `table_flags` are those of new tables; `removal_of_learned` is the message that removes elements which may
    expire meanwhile; a map of endpoints that begins with more than `counted_endpoints` has no counters.
    """
    structures: list[Change] = []
    elements: dict[int, list[Change]] = defaultdict(list)
    for change in changes:
        key = change.key
        if type(key) is bytes:
            elements[key[0]].append(change)
        else:
            structures.append(change)

    def is_counted(container: Container) -> bool:
        few = container.data == "verdict" or len(elements.get(container.number, ())) <= counted_endpoints
        return container.counter and counted_endpoints > 0 and few

    units = _Units(table_flags, is_counted)
    for change in structures:
        try:
            units.add(change)
        except ValueError as error:
            raise ApplyError(f"{change.key}: {error}", (change.key,)) from None
    going = units.going
    for number, changed in elements.items():
        container = CONTAINERS[number]
        if container.family not in going:
            units.add_elements(container, changed, removal_of_learned)
    return units.in_order()


class _Units:
    def __init__(self, table_flags: int, is_counted: Callable[[Container], bool]) -> None:
        self._table_flags = table_flags
        self._is_counted = is_counted
        self.going: set[Family] = set()  # the whole table is deleted, and all else with it
        self._tables: list[Unit] = []
        self._sets: list[Unit] = []
        self._chains: list[Unit] = []
        self._rules: list[Unit] = []
        self._elements: list[Unit] = []
        self._element_removals: list[Unit] = []
        self._flushes: list[tuple[Family, Step]] = []
        self._chain_removals: list[tuple[Family, Step]] = []
        self._set_removals: list[tuple[Family, Step]] = []
        self._table_removals: list[Unit] = []

    def in_order(self) -> list[Unit]:
        additions = self._tables + self._sets + self._chains + self._rules + self._elements
        removals = [
            (step,)
            for family, step in self._flushes + self._chain_removals + self._set_removals
            if family not in self.going
        ]
        return additions + self._element_removals + removals + self._table_removals

    def add(self, change: Change) -> None:
        match change.key:
            case TableKey(family):
                self._table(family, change)
            case KubeProxyTableKey(family):
                self._table_removals.append((Step(structure.delete_table(family, KUBE_PROXY_TABLE), (change.key,)),))
            case SetKey(family, name):
                self._set(family, name, change)
            case ChainKey(family, name):
                self._chain(family, name, change)
            case other:
                raise ApplyError(f"{other!r} is not a key of the nftables mode", (change.key,))

    def _table(self, family: Family, change: Change) -> None:
        deletion = Step(structure.delete_table(family, TABLE_NAME), (change.key,))
        if change.new is None:
            self.going.add(family)
            self._table_removals.append((deletion,))
            return
        addition = Step(structure.new_table(family, self._table_flags, Flag.CREATE | Flag.EXCL), (change.key,))
        self._tables.append((deletion, addition) if change.old is not None else (addition,))

    def _set(self, family: Family, name: str, change: Change) -> None:
        match change.new:
            case None:
                self._set_removals.append((family, Step(structure.delete_set(family, name), (change.key,))))
            case Container() as container:
                creation = structure.new_set(container, counted=self._is_counted(container))
                self._sets.append((Step(creation, (change.key,)),))
            case other:
                raise ApplyError(f"{other!r} is not a set of this layout", (change.key,))

    def _chain(self, family: Family, name: str, change: Change) -> None:
        def step(message: Message) -> Step:
            return Step(message, (change.key,))

        flush = step(structure.flush_chain(family, name))
        deletion = step(structure.delete_chain(family, name))
        match change.old, change.new:
            case _, None:
                self._flushes.append((family, flush))
                self._chain_removals.append((family, deletion))
            case old, Chain(hook=hook, rules=rules):
                creation = step(structure.new_chain(family, name, hook))
                if isinstance(old, Chain) and old.hook != hook:
                    self._chains.append((flush, deletion, creation))
                else:
                    self._chains.append((creation,))
                # The flush also serves a new chain: its predecessor may be there yet, because the kernel held on to it.
                self._rules.append((flush, *(step(structure.append_rule(family, name, rule)) for rule in rules)))
            case _, other:
                raise ApplyError(f"{other!r} is not a chain", (change.key,))

    def add_elements(self, container: Container, changes: list[Change], removal_of_learned: Msg) -> None:
        """Elements of one container."""
        added: list[tuple[bytes, Value]] = []
        changed: list[tuple[bytes, Value]] = []
        removed: list[bytes] = []
        for change in changes:
            key, new = change.key, change.new
            assert isinstance(key, bytes)  # noqa: S101 - by the caller's choice; for the type checker
            if new is None:
                removed.append(key)
            elif change.old is None:
                added.append((key, new))
            else:
                changed.append((key, new))
        for start in range(0, len(changed), _EXCHANGED_TOGETHER):
            part = changed[start : start + _EXCHANGED_TOGETHER]
            self._elements.append((*removals(container, (key for key, _ in part)), *additions(container, part)))
        removal = removals(container, removed, removal_of_learned if container.learned else Msg.DELSETELEM)
        if container.has_intervals:
            # The kernel refuses an interval that overlaps one which goes later in the same transaction.
            self._elements.extend((step,) for step in removal)
        else:
            self._element_removals.extend((step,) for step in removal)
        self._elements.extend((step,) for step in additions(container, added))
