"""The rules of our chains, in blocks that are there always, or while a set has members (reference: section 4.2.5).

The comments name the reference's numbers of rules.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from msgspec.structs import replace

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables import names as shared
from kproxy.dataplane.iptables.localhost import LOOPBACK
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import REJECT_REPLY
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Conntrack,
    Interface,
    Jump,
    MarkMatch,
    Masquerade,
    Match,
    Network,
    NotBridged,
    Reject,
    Rule,
    SetMark,
    SetMatch,
    Target,
    VirtualServerMatch,
)
from kproxy.dataplane.ipvs import names
from kproxy.dataplane.ipvs.entries import AHEAD, RuleKey, VirtualServerKey
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.sets import SETS
from kproxy.model import Family, LocalDetector, NodeFacts, Protocol

_ACCEPT = Jump("ACCEPT")
_RETURN = Jump("RETURN")
_DROP = Jump("DROP")
_MARK = Jump(shared.MARK_MASQUERADE)


class Block(NamedTuple):
    """Rules that stand together in a chain."""

    key: RuleKey
    while_filled: str  # the IPv4 name of the set without whose members they are not needed; empty: always
    rules: tuple[Rule, ...]


def blocks(family: Family, facts: NodeFacts, options: Options) -> tuple[Block, ...]:
    """All blocks of a family that are not for one address alone, those of a chain in their order."""
    return _blocks(_manner(family, facts, options))


def rules_of_sets(family: Family, facts: NodeFacts, options: Options) -> Mapping[str, Entries]:
    """The blocks that are there while a set has members, by the set's name in the kernel."""
    return _rules_of_sets(_manner(family, facts, options))


def kept_from_node(load_balancer: VirtualServerKey) -> Block:
    """Drops what the node itself sends to a load balancer's address from which it is barred (14)."""
    family, address, protocol, port = load_balancer
    key = RuleKey(family, "filter", names.IPVS_OUT_FILTER, 0, str(load_balancer))
    match = VirtualServerMatch(protocol.lower(), address, port)
    return Block(key, "", (Rule((match,), _DROP, source=Network(f"{address}/{family.bits}")),))


def masqueraded_meanwhile(family: Family) -> Block:
    """Masquerades what the node connects to cluster IPs while rules of iptables mode still translate that.

    As soon as the device has the addresses, the node sends from them. Without a local detector iptables mode leaves the
    source as it is, and no reply would find back.
    """
    key = RuleKey(family, "nat", shared.SERVICES, AHEAD)
    return Block(key, "", (Rule((_match(family, names.ADDRESSES_SET, "src"),), _MARK),))


class _Manner(NamedTuple):
    """What the text of rules depends on."""

    family: Family
    masquerade_all: bool
    detector: LocalDetector
    mark: int
    random_fully: bool


class _Part(NamedTuple):
    table: Table
    chain: str
    while_filled: str
    rules: tuple[Rule, ...]


def _manner(family: Family, facts: NodeFacts, options: Options) -> _Manner:
    mark, detector = facts.masquerade_mark, facts.detector(family)
    return _Manner(family, facts.masquerade_all, detector, mark, options.random_fully)


@lru_cache(maxsize=8)
def _rules_of_sets(manner: _Manner) -> Mapping[str, Entries]:
    found: defaultdict[str, Entries] = defaultdict(dict)
    for block in _blocks(manner):
        if block.while_filled:
            found[names.set_name(block.while_filled, manner.family)][block.key] = block.rules
    return dict(found)


@lru_cache(maxsize=8)
def _blocks(manner: _Manner) -> tuple[Block, ...]:
    places: Counter[tuple[Table, str]] = Counter()
    found = []
    for table, chain, while_filled, rules in (*_nat(manner), *_filter(manner)):
        key = RuleKey(manner.family, table, chain, places[table, chain])
        found.append(Block(key, while_filled, rules))
        places[table, chain] += 1
    return tuple(found)


