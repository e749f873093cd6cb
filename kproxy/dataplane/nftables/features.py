"""What this kernel can do, found by trying: a transaction that makes everything and then fails on purpose."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables import structure
from kproxy.dataplane.nftables.containers import CONTAINERS, container
from kproxy.dataplane.nftables.elements import removals
from kproxy.dataplane.nftables.expressions import Rule, rule
from kproxy.dataplane.nftables.fields import FAMILY_WORDS
from kproxy.dataplane.nftables.nfnetlink import Flag, Message, MessageError, Msg, NetlinkSocket, string
from kproxy.dataplane.nftables.ruleset import TABLE_NAME, Hook
from kproxy.model import Family

_SCRATCH = "kproxy-probe"
_ABSENT = "kproxy-probe-end"
OWNED_AND_PERSISTENT = structure.TABLE_OWNED | structure.TABLE_PERSIST


class Features(NamedTuple):
    """What newer kernels have; the mode works without."""

    owner: bool  # tables that only their owner may change and that outlive it: since 6.9
    destroy: bool  # removal of an element that may not be there: since 6.3


def probe(socket: NetlinkSocket, families: Sequence[Family]) -> Features:
    """Try all that the mode needs, and what it uses where it is there. Leaves nothing behind.

    Raises UnsupportedError that names what is missing, and PermissionError.
    """
    for family in families:
        attempts = _needed(family)
        errors = _try(socket, family, [message for _, message in attempts])
        for error in errors:
            if error.errno == errno.EPERM and error.position < 0:
                raise PermissionError(error.errno, "nftables mode is not permitted")
            if error.position < 0:
                raise UnsupportedError(f"nftables mode: {_whole_batch(error.errno)}")
            refused, reason = attempts[error.position][0], error.text or os.strerror(error.errno)
            where = f"table {FAMILY_WORDS[family]} {TABLE_NAME}"
            raise UnsupportedError(f"nftables mode: the kernel refuses {refused} in {where}: {reason}")
    family = families[0]
    owned = structure.new_table(family, OWNED_AND_PERSISTENT, Flag.CREATE)
    plain = structure.new_table(family, 0, Flag.CREATE)
    addresses = container(family, "cluster-ips")
    absent = [
        step.message for step in removals(addresses, [addresses.key(bytes(family.bits // 8))], Msg.DESTROYSETELEM)
    ]
    return Features(
        owner=not _try(socket, family, [owned]),
        destroy=not _try(socket, family, [plain, structure.new_set(addresses, counted=False), *absent]),
    )


def has_tables(families: Iterable[Family]) -> bool:
    """Whether the kernel has nf_tables for all of these. Leaves no trace. Raises PermissionError."""
    with closing(NetlinkSocket()) as socket:
        for family in families:
            for error in _try(socket, family, [structure.new_table(family, 0, Flag.CREATE)]):
                if error.errno == errno.EPERM:
                    raise PermissionError(error.errno, "reading nf_tables is not permitted")
                return False
    return True


def _try(socket: NetlinkSocket, family: Family, messages: Iterable[Message]) -> list[MessageError]:
    """What the kernel has against messages, with our table's name replaced; the last one makes it undo them all."""
    name, scratch = string(1, TABLE_NAME), string(1, _SCRATCH)
    batch = [m._replace(attributes=scratch + m.attributes.removeprefix(name)) for m in messages]
    batch.append(structure.delete_table(family, _ABSENT))
    errors = socket.transact(batch)
    return [error for error in errors if error.position != len(batch) - 1]


def _whole_batch(number: int) -> str:
    match number:
        case errno.EOPNOTSUPP | errno.EINVAL:
            return "the kernel has no nf_tables"
        case _:
            return os.strerror(number)


def _needed(family: Family) -> list[tuple[str, Message]]:
    attempts = [("any table", structure.new_table(family, 0, Flag.CREATE))]
    attempts += [(str(c), structure.new_set(c, counted=c.counter)) for c in CONTAINERS.values() if c.family is family]
    for kind, name in (
        ("filter", "prerouting"),
        ("filter", "input"),
        ("filter", "forward"),
        ("filter", "output"),
        ("nat", "prerouting"),
        ("nat", "output"),
        ("nat", "postrouting"),
    ):
        hook = Hook(kind, name, -100)  # type: ignore[arg-type]
        attempts.append((f"a {kind} chain at {name}", structure.new_chain(family, f"{kind}-{name}", hook)))
    attempts.append(("any chain", structure.new_chain(family, "rules", None)))
    for needed in _rules(family):
        attempts.append((f"rule `{needed.text}`", structure.append_rule(family, "rules", needed)))
    return attempts


def _rules(family: Family) -> tuple[Rule, ...]:
    affinity, mark = container(family, "affinity"), 1 << 14
    return (
        rule(x.ct_new(), x.accept()),
        rule(x.ct_dnat(), x.in_set(container(family, "hairpin")), x.masquerade()),
        rule(x.saddr_is_local(), x.mark_or(mark)),
        rule(x.mark_is_set(mark), x.mark_xor(mark), x.masquerade()),
        rule(x.iifname("cni0"), x.reject(family)),
        rule(x.not_in_set(container(family, "source-ranges")), x.drop()),
        rule(x.vmap(container(family, "services"))),
        rule(x.vmap(container(family, "learn"))),
        rule(x.dnat(container(family, "endpoints"), 2)),
        rule(x.dnat_affinity(affinity)),
        rule(x.update_affinity(affinity, 10800)),
    )
