"""What is there whatever the Services are: fixed chains, jumps, the way to the node ports (reference: 4.1.5)."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables import localhost, names
from kproxy.dataplane.iptables.entries import BUILT_IN, DISPATCH, EXISTS, TAIL, BlockKey, ChainKey, JumpKey
from kproxy.dataplane.iptables.jumps import jumps_from
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.options import INVALID_DROPPED, Options
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Conntrack,
    Jump,
    MarkMatch,
    Masquerade,
    Match,
    Network,
    Nfacct,
    Rule,
    SetMark,
)
from kproxy.model import Family, NodeFacts

_TABLES: tuple[Table, ...] = ("filter", "nat", "mangle")
_LAST = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"


def render_base(facts: NodeFacts, options: Options) -> Entries:
    """The entries of every family that is served."""
    entries: Entries = {}
    for family in facts.families:
        for table in _TABLES:
            entries[ChainKey(family, table, names.CANARY)] = ()
        for table, chain in DISPATCH:
            entries[ChainKey(family, table, chain)] = EXISTS
        mark = facts.masquerade_mark
        entries[ChainKey(family, "filter", names.FORWARD)] = tuple(_forward(mark, options))
        entries[ChainKey(family, "filter", names.KUBELET_FIREWALL)] = (
            localhost.GUARD if options.guards_localhost(family) else EXISTS
        )
        entries[ChainKey(family, "nat", names.MARK_MASQUERADE)] = (Rule((), SetMark(mark, mark)),)
        entries[ChainKey(family, "nat", names.POSTROUTING)] = tuple(_postrouting(mark, options))
        if options.guards_localhost(family):
            entries[localhost.ROUTE_LOCALNET] = 1
        last = tuple(_node_ports(family, facts, options))
        if last:
            entries[BlockKey(family, "nat", names.SERVICES, "", "")] = last
        for table, chain in BUILT_IN:
            for place, jump in enumerate(jumps_from(table, chain)):
                entries[JumpKey(family, table, chain, place)] = jump.rule
    return entries


def _forward(mark: int, options: Options) -> Iterator[Rule]:
    if options.drop_invalid:
        matches: tuple[Match, ...] = (Conntrack("INVALID"),)
        if INVALID_DROPPED in options.counters:
            matches += (Nfacct(INVALID_DROPPED),)
        yield Rule(matches, Jump("DROP"))
    yield Rule((Comment("kubernetes forwarding rules"), MarkMatch(mark, mark)), Jump("ACCEPT"))
    yield Rule(
        (Comment("kubernetes forwarding conntrack rule"), Conntrack("RELATED,ESTABLISHED")),
        Jump("ACCEPT"),
    )


def _postrouting(mark: int, options: Options) -> Iterator[Rule]:
    yield Rule((MarkMatch(mark, mark, inverted=True),), Jump("RETURN"))
    # Off again, so that the packet is not masqueraded twice should it come back through another interface.
    yield Rule((), SetMark(mark, 0))
    yield Rule(
        (Comment("kubernetes service traffic requiring SNAT"),),
        Masquerade(options.random_fully),
    )


def _node_ports(family: Family, facts: NodeFacts, options: Options) -> Iterator[Rule]:
    addresses = facts.node_port_addresses.get(family)
    with_loopback = options.guards_localhost(family)
    comment = Comment(_LAST)
    if addresses is None:
        yield Rule(
            (comment, AddressType(destination="LOCAL")),
            TAIL,
            destination=None if with_loopback else Network(localhost.LOOPBACK[family], inverted=True),
        )
        return
    for address in addresses:
        if with_loopback or not ip_address(address).is_loopback:
            yield Rule((comment,), TAIL, destination=Network(f"{address}/{family.bits}"))
