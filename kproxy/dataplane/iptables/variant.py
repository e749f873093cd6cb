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
from kproxy.dataplane.nftables.nfnetlink import Msg, NetlinkSocket, parsed, text
from kproxy.model import Family
from kproxy.netlink import DumpInterruptedError, attribute

KUBELET_HINTS = frozenset({("mangle", "KUBE-IPTABLES-HINT"), ("mangle", "KUBE-KUBELET-CANARY")})
_NAMES_OF_TABLES = {Family.IPv4: "ip_tables_names", Family.IPv6: "ip6_tables_names"}
_TABLE, _CHAIN_NAME, _RULE_CHAIN = 1, 3, 2  # NFTA_CHAIN_TABLE and NFTA_RULE_TABLE, NFTA_CHAIN_NAME, NFTA_RULE_CHAIN
_READ_ATTEMPTS = 20
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
            if any(where[1:] in KUBELET_HINTS for where in chains(variant, families, only="mangle")):
                return variant, "kubelet uses it"
        rules = sum(rule is not None for family in families for _, _, rule in _legacy(family))
        if rules and rules > _nft_rules(families):
            return Variant.LEGACY, "this machine's rules are there"
    except UnsupportedError as error:
        log.warning("what the other variant of iptables holds cannot be told", reason=str(error))
    return None


def ours(variant: Variant, families: Sequence[Family]) -> list[Where]:
    """The chains that a kube-proxy or kproxy left; see `chains`."""
    return sorted(where for where in chains(variant, families) if is_ours(*where[1:]))


def chains(variant: Variant, families: Sequence[Family], *, only: Table | None = None) -> set[Where]:
    """The chains that there are of a variant, in one table or all, without making any.

    Raises OSError, and UnsupportedError without the programs that it takes.
    """
    if variant is Variant.LEGACY:
        sections = ((family, *section) for family in families for section in _legacy(family, only))
        return {(family, table, chain) for family, table, chain, rule in sections if rule is None}
    with closing(NetlinkSocket()) as socket:
        found = ((family, *where) for family in families for where in _nft_chains(socket, family))
        return {(family, text(table), text(chain)) for family, table, chain in found if only in (None, text(table))}


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


def _nft_chains(socket: NetlinkSocket, family: Family) -> list[tuple[bytes, bytes]]:
    """Table and chain."""
    return [(members[_TABLE], members[_CHAIN_NAME]) for members in _dump(socket, Msg.GETCHAIN, family)]


def _nft_rules(families: Sequence[Family]) -> int:
    """How many rules there are. Asked chain by chain, since the kernel begins anew for every 32 KiB of a long dump."""
    count = 0
    with closing(NetlinkSocket()) as socket:
        for family in families:
            for table, chain in _nft_chains(socket, family):
                if text(table) in _IPTABLES_TABLES:
                    where = attribute(_TABLE, table) + attribute(_RULE_CHAIN, chain)
                    count += len(_dump(socket, Msg.GETRULE, family, where))
    return count


def _dump(socket: NetlinkSocket, kind: Msg, family: Family, attributes: bytes = b"") -> list[dict[int, bytes]]:
    for _ in range(_READ_ATTEMPTS):
        try:
            return [parsed(received.attributes) for received in socket.dump(kind, NFPROTO[family], attributes)]
        except DumpInterruptedError:
            continue
        except OSError as error:
            if error.errno in _NO_NF_TABLES:
                return []
            raise
    raise OSError(errno.EAGAIN, "the ruleset was changed again and again while it was read")
