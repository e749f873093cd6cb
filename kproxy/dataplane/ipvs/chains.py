"""Our chains and jumps in the kernel's tables: which entries they are, and what they look like as entries ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count

from kproxy.dataplane.base import Entries, Key, Value
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey, Tables
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.rule import AnyRule, Jump, OpaqueRule, Rule, SetMatch, VirtualServerMatch
from kproxy.dataplane.ipvs import names
from kproxy.dataplane.ipvs.blocks import blocks, kept_from_node, masqueraded_meanwhile
from kproxy.dataplane.ipvs.entries import AHEAD, STRAY, RuleKey, VirtualServerKey
from kproxy.dataplane.ipvs.jumps import BUILT_IN, CHAINS, jumps_from
from kproxy.dataplane.ipvs.options import Options
from kproxy.model import Family, NodeFacts, Protocol

_Signature = tuple[str, ...]  # the sets that a rule looks into, and what it does


def concerns_us(table: str, chain: str) -> bool:
    """Whether a chain's rules matter to `chain_entries`; those of others need not even be parsed."""
    return (table, chain) in CHAINS or (table, chain) in BUILT_IN


def chain_entries(family: Family, tables: Tables) -> Entries:
    """What is ours of what the tables hold: chains, their rules in blocks, jumps to them.

    A rule belongs to the block whose sets it looks into, for the same purpose: so one that was edited is a difference
    of its block. What belongs to none, or stands behind a block that should come later, is an entry that nobody wants.
    """
    entries: Entries = {}
    for table, chains in tables.items():
        for chain, rules in chains.items():
            if (table, chain) in BUILT_IN:
                entries |= _jumps(family, table, chain, rules)
            elif (table, chain) in CHAINS:
                entries[ChainKey(family, table, chain)] = EXISTS
                entries |= _blocks(family, table, chain, rules)
    return entries


def laid_out(entries: Mapping[Key, Value]) -> dict[ChainKey, tuple[AnyRule, ...]]:
    """Chains of ours with their rules in order, as far as these entries have them."""
    found: dict[ChainKey, list[tuple[RuleKey, Sequence[AnyRule]]]] = defaultdict(list)
    for key, value in entries.items():
        match key, value:
            case ChainKey(), _:
                found[key]
            case RuleKey(family, table, chain), tuple(rules):
                found[ChainKey(family, table, chain)].append((key, rules))
    return {
        chain: tuple(rule for _, rules in sorted(parts, key=lambda part: part[0].place) for rule in rules)
        for chain, parts in found.items()
    }


def _blocks(family: Family, table: Table, chain: str, rules: Sequence[AnyRule]) -> Entries:
    found: defaultdict[Key, tuple[AnyRule, ...]] = defaultdict(tuple)
    latest = RuleKey(family, table, chain, AHEAD)
    for rule in rules:
        key = _block(family, table, chain, rule)
        if key is None or key.place < latest.place or (key in found and key != latest):
            key = RuleKey(family, table, chain, STRAY, str(rule))
        else:
            latest = key
        found[key] += (rule,)
    return dict(found)


def _block(family: Family, table: Table, chain: str, rule: AnyRule) -> RuleKey | None:
    """The block that a rule belongs to, wherever it stands."""
    if isinstance(rule, OpaqueRule):
        return None
    if (table, chain) == ("filter", names.IPVS_OUT_FILTER):
        for match in rule.matches:
            if isinstance(match, VirtualServerMatch):
                protocol = Protocol(match.protocol.upper())
                return kept_from_node(VirtualServerKey(family, match.address, protocol, match.port)).key
        return None
    place = _places(family).get((table, chain, *_signature(rule)))
    return None if place is None else RuleKey(family, table, chain, place)


@lru_cache(maxsize=len(Family))
def _places(family: Family) -> dict[_Signature, int]:
    """Where blocks stand, by table, chain and the signature that is common to their rules in every configuration."""
    return {
        (block.key.table, block.key.chain, *_signature(rule)): block.key.place
        for block in (*blocks(family, NodeFacts(), Options()), masqueraded_meanwhile(family))
        for rule in block.rules
    }


def _signature(rule: Rule) -> _Signature:
    sets = (match.name for match in rule.matches if isinstance(match, SetMatch))
    action = rule.target.to if isinstance(rule.target, Jump) else type(rule.target).__name__
    return (*sets, action)


def _jumps(family: Family, table: Table, chain: str, rules: Sequence[AnyRule]) -> Entries:
    """Our jumps. Where there is more than one to a chain, that which is as it should be comes first."""
    wanted = jumps_from(table, chain)
    places = {Jump(jump.target): place for place, jump in enumerate(wanted)}
    as_they_should_be = [jump.rule for jump in wanted]
    surplus = count(len(wanted))
    found: Entries = {}
    for rule in sorted(rules, key=lambda rule: rule not in as_they_should_be):
        if isinstance(rule.target, Jump) and rule.target in places:
            key = JumpKey(family, table, chain, places[rule.target])
            if key in found:
                key = JumpKey(family, table, chain, next(surplus))
            found[key] = rule
    return found
