"""What the programs and the kernel can do, found by trying: rules with all that we use, parsed and thrown away.

For every match and target the programs ask the kernel for its revision, so a missing module shows here.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NamedTuple

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import HOST_MASK, REJECT_REPLY
from kproxy.dataplane.iptables.refusal import refusal
from kproxy.dataplane.iptables.restore import Command, Commit
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Conntrack,
    Dnat,
    Interface,
    Jump,
    MarkMatch,
    Masquerade,
    Network,
    Nfacct,
    Recent,
    Reject,
    Rule,
    SetMark,
    Statistic,
    Transport,
)
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.model import Family, join_host_port

_ATTEMPTS = 6  # each waits for a few seconds if others have the lock
SCRATCH = "KUBE-PROXY-PROBE"
_NETWORK = {Family.IPv4: "192.0.2.0/24", Family.IPv6: "2001:db8::/32"}
_ADDRESS = {Family.IPv4: "192.0.2.1", Family.IPv6: "2001:db8::1"}


class Features(NamedTuple):
    """What not all machines have; the mode works without."""

    versions: tuple[str, ...]  # of the programs, for each family
    random_fully: bool  # MASQUERADE with fully random ports
    nfacct: bool  # counters outside the rules


def needed_rules(family: Family) -> dict[Table, list[Rule]]:
    """Rules that have between them every match and target that the mode cannot do without."""
    network, address = _NETWORK[family], _ADDRESS[family]
    nat: list[Rule] = [
        Rule((Comment("kproxy's probe; it goes at once"), AddressType(destination="LOCAL")), Jump("RETURN")),
        Rule((AddressType(source="LOCAL"),), SetMark(0x4000, 0x4000)),
        Rule((MarkMatch(0x4000, 0x4000, inverted=True),), Jump("RETURN"), source=Network(network, inverted=True)),
        Rule((Statistic(1 << 30),), Jump("RETURN"), in_interface=Interface("kproxy+", inverted=True)),
        Rule((Recent(SCRATCH, HOST_MASK[family], 10800),), Jump("RETURN")),
        Rule((Comment("counts only"),), source=Network(network)),
        Rule((), Masquerade()),
        *(
            Rule(
                (Comment("probe"), Recent(SCRATCH, HOST_MASK[family]), Transport(protocol)),
                Dnat(join_host_port(address, 80)),
                protocol,
            )
            for protocol in ("tcp", "udp", "sctp")
        ),
    ]
    states = "RELATED,ESTABLISHED,DNAT"
    rejected = Rule((Transport("tcp", 80),), Reject(REJECT_REPLY[family]), "tcp", destination=Network(network))
    return {"filter": [Rule((Conntrack(states, inverted=True),), Jump("DROP")), rejected], "nat": nat}


def probe(variant: Variant, families: Sequence[Family], *, makes_tables: bool = True) -> Features:
    """Try everything in every family. Raises UnsupportedError that names what is missing, and OSError.

    Trying a legacy table makes it. Without `makes_tables` those that are not there are taken for good.
    """

    def fault(family: Family, table: Table, rules: Sequence[Rule]) -> str:
        if variant is Variant.LEGACY and not makes_tables and table not in legacy_tables(family):
            return ""
        return _fault(variant, family, table, rules)

    absent = commands.missing(variant, families)
    if absent:
        raise UnsupportedError(f"iptables mode: the programs {', '.join(absent)} are missing; install iptables")
    versions = tuple(commands.version(variant, family) for family in families)
    for family in families:
        for table, rules in needed_rules(family).items():
            if found := fault(family, table, rules):
                raise UnsupportedError(f"iptables mode: {found}")

    def all_have(table: Table, rule: Rule) -> bool:
        return not any(fault(family, table, [rule]) for family in families)

    return Features(
        versions,
        random_fully=all_have("nat", Rule((), Masquerade(random_fully=True))),
        nfacct=all_have("filter", Rule((Nfacct("kproxy"),), Jump("DROP"))),
    )


def _fault(variant: Variant, family: Family, table: Table, rules: Sequence[Rule]) -> str:
    """What is wrong with rules; empty if nothing is."""
    chain = [Command(":", SCRATCH, None), *(Command("-A", SCRATCH, None, rule) for rule in rules)]
    given = list(commands.lines([Commit(table, chain)]))
    for _ in range(_ATTEMPTS):
        done = commands.restore(variant, family, given, test=True)
        if not done.returncode:
            return ""
        fault = refusal(commands.program(variant, family, "restore"), done.stderr, given)
        if not fault.transient:
            return str(fault)
        if "ermi" in done.stderr:  # permission denied, not permitted
            needed = " and CAP_NET_RAW" if variant is Variant.LEGACY else ""
            raise OSError(errno.EPERM, f"{fault} (it takes CAP_NET_ADMIN{needed})")
    raise OSError(errno.EAGAIN, str(fault))
