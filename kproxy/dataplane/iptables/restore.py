"""Changes as commands of iptables-restore: what is written into each table, in which order, in how many commits.

Only what differs is written: a chain with all its rules, single rules of dispatch and built-in chains. New blocks go to
the top of their dispatch chain, so what belongs last stays last. As a rule each table takes one commit.

Bulk loads into the nft variant are the exception: iptables-nft takes a time that grows with the square of the chains
in one commit (docs/decisions.md). So many new chains go in first, unused as yet, those that others jump to before the
others; many that go are deleted last, when nothing jumps to them any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from kproxy.dataplane.base import Change, Key
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, Exists, JumpKey
from kproxy.dataplane.iptables.jumps import jumps_from
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.rule import AnyRule

TABLES: tuple[Table, ...] = ("filter", "nat", "mangle")  # in the order of writing: rejections before translations
BULK_CHAINS = 200
# Chains jump only to those that stand before them here, and to fixed ones.
_RANKS = (names.ENDPOINT, names.CLUSTER_POLICY, names.LOCAL_POLICY, names.EXTERNAL, names.FIREWALL)

Verb = Literal[":", "-A", "-D", "-I", "-X"]


class Command(NamedTuple):
    """One line between a table's name and COMMIT. ":" creates a chain, or empties it."""

    verb: Verb
    chain: str
    key: Key  # the entry for whose sake it is there
    rule: AnyRule | None = None

    def __str__(self) -> str:
        if self.verb == ":":
            return f":{self.chain} - [0:0]"
        return f"{self.verb} {self.chain} {self.rule}".rstrip() if self.rule else f"{self.verb} {self.chain}"


class Commit(msgspec.Struct, frozen=True):
    """What goes into one table at once."""

    table: Table
    commands: list[Command]


def commits(changes: Iterable[Change], *, bulk_chains: int | None) -> list[Commit]:
    """The commits that make the changes of one family. `bulk_chains`: how many chains to make or delete in one."""
    by_table: dict[Table, list[Change]] = {table: [] for table in TABLES}
    for change in changes:
        by_table[_where(change.key).table].append(change)
    return [
        Commit(table, commands)
        for table, of_table in by_table.items()
        for commands in _commits(of_table, bulk_chains)
        if commands
    ]


def _where(key: Key) -> ChainKey | BlockKey | JumpKey:
    if not isinstance(key, ChainKey | BlockKey | JumpKey):
        raise TypeError(f"{key!r} is no key of iptables mode")
    return key


def _commits(changes: Sequence[Change], bulk_chains: int | None) -> list[list[Command]]:
    """The commits of one table."""
    chains = [change for change in changes if isinstance(change.key, ChainKey)]
    created = sorted((c for c in chains if c.old is None), key=_rank)
    emptied = [c for c in chains if c.old is not None and c.new is not None]
    removed = sorted((c for c in chains if c.new is None), key=_rank, reverse=True)
    before: list[list[Command]] = []
    after: list[list[Command]] = []
    released: list[Command] = []  # chains that hold on to others by jumping there
    if bulk_chains and len(created) > bulk_chains:
        before = [_written(part) for part in _parts(created, bulk_chains)]
        created = []
    if bulk_chains and len(removed) > bulk_chains:
        after = [_deleted(part) for part in _parts(removed, bulk_chains)]
        released = [Command(":", _where(change.key).chain, change.key) for change in removed if not _rank(change)]
        removed = []
    gone = {_where(change.key).chain for change in chains if change.new is None}
    deletions, additions = _single_rules(changes, gone)
    deleted = _deleted(removed)
    main = [
        *released,
        *(command for command in deleted if command.verb == ":"),
        *deletions,
        *_written([*created, *emptied]),
        *additions,
        *(command for command in deleted if command.verb == "-X"),
    ]
    return [*before, main, *after]


def _parts(changes: Sequence[Change], size: int) -> list[Sequence[Change]]:
    return [changes[start : start + size] for start in range(0, len(changes), size)]


def _rank(change: Change) -> int:
    chain = _where(change.key).chain
    return next((rank for rank, prefix in enumerate(_RANKS, 1) if chain.startswith(prefix)), 0)


def _written(changes: Sequence[Change]) -> list[Command]:
    """Chains with their rules. Where only the chain is ours, its rules stay."""
    chains = [Command(":", _where(c.key).chain, c.key) for c in changes if c.old is None or not _exists(c.new)]
    rules = [Command("-A", _where(c.key).chain, c.key, rule) for c in changes for rule in _rules(c.new)]
    return chains + rules


def _deleted(changes: Sequence[Change]) -> list[Command]:
    emptied = [Command(":", _where(change.key).chain, change.key) for change in changes]
    return emptied + [Command("-X", _where(change.key).chain, change.key) for change in changes]


def _single_rules(changes: Sequence[Change], gone: set[str]) -> tuple[list[Command], list[Command]]:
    """Rules to take out of chains that stay, and rules to put into them."""
    deletions: list[Command] = []
    blocks: list[Command] = []
    last: list[Command] = []
    jumps: list[Change] = []
    for change in [*changes, *_copied_jumps(changes)]:
        key = change.key
        if isinstance(key, ChainKey):
            continue
        where = _where(key)
        if where.chain not in gone:
            deletions += [Command("-D", where.chain, key, rule) for rule in _rules(change.old)]
        match key:
            case JumpKey():
                jumps.append(change)
            case BlockKey(service_port="", protocol=""):
                last += [Command("-A", where.chain, key, rule) for rule in _rules(change.new)]
            case _:
                blocks += [Command("-I", where.chain, key, rule) for rule in _rules(change.new)]
    # Each goes to the top of its chain, so what belongs there comes last. iptables-nft looks for a rule to delete from
    # the top: in the order in which the entries are, many are found soon (5,000 services: 1.1 s, the other way 10 s).
    jumps.sort(key=lambda change: change.key.place if isinstance(change.key, JumpKey) else 0, reverse=True)
    jumped = [Command("-I", _where(c.key).chain, c.key, rule) for c in jumps for rule in _rules(c.new)]
    return deletions, [*reversed(blocks), *last, *jumped]


def _copied_jumps(changes: Sequence[Change]) -> list[Change]:
    """Jumps of which a second copy goes. They go as well, and come back at the top.

    A rule is deleted by what it says, and so the first one would go, and what others have put before the second one
    would come first.
    """
    concerned = {change.key for change in changes}
    copied: dict[Key, Change] = {}
    for change in changes:
        match change:
            case Change(JumpKey(family, table, chain), old, None):
                for place, jump in enumerate(jumps_from(table, chain)):
                    key = JumpKey(family, table, chain, place)
                    if jump.rule == old and key not in concerned:
                        copied[key] = Change(key, old, old)
            case _:
                pass
    return list(copied.values())


def _exists(value: object) -> bool:
    return isinstance(value, Exists)


def _rules(value: object) -> tuple[AnyRule, ...]:
    """The rules in an entry's value: a chain or block has several, a jump is one."""
    if value is None or isinstance(value, Exists):
        return ()
    return value if isinstance(value, tuple) else (value,)
