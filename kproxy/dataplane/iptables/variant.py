"""Which variant of iptables this machine uses. Rules in both would be a trap, so it is found once and kept to.

As the official kube-proxy image does it: kubelet's chains tell, else the variant that has more rules is in use. The nft
variant's tables are looked at over netlink, since `iptables-save` reads every rule, and the legacy ones only where
there are any, since asking for a legacy table makes it. Rules are counted only where no chain tells.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import structlog

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import DISPATCH, FIXED
from kproxy.dataplane.iptables.names import SERVICE_PREFIXES, Table
from kproxy.dataplane.iptables.restore import TABLES
from kproxy.dataplane.nftables.expressions import NFPROTO
from kproxy.dataplane.nftables.features import has_tables
from kproxy.dataplane.nftables.nfnetlink import Msg, NetlinkSocket, parsed, string, text
from kproxy.model import Family
from kproxy.netlink import DumpInterruptedError, attribute

KUBELET_HINTS = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"})
_HINTS_TABLE: Table = "mangle"
_NAMES_OF_TABLES = {Family.IPv4: "ip_tables_names", Family.IPv6: "ip6_tables_names"}
_TABLE = 1  # NFTA_CHAIN_TABLE, NFTA_RULE_TABLE
_CHAIN_NAME = 3  # NFTA_CHAIN_NAME
_RULE_CHAIN, _RULE_HANDLE = 2, 3  # NFTA_RULE_*
_NO_NF_TABLES = frozenset((errno.EINVAL, errno.EOPNOTSUPP))
_IPTABLES_TABLES = frozenset({*TABLES, "raw", "security"})


log = structlog.get_logger(__name__)

Where = tuple[Family, str, str]  # family, table, chain


def is_ours(table: str, chain: str) -> bool:
    """Whether the chain is one of kube-proxy's own, and not kubelet's or a built-in one."""
    where = table, chain
    return where in DISPATCH or where in FIXED or (table == "nat" and chain.startswith(SERVICE_PREFIXES))


def find(families: Sequence[Family]) -> Variant:
    """The variant to use for the calling thread's network namespace.

    Raises UnsupportedError if a program is missing that it takes, and OSError.
    """
    absent = {variant: commands.missing(variant, families) for variant in Variant}
    if all(absent.values()):
        raise UnsupportedError(
            f"iptables mode: the programs {', '.join(absent[Variant.NFT])} are missing, and for legacy tables"
            f" {', '.join(absent[Variant.LEGACY])}; install iptables"
        )
    used = _used(families)
    if used is None:
        possible = not absent[Variant.NFT] and has_tables(families)
        used = (Variant.NFT, "it is the usual one") if possible else (Variant.LEGACY, "the other is not possible here")
    chosen, why = used
    if absent[chosen]:
        raise UnsupportedError(
            f"iptables mode: {', '.join(absent[chosen])} missing, for the {chosen} variant of iptables; {why}"
        )
    return chosen


def _used(families: Sequence[Family]) -> tuple[Variant, str] | None:
    """The variant that is in use here, and what tells. None: neither, or that cannot be told."""
    try:
        for variant in Variant.NFT, Variant.LEGACY:
            if any(_is_kubelets(variant, family) for family in families):
                return variant, "kubelet uses it"
        rules = sum(rule is not None for family in families for _, _, rule in _legacy(family))
        if rules and not _has_nft_rules(families, rules):
            return Variant.LEGACY, "this machine's rules are there"
    except UnsupportedError as error:
        log.warning("what the other variant of iptables holds cannot be told", reason=str(error))
    return None


def _is_kubelets(variant: Variant, family: Family) -> bool:
    """Whether kubelet's chains are there."""
    if variant is Variant.LEGACY:
        return any(chain in KUBELET_HINTS for _, chain, _ in _legacy(family, _HINTS_TABLE))
    with closing(NetlinkSocket()) as socket:
        return any(_has_nft_chain(socket, family, _HINTS_TABLE, chain) for chain in KUBELET_HINTS)


def ours(variant: Variant, families: Sequence[Family]) -> list[Where]:
    """The chains that a kube-proxy or kproxy left; see `chains`."""
    return sorted(where for where in chains(variant, families) if is_ours(*where[1:]))


def chains(variant: Variant, families: Sequence[Family]) -> set[Where]:
    """The chains that there are of a variant, without making any.

    Raises OSError, and UnsupportedError without the programs that it takes.
    """
    found: set[Where] = set()
    if variant is Variant.LEGACY:
        for family in families:
            found.update((family, table, chain) for table, chain, rule in _legacy(family) if rule is None)
        return found
    with closing(NetlinkSocket()) as socket:
        for family in families:
            found.update((family, text(table), text(chain)) for table, chain in _nft_chains(socket, family))
    return found


def _legacy(family: Family, only: Table | None = None) -> Iterable[tuple[Table, str, str | None]]:
    """See `commands.sections`."""
    there = legacy_tables(family)
    if not there or (only and only not in there):
        return ()
    if absent := commands.missing(Variant.LEGACY, [family]):
        raise UnsupportedError(f"there are legacy tables of iptables, but {', '.join(absent)} missing to look at them")
    return commands.sections(commands.save(Variant.LEGACY, family, [only] if only else None))


def legacy_tables(family: Family) -> list[str]:
    """The legacy tables that there are in the calling thread's network namespace."""
    try:
        return Path("/proc/thread-self/net", _NAMES_OF_TABLES[family]).read_text().split()
    except FileNotFoundError:  # the kernel has none
        return []


def _has_nft_chain(socket: NetlinkSocket, family: Family, table: str, chain: str) -> bool:
    try:
        socket.get(Msg.GETCHAIN, NFPROTO[family], string(_TABLE, table) + string(_CHAIN_NAME, chain))
    except OSError as error:
        if error.errno == errno.ENOENT or error.errno in _NO_NF_TABLES:
            return False
        raise
    return True


def _nft_chains(socket: NetlinkSocket, family: Family) -> list[tuple[bytes, ...]]:
    """Table and chain."""
    return _dump(socket, Msg.GETCHAIN, family, (_TABLE, _CHAIN_NAME))


def _has_nft_rules(families: Sequence[Family], count: int) -> bool:
    """Whether there are so many. Asked chain by chain: the kernel begins anew for every 32 KiB of a long dump."""
    with closing(NetlinkSocket()) as socket:
        for family in families:
            for table, chain in _nft_chains(socket, family):
                if text(table) in _IPTABLES_TABLES:
                    where = attribute(_TABLE, table) + attribute(_RULE_CHAIN, chain)
                    count -= len(_dump(socket, Msg.GETRULE, family, (_RULE_HANDLE,), where))
                if count <= 0:
                    return True
    return False


def _dump(
    socket: NetlinkSocket, kind: Msg, family: Family, identity: tuple[int, ...], which: bytes = b""
) -> list[tuple[bytes, ...]]:
    """The attributes `identity` of each object; they tell it from the others."""
    for _ in commands.attempts():
        try:
            found = [parsed(received.attributes) for received in socket.dump(kind, NFPROTO[family], which)]
        except DumpInterruptedError:
            continue
        except OSError as error:
            if error.errno in _NO_NF_TABLES:
                return []
            raise
        objects = [tuple(members[number] for number in identity) for members in found]
        if len(set(objects)) == len(objects):
            return objects
    raise commands.TornError(errno.EAGAIN, "the ruleset was changed again and again while it was read")
