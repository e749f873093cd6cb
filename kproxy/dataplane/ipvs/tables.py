"""The iptables part of ipvs mode in the kernel: reads our chains and jumps, and writes those that change.

Rules change seldom, when the first member of a set comes or the last one goes, and there are few. So a chain in which
anything changes is read again and written as a whole, all of a table in one commit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from kproxy.dataplane.base import Change, Entries, Key
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey, JumpKey
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.refusal import refusal
from kproxy.dataplane.iptables.restore import TABLES, Command, Commit
from kproxy.dataplane.iptables.rule import AnyRule, OpaqueRule, Rule
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.dataplane.ipvs.chains import chain_entries, concerns_us, laid_out
from kproxy.dataplane.ipvs.entries import RuleKey
from kproxy.model import Family

TableKey = ChainKey | RuleKey | JumpKey


def read(variant: Variant, families: Iterable[Family]) -> Entries:
    """Our chains, their rules and the jumps to them. Changes nothing. Raises OSError."""
    entries: Entries = {}
    for family in families:
        if variant is Variant.LEGACY and not legacy_tables(family):
            continue  # asking for a legacy table makes it
        tables: defaultdict[Table, dict[str, list[AnyRule]]] = defaultdict(dict)
        for table, chain, rule in commands.sections(commands.save(variant, family)):
            if not concerns_us(table, chain):
                continue
            rules = tables[table].setdefault(chain, [])
            if rule is not None:
                rules.append(parse_rule(rule, family))
        entries |= chain_entries(family, tables)
    return entries


def write(variant: Variant, family: Family, changes: Sequence[Change]) -> None:
    """Make changes of one family. Raises RefusedError, whose culprits are keys, and OSError."""
    planned = commits(changes, read(variant, [family]))
    given = list(commands.lines(planned))
    done = commands.restore(variant, family, given)
    if done.returncode:
        raise refusal(commands.program(variant, family, "restore"), done.stderr, given)


def commits(changes: Sequence[Change], present: Mapping[Key, object]) -> list[Commit]:
    """The commits that make the changes of one family, where `present` is what the kernel holds of it."""
    wanted: Entries = dict(present)
    jumps: list[tuple[JumpKey, Change]] = []
    touched: dict[ChainKey, Key] = {}  # and for the sake of which entry
    for change in changes:
        if change.new is None:
            wanted.pop(change.key, None)
        else:
            wanted[change.key] = change.new
        match change.key:
            case JumpKey() as key:
                jumps.append((key, change))
            case ChainKey() as key:
                touched[key] = key
            case RuleKey(family, table, chain) as key:
                touched.setdefault(ChainKey(family, table, chain), key)
            case key:
                raise TypeError(f"{key!r} has nothing to do with iptables")
    chains = {key: rules for key, rules in laid_out(wanted).items() if key in wanted}
    return [
        Commit(table, commanded) for table in TABLES if (commanded := _commands(table, touched, chains, jumps, present))
    ]


def _commands(
    table: Table,
    touched: Mapping[ChainKey, Key],
    chains: Mapping[ChainKey, Sequence[AnyRule]],
    jumps: Collection[tuple[JumpKey, Change]],
    present: Mapping[Key, object],
) -> list[Command]:
    here = {key: sake for key, sake in touched.items() if key.table == table}
    kept = [key for key in here if key in chains]
    gone = [key for key in here if key not in chains and key in present]
    of_table = sorted((jump for jump in jumps if jump[0].table == table), key=lambda jump: jump[0].place)
    # The first to be written comes to stand lowest.
    removed = [Command("-D", key.chain, key, rule) for key, _ in of_table for rule in _rules(present.get(key))]
    added = [Command("-I", key.chain, key, rule) for key, change in reversed(of_table) for rule in _rules(change.new)]
    return [
        *removed,
        *(Command(":", key.chain, here[key]) for key in (*kept, *gone)),
        *(Command("-A", key.chain, here[key], rule) for key in kept for rule in chains[key]),
        *added,
        *(Command("-X", key.chain, key) for key in gone),
    ]


def _rules(value: object) -> tuple[AnyRule, ...]:
    """The rule of a jump, where there is one."""
    return (value,) if isinstance(value, Rule | OpaqueRule) else ()
