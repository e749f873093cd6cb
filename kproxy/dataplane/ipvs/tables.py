"""The iptables part of ipvs mode in the kernel: reads our chains and jumps, and writes those that change.

Rules change seldom, when the first member of a set comes or the last one goes, and there are few. So a chain that gets
any is read again and written as a whole, all of a table in one commit.

What iptables mode left in chains that both have goes last, so nat KUBE-SERVICES holds the rules of both for a while.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from kproxy.dataplane.base import Change, Entries, Key
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey, JumpKey
from kproxy.dataplane.iptables.names import SERVICES, Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.refusal import refusal
from kproxy.dataplane.iptables.restore import TABLES, Command, Commit
from kproxy.dataplane.iptables.rule import AnyRule, OpaqueRule, Rule
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.dataplane.ipvs.blocks import masqueraded_meanwhile
from kproxy.dataplane.ipvs.chains import chain_entries, concerns_us, laid_out
from kproxy.dataplane.ipvs.entries import STRAY, RuleKey
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
    touched: defaultdict[ChainKey, list[Change]] = defaultdict(list)
    jumps: defaultdict[Table, list[tuple[JumpKey, Change]]] = defaultdict(list)
    for change in changes:
        if change.new is None:
            wanted.pop(change.key, None)
        else:
            wanted[change.key] = change.new
        match change.key:
            case JumpKey() as key:
                jumps[key.table].append((key, change))
            case ChainKey(family, table, chain) | RuleKey(family, table, chain):
                touched[ChainKey(family, table, chain)].append(change)
            case key:
                raise TypeError(f"{key!r} has nothing to do with iptables")
    for key, of_chain in touched.items():
        if (key.table, key.chain) == ("nat", SERVICES):
            of_chain += _of_both_modes(key, of_chain, wanted)
    chains = laid_out(wanted)
    planned = []
    for table in TABLES:
        # The first jump to be written comes to stand lowest.
        moved = sorted(jumps[table], key=lambda jump: jump[0].place, reverse=True)
        before = [Command("-D", key.chain, key, rule) for key, _ in moved for rule in _rules(present.get(key))]
        emptied: list[Command] = []
        filled: list[Command] = []
        deleted: list[Command] = []
        for key, of_chain in touched.items():
            if key.table != table:
                continue
            sake = of_chain[0].key
            if key not in wanted:
                if key in present:
                    emptied.append(Command(":", key.chain, sake))
                    deleted.append(Command("-X", key.chain, sake))
            elif key in present and all(change.new is None for change in of_chain):
                # One by one, as others may have put theirs in between.
                before += [
                    Command("-D", key.chain, change.key, rule)
                    for change in of_chain
                    for rule in _rules(present.get(change.key))
                ]
            else:
                emptied.append(Command(":", key.chain, sake))
                filled += [Command("-A", key.chain, sake, rule) for rule in chains[key]]
        added = [Command("-I", key.chain, key, rule) for key, change in moved for rule in _rules(change.new)]
        if commanded := [*before, *emptied, *filled, *added, *deleted]:
            planned.append(Commit(table, commanded))
    return planned


def _of_both_modes(chain: ChainKey, changes: Sequence[Change], wanted: Entries) -> list[Change]:
    """Puts into `wanted` what a chain needs while it holds rules of both modes. Returns what goes when that is over."""
    ahead = masqueraded_meanwhile(chain.family)
    places = {key.place for key in wanted if isinstance(key, RuleKey) and key[:3] == chain}
    if STRAY in places and max(places) > STRAY:
        if any(change.new is not None for change in changes):  # else rules only go
            wanted[ahead.key] = ahead.rules
    elif ahead.key in wanted:
        return [Change(ahead.key, wanted.pop(ahead.key), None)]
    return []


def _rules(value: object) -> tuple[AnyRule, ...]:
    """The rules of an entry: a jump is one, a block has several, a chain as such has none."""
    if isinstance(value, tuple):
        return value
    return (value,) if isinstance(value, Rule | OpaqueRule) else ()
