"""Tables, chains and rules: read from the text of iptables-save or -restore, or laid out as entries ask for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, JumpKey
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.rule import AnyRule
from kproxy.model import Family

Tables = dict[Table, dict[str, list[AnyRule]]]

BUILT_IN: Mapping[Table, tuple[str, ...]] = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}


def read_tables(lines: Iterable[str], family: Family) -> Tables:
    """The tables in the text of iptables-save or -restore. Deleted chains (`-X`) are left out."""
    tables: Tables = {}
    chains: dict[str, list[AnyRule]] = {}
    for line in lines:
        match line[:1], line.split(" ", 2):
            case "*", [table]:
                chains = tables.setdefault(table[1:], {})
            case ":", [chain, *_]:
                chains.setdefault(chain[1:], [])
            case "-", ["-A", chain, rule]:
                chains.setdefault(chain, []).append(parse_rule(rule, family))
            case "-", ["-X", chain]:
                chains.pop(chain)
    return tables


def laid_out(entries: Entries) -> Tables:
    """The tables that hold these entries, and nothing else."""
    tables: Tables = {table: {chain: [] for chain in chains} for table, chains in BUILT_IN.items()}
    last: defaultdict[tuple[Table, str], list[AnyRule]] = defaultdict(list)
    for key, value in sorted(entries.items(), key=lambda item: isinstance(item[0], JumpKey) and item[0].place):
        match key:
            case ChainKey(_, table, chain):
                tables[table].setdefault(chain, []).extend(value if isinstance(value, tuple) else ())
            case BlockKey(_, table, chain, "", ""):
                last[table, chain].extend(value)
            case BlockKey(_, table, chain):
                tables[table].setdefault(chain, []).extend(value)
            case JumpKey(_, table, chain):
                tables[table][chain].append(value)
    for (table, chain), rules in last.items():
        tables[table][chain].extend(rules)
    return tables


def restore_text(tables: Mapping[Table, Mapping[str, Iterable[AnyRule]]]) -> str:
    """What makes `iptables-restore --noflush` fill empty tables with these."""
    lines = []
    for table, chains in tables.items():
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in chains if chain not in BUILT_IN[table]]
        lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
        lines.append("COMMIT")
    return "\n".join([*lines, ""])
