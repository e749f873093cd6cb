"""Which variant of iptables this machine uses. Rules in both would be a trap, so it is found once and kept to.

As the official kube-proxy image does it: kubelet's chains tell, else the variant that has more rules is in use. The nft
variant's tables are looked at over netlink, where 200,000 rules take a second instead of half a minute, and the legacy
ones only where there are any, since asking for a legacy table makes it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import structlog

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import DISPATCH, FIXED
from kproxy.dataplane.iptables.names import SERVICE_PREFIXES
from kproxy.dataplane.iptables.restore import TABLES
from kproxy.dataplane.nftables.expressions import NFPROTO
from kproxy.dataplane.nftables.features import has_tables
from kproxy.dataplane.nftables.nfnetlink import Msg, NetlinkSocket, parsed, text
from kproxy.model import Family
from kproxy.netlink import DumpInterruptedError

KUBELET_HINTS = frozenset({("mangle", "KUBE-IPTABLES-HINT"), ("mangle", "KUBE-KUBELET-CANARY")})
_NAMES_OF_TABLES = {Family.IPv4: "ip_tables_names", Family.IPv6: "ip6_tables_names"}
_TABLE, _CHAIN_NAME = 1, 3  # NFTA_CHAIN_TABLE and NFTA_RULE_TABLE, NFTA_CHAIN_NAME
_READ_ATTEMPTS = 20
_NO_NF_TABLES = frozenset((errno.EINVAL, errno.EOPNOTSUPP))
_IPTABLES_TABLES = frozenset({*TABLES, "raw", "security"})


log = structlog.get_logger(__name__)


class Contents(msgspec.Struct):
    """What one variant holds in the families that were asked for."""

    chains: set[tuple[Family, str, str]]  # family, table, chain
    rules: int

    @property
    def hinted(self) -> bool:
        """Whether kubelet uses this variant."""
        return any((table, chain) in KUBELET_HINTS for _, table, chain in self.chains)

    @property
    def ours(self) -> list[tuple[Family, str, str]]:
        """The chains that a kube-proxy or kproxy left."""
        return sorted(where for where in self.chains if is_ours(*where[1:]))


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
    held = {}
    for variant in Variant:
        try:
            held[variant] = contents(variant, families)
        except UnsupportedError as error:
            log.warning("what the other variant of iptables holds cannot be told", reason=str(error))
            held[variant] = Contents(set(), 0)
    hinted = [variant for variant in (Variant.NFT, Variant.LEGACY) if held[variant].hinted]
    if hinted:
        chosen, why = hinted[0], "kubelet uses it"
    elif held[Variant.LEGACY].rules > held[Variant.NFT].rules:
        chosen, why = Variant.LEGACY, "this machine's rules are there"
    else:
        possible = not absent[Variant.NFT] and has_tables(families)
        chosen = Variant.NFT if possible else Variant.LEGACY
        why = "it is the usual one" if possible else "the other is not possible here"
    if absent[chosen]:
        raise UnsupportedError(
            f"iptables mode: {', '.join(absent[chosen])} missing, for the {chosen} variant of iptables; {why}"
        )
    return chosen


def contents(variant: Variant, families: Sequence[Family]) -> Contents:
    """What there is of a variant, without making any of it. Raises OSError, and UnsupportedError without programs."""
    found = Contents(set(), 0)
    for family in families:
        (_add_legacy if variant is Variant.LEGACY else _add_nft)(found, family)
    return found


def _add_legacy(found: Contents, family: Family) -> None:
    if not legacy_tables(family):
        return
    if absent := commands.missing(Variant.LEGACY, [family]):
        raise UnsupportedError(f"there are legacy tables of iptables, but {', '.join(absent)} missing to look at them")
    for table, chain, rule in commands.sections(commands.save(Variant.LEGACY, family)):
        if rule is None:
            found.chains.add((family, table, chain))
        else:
            found.rules += 1


def legacy_tables(family: Family) -> list[str]:
    """The legacy tables that there are in the calling thread's network namespace."""
    try:
        return Path("/proc/thread-self/net", _NAMES_OF_TABLES[family]).read_text().split()
    except FileNotFoundError:  # the kernel has none
        return []


def _add_nft(found: Contents, family: Family) -> None:
    for members in _dump(Msg.GETCHAIN, family):
        found.chains.add((family, text(members[_TABLE]), text(members[_CHAIN_NAME])))
    found.rules += sum(text(members[_TABLE]) in _IPTABLES_TABLES for members in _dump(Msg.GETRULE, family))


def _dump(kind: Msg, family: Family) -> list[dict[int, bytes]]:
    for _ in range(_READ_ATTEMPTS):
        try:
            with closing(NetlinkSocket()) as socket:
                return [parsed(received.attributes) for received in socket.dump(kind, NFPROTO[family])]
        except DumpInterruptedError:
            continue
        except OSError as error:
            if error.errno in _NO_NF_TABLES:
                return []
            raise
    raise OSError(errno.EAGAIN, "the ruleset was changed again and again while it was read")
