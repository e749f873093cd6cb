"""What ipvs mode needs of the machine, found by trying, without making anything (reference: section 4.2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import REJECT_REPLY
from kproxy.dataplane.iptables.probe import SCRATCH
from kproxy.dataplane.iptables.refusal import refusal
from kproxy.dataplane.iptables.restore import Command, Commit
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Conntrack,
    Jump,
    MarkMatch,
    Masquerade,
    NotBridged,
    Reject,
    Rule,
    SetMark,
    VirtualServerMatch,
)
from kproxy.dataplane.ipvs import device, ipset
from kproxy.dataplane.ipvs.servers import Servers
from kproxy.model import Family

_DOCUMENTED = {Family.IPv4: "192.0.2.1", Family.IPv6: "2001:db8::1"}


class Features(NamedTuple):
    """What not all machines have; the mode works without."""

    random_fully: bool  # MASQUERADE with fully random ports


def probe(servers: Servers, variant: Variant, families: Sequence[Family], scheduler: str) -> Features:
    """Try everything. Raises UnsupportedError that names what is missing, and OSError."""
    if not servers.has_scheduler(scheduler):
        raise UnsupportedError(
            f"ipvs mode: the kernel has no scheduler {scheduler!r}; load the module ip_vs_{scheduler},"
            " or choose another in ipvs.scheduler"
        )
    ipset.probe()
    device.probe()
    if absent := commands.missing(variant, families):
        raise UnsupportedError(f"ipvs mode: the programs {', '.join(absent)} are missing; install iptables")
    random_fully = not any(_fault(variant, family, _needed(family, random_fully=True)) for family in families)
    if not random_fully:  # which may have other reasons
        for family in families:
            if fault := _fault(variant, family, _needed(family, random_fully=False)):
                raise UnsupportedError(f"ipvs mode: {fault}")
    return Features(random_fully)


def have_modules_loaded(variant: Variant, families: Sequence[Family]) -> None:
    """Have the kernel load IPVS where it is a module that nobody has used yet; what is missing shows later.

    The kernel does not do that for who asks IPVS itself, but for rules about virtual servers, which cannot do without.
    Nothing but CAP_NET_ADMIN is needed for that, and no program to load modules within a container.
    """
    if not Path("/proc/thread-self/net/ip_vs").exists():
        _fault(variant, families[0], _needed(families[0], random_fully=False))


def _needed(family: Family, *, random_fully: bool) -> dict[Table, list[Rule]]:
    """Rules that have between them every match and target of ours, but sets: those have to exist to be named."""
    outside = (NotBridged(), AddressType(source="LOCAL", source_inverted=True))
    return {
        "nat": [
            Rule((Comment("kproxy's probe; it goes at once"), *outside), Jump("RETURN")),
            Rule((MarkMatch(0x4000, 0x4000, inverted=True),), SetMark(0x4000, 0x4000)),
            Rule((), Masquerade(random_fully)),
        ],
        "filter": [
            Rule((VirtualServerMatch("tcp", _DOCUMENTED[family], 80),), Jump("DROP")),
            Rule((Conntrack("NEW"),), Reject(REJECT_REPLY[family])),
        ],
    }


def _fault(variant: Variant, family: Family, tables: Mapping[Table, Sequence[Rule]]) -> str:
    """What is wrong with rules; empty if nothing is."""
    commits = [
        Commit(table, [Command(":", SCRATCH, None), *(Command("-A", SCRATCH, None, rule) for rule in rules)])
        for table, rules in tables.items()
    ]
    given = list(commands.lines(commits))
    done = commands.restore(variant, family, given, test=True)
    return str(refusal(commands.program(variant, family, "restore"), done.stderr, given)) if done.returncode else ""
