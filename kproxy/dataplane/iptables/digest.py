"""What our chains hold as one number for a family: what is read and what is written add up to the same.

It is the sum of a hash for each chain and each rule, so a write of ours moves it by what it changes, however much else
there is. Who prints the rules later knows whether somebody else has changed one. The hashes hold for this process.
"""

from __future__ import annotations

from collections.abc import Iterable

from kproxy.dataplane.base import Change, Key, Value
from kproxy.dataplane.iptables.commands import sections
from kproxy.dataplane.iptables.entries import BUILT_IN, DISPATCH, BlockKey, ChainKey, JumpKey, concerns_us


def of_saved(saved: str) -> int:
    """The number for what iptables-save printed of one family."""
    total = place = 0
    before = ("", "")
    for table, chain, rule in sections(saved):
        if rule is None:
            if (table, chain) not in BUILT_IN and concerns_us(table, chain):
                total += hash((table, chain, None))
            continue
        where = table, chain
        if where != before:  # a chain's rules stand together
            before, place = where, 0
            built_in, ours, in_order = where in BUILT_IN, concerns_us(table, chain), where not in DISPATCH
        if built_in:
            total += hash((table, chain, rule)) if "KUBE-" in rule else 0
        elif ours:
            total += hash((table, chain, place, rule)) if in_order else hash((table, chain, rule))
            place += 1
    return total


def of_changes(changes: Iterable[Change]) -> int:
    """By how much changes in one family move the number."""
    return sum(_of_entry(change.key, change.new) - _of_entry(change.key, change.old) for change in changes)


def _of_entry(key: Key, value: Value | None) -> int:
    if value is None:
        return 0
    rules = value if isinstance(value, tuple) else ()
    match key:
        case ChainKey(_, table, chain):
            chains = hash((table, chain, None))
            return chains + sum(hash((table, chain, place, str(rule))) for place, rule in enumerate(rules))
        case BlockKey(_, table, chain):
            return sum(hash((table, chain, str(rule))) for rule in rules)
        case JumpKey(_, table, chain):
            return hash((table, chain, str(value)))
        case _:
            raise TypeError(f"{key!r} is no key of iptables mode")
