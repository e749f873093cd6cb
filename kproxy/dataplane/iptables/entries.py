"""What the kernel holds of ours as entries: keys and values for the diff.

- A chain of a service port, or a fixed one, is one entry with all its rules: another order is a difference.
- The dispatch chains have rules of all services. Each service port's rules in one of them are a block, an entry of its
  own; the order of the blocks means nothing, but what has no service port (the node ports of nat KUBE-SERVICES) is
  last. What stands behind it counts as part of it, so a rule that nobody would reach is a difference.
- The kernel setting that opens node ports on localhost is an entry, so that it is read, compared and taken back as
  rules are.
- A jump out of a built-in chain is an entry. Where it stands there is no part of it: kube-proxy never moves one, and
  others put theirs in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from kproxy.dataplane.base import Entries, Key
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.jumps import JUMPS, jumps_from
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.rule import AnyRule, Jump
from kproxy.model import Family

Tables = Mapping[Table, Mapping[str, Sequence[AnyRule]]]


class ChainKey(NamedTuple):
    """A chain. Its value: its rules (a tuple), or `Exists`."""

    family: Family
    table: Table
    chain: str


class BlockKey(NamedTuple):
    """The rules of one service port in a dispatch chain. Its value: a tuple of at least one rule.

    Where service port and protocol are empty: what belongs to no service port, and stands behind all that does.
    """

    family: Family
    table: Table
    chain: str
    service_port: str  # as in comments: namespace/name:port
    protocol: str  # that of its rules, as iptables spells it


class JumpKey(NamedTuple):
    """A jump from a built-in chain. Its value: a rule.

    `place` is that among the jumps which kube-proxy makes there, from the top of the chain. A second jump to the same
    chain, which nobody wants, has a number behind all of them.
    """

    family: Family
    table: Table
    chain: str
    place: int


class SettingKey(NamedTuple):
    """A kernel setting that rules rely on; it goes in after them. Its value: a number. What is 0 is no entry."""

    family: Family
    path: str  # relative to the root directory, such as proc/sys/net/…


class Exists(msgspec.Struct, frozen=True):
    """The value of a chain of which only that it exists is ours to say: a dispatch chain, or kubelet's."""


EXISTS = Exists()

DISPATCH: frozenset[tuple[Table, str]] = frozenset(
    {
        ("nat", names.SERVICES),
        ("nat", names.NODE_PORTS),
        ("filter", names.SERVICES),
        ("filter", names.EXTERNAL_SERVICES),
        ("filter", names.NODE_PORTS),
        ("filter", names.PROXY_FIREWALL),
    }
)
FIXED: frozenset[tuple[Table, str]] = frozenset(
    {
        ("nat", names.POSTROUTING),
        ("nat", names.MARK_MASQUERADE),
        ("nat", names.CANARY),
        ("filter", names.FORWARD),
        ("filter", names.CANARY),
        ("mangle", names.CANARY),
    }
)
KUBELETS = ("filter", names.KUBELET_FIREWALL)
TAIL = Jump(names.NODE_PORTS)  # to it go the last rules of nat KUBE-SERVICES
BUILT_IN: frozenset[tuple[Table, str]] = frozenset((jump.table, jump.chain) for jump in JUMPS)


def concerns_us(table: str, chain: str) -> bool:
    """Whether a chain's rules matter to `entries_of`; those of others need not even be parsed."""
    where = table, chain
    return (
        where in DISPATCH
        or where in BUILT_IN
        or where in FIXED
        or where == KUBELETS
        or (table == "nat" and chain.startswith(names.SERVICE_PREFIXES))
    )


def is_kubelets(key: Key) -> bool:
    """Whether kubelet has the same entry, so that it stays when kproxy cleans up."""
    match key:
        case ChainKey(_, table, chain):
            return (table, chain) == KUBELETS
        case JumpKey(_, table, chain, place):
            return any(jump.target == names.KUBELET_FIREWALL for jump in jumps_from(table, chain)[place : place + 1])
        case _:
            return False


def entries_of(family: Family, tables: Tables, *, guards_localhost: bool) -> Entries:
    """What is ours of what the tables hold.

    `guards_localhost`: the rules of KUBE-FIREWALL are ours to write, and not kubelet's alone.
    """
    entries: Entries = {}
    for table, chains in tables.items():
        for chain, rules in chains.items():
            where = table, chain
            if where in BUILT_IN:
                entries.update(_jumps(family, table, chain, rules))
            elif where in DISPATCH:
                entries[ChainKey(family, table, chain)] = EXISTS
                entries.update(_blocks(family, table, chain, rules))
            elif where == KUBELETS and not guards_localhost:
                entries[ChainKey(family, table, chain)] = EXISTS
            elif concerns_us(table, chain):
                entries[ChainKey(family, table, chain)] = tuple(rules)
    return entries


def _jumps(family: Family, table: Table, chain: str, rules: Sequence[AnyRule]) -> Entries:
    """Our jumps. Where there is more than one to a chain, that which is as it should be comes first."""
    wanted = jumps_from(table, chain)
    found: Entries = {}
    others: list[tuple[int, AnyRule]] = []
    for rule in rules:
        for place, jump in enumerate(wanted):
            key = JumpKey(family, table, chain, place)
            if rule == jump.rule and key not in found:
                found[key] = rule
            elif rule.target == jump.rule.target and jump.target != names.KUBELET_FIREWALL:
                others.append((place, rule))
    surplus = len(wanted)
    for place, rule in others:
        key = JumpKey(family, table, chain, place)
        if key in found:
            key = JumpKey(family, table, chain, surplus)
            surplus += 1
        found[key] = rule
    return found


def _blocks(family: Family, table: Table, chain: str, rules: Sequence[AnyRule]) -> Entries:
    blocks: defaultdict[tuple[str, str], list[AnyRule]] = defaultdict(list)
    at_the_end = False
    for rule in rules:
        at_the_end = at_the_end or rule.target == TAIL
        service_port = _service_port(rule)
        owner = (service_port, rule.protocol if service_port else "")
        # A second copy counts with the first: a rule is deleted by what it says, and so the first one would go.
        if at_the_end and rule not in blocks.get(owner, ()):
            owner = ("", "")
        blocks[owner].append(rule)
    return {BlockKey(family, table, chain, *owner): tuple(block) for owner, block in blocks.items()}


def _service_port(rule: AnyRule) -> str:
    """The service port in a rule's comment, which is its first word."""
    word = rule.comment.partition(" ")[0]
    return word if "/" in word else ""