def _nat(manner: _Manner) -> Iterator[_Part]:
    family, mark = manner.family, manner.mark

    def services(while_filled: str, *rules: Rule) -> _Part:
        return _Part("nat", shared.SERVICES, while_filled, rules)

    yield services("", Rule((), _RETURN, source=Network(LOOPBACK[family])))  # 1
    balancers = names.LOAD_BALANCER_SET
    yield services(balancers, _rule(family, balancers, "dst,dst", Jump(names.LOAD_BALANCER)))  # 3
    yield services(names.CLUSTER_IP_SET, _to_cluster_ip(manner))  # 8
    external = _not_for_host_ports(family, names.EXTERNAL_IP_SET)
    masqueraded = _rule(family, names.EXTERNAL_IP_SET, "dst,dst", _MARK)
    yield services(names.EXTERNAL_IP_SET, masqueraded, *external)  # 9
    local = names.EXTERNAL_IP_LOCAL_SET
    yield services(local, *_not_for_host_ports(family, local))  # 10
    yield services("", Rule((AddressType(destination="LOCAL"),), Jump(names.NODE_PORT)))  # 11
    for name in (names.CLUSTER_IP_SET, names.LOAD_BALANCER_SET):
        # 15: what comes behind us, such as rules for host ports, is not to see it.
        yield services(name, Rule((_match(family, name, "dst,dst"),), _ACCEPT))

    hairpin = _rule(family, names.LOOP_BACK_SET, "dst,dst,src", Masquerade())
    yield _Part("nat", shared.POSTROUTING, names.LOOP_BACK_SET, (hairpin,))  # 2
    unmarked = Rule((MarkMatch(mark, mark, inverted=True),), _RETURN)
    # Off again, so that the packet is not masqueraded twice should it come back through another interface.
    unmark = Rule((), SetMark(mark, 0))
    masquerade = Rule((Comment("kubernetes service traffic requiring SNAT"),), Masquerade(manner.random_fully))
    yield _Part("nat", shared.POSTROUTING, "", (unmarked, unmark, masquerade))  # 19
    yield _Part("nat", shared.MARK_MASQUERADE, "", (Rule((), SetMark(mark, mark)),))  # 19

    local = names.LOAD_BALANCER_LOCAL_SET
    yield _Part("nat", names.LOAD_BALANCER, local, (_rule(family, local, "dst,dst", _RETURN),))  # 4
    yield _Part("nat", names.LOAD_BALANCER, "", (Rule((), _MARK),))  # 12

    for protocol in Protocol:  # 5
        parts = "dst,dst" if protocol is Protocol.SCTP else "dst"
        for name, target in ((names.NODE_PORT_LOCAL_SET[protocol], _RETURN), (names.NODE_PORT_SET[protocol], _MARK)):
            rule = replace(_rule(family, name, parts, target), protocol=protocol.lower())
            yield _Part("nat", names.NODE_PORT, name, (rule,))


def _filter(manner: _Manner) -> Iterator[_Part]:
    family, mark = manner.family, manner.mark
    marked = Rule((Comment("kubernetes forwarding rules"), MarkMatch(mark, mark)), _ACCEPT)
    related = (Comment("kubernetes forwarding conntrack rule"), Conntrack("RELATED,ESTABLISHED"))
    yield _Part("filter", shared.FORWARD, "", (marked, Rule(related, _ACCEPT)))  # 16
    yield _Part("filter", names.NODE_PORT, "", (_rule(family, names.HEALTH_CHECK_SET, "dst", _ACCEPT),))  # 17

    ranges = Jump(names.SOURCE_RANGES_FIREWALL)
    limited = names.LOAD_BALANCER_FIREWALL_SET
    yield _Part("filter", shared.PROXY_FIREWALL, limited, (_rule(family, limited, "dst,dst", ranges),))  # 6
    for name in (names.SOURCE_CIDR_SET, names.SOURCE_IP_SET):  # 7
        yield _Part("filter", names.SOURCE_RANGES_FIREWALL, name, (_rule(family, name, "dst,dst,src", _RETURN),))
    yield _Part("filter", names.SOURCE_RANGES_FIREWALL, "", (Rule((), _DROP),))  # 13

    # 18: the device makes the node answer on every port of its addresses; only those of Services are meant.
    balancers, external, local = names.LOAD_BALANCER_SET, names.EXTERNAL_IP_SET, names.EXTERNAL_IP_LOCAL_SET
    matches = [_match(family, name, "dst,dst") for name in (balancers, names.CLUSTER_IP_SET, external, local)]
    matches.append(_match(family, names.HEALTH_CHECK_SET, "dst"))
    served = [Rule((match,), _RETURN) for match in matches]
    others = Rule((Conntrack("NEW"), _match(family, names.ADDRESSES_SET, "dst")), Reject(REJECT_REPLY[family]))
    yield _Part("filter", names.IPVS_FILTER, "", (*served, others))


def _match(family: Family, name: str, parts: str) -> SetMatch:
    return SetMatch(names.set_name(name, family), parts)


def _rule(family: Family, name: str, parts: str, target: Target, *others: Match) -> Rule:
    return Rule((Comment(SETS[name].comment), _match(family, name, parts), *others), target)


def _to_cluster_ip(manner: _Manner) -> Rule:
    """Masquerades connections to cluster IPs that do not come from a pod, as far as that can be known."""
    name, detector = names.CLUSTER_IP_SET, manner.detector
    if not manner.masquerade_all and not detector:
        # Who sends from a cluster IP: the node itself, to which the device gave these addresses.
        return _rule(manner.family, name, "src,dst", _MARK)
    rule = _rule(manner.family, name, "dst,dst", _MARK)
    if manner.masquerade_all:
        return rule
    if detector.cidr:
        return replace(rule, source=Network(detector.cidr, inverted=True))
    interface = detector.interface or f"{detector.interface_prefix}+"
    return replace(rule, in_interface=Interface(interface, inverted=True))


def _not_for_host_ports(family: Family, name: str) -> tuple[Rule, Rule]:
    """Ends nat for what comes from another machine, and for addresses that this node answers to."""
    outside = (NotBridged(), AddressType(source="LOCAL", source_inverted=True))
    return (
        _rule(family, name, "dst,dst", _ACCEPT, *outside),
        _rule(family, name, "dst,dst", _ACCEPT, AddressType(destination="LOCAL")),
    )
