"""What a kube-proxy or kproxy in iptables mode left, in both variants (reference: section 4.1.8).

What kubelet has, too, stays: KUBE-FIREWALL, its jumps, its canaries and hints.
"""

from __future__ import annotations

from collections.abc import Sequence

from kproxy.dataplane.base import ApplyError, Change, UnsupportedError, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.describe import describe
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, is_kubelets
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.variant import ours
from kproxy.model import Family


def leftovers(variant: Variant, families: Sequence[Family]) -> list[Change]:
    """What is to be removed of one variant. Changes nothing. Raises UnsupportedError and OSError."""
    if not ours(variant, families):
        return []
    if absent := commands.missing(variant, families):
        raise UnsupportedError(
            f"the {variant} variant of iptables holds rules of ours, but {', '.join(absent)} missing"
        )
    found = _kernel(variant, families).read()
    return [change for change in diff({}, found) if not is_kubelets(change.key)]


def remove(variant: Variant, families: Sequence[Family], changes: Sequence[Change]) -> None:
    """Remove what `leftovers` found. Raises ApplyError.

    Chains that somebody else's rules jump to cannot go: they stay, empty, and the error names them. All else goes.
    """
    kernel = _kernel(variant, families)
    try:
        kernel.apply(changes)
    except ApplyError as error:
        if error.transient:
            raise
    else:
        return
    chains = [change for change in changes if isinstance(change.key, ChainKey)]
    kernel.apply([*(c for c in changes if c not in chains), *(c for c in map(_emptied, chains) if c.old != c.new)])
    faults: dict[str, None] = {}
    parts = [[Change(change.key, _emptied(change).new, None) for change in chains]]
    while parts:
        part = parts.pop()
        try:
            kernel.apply(part)
        except ApplyError as error:
            if error.transient:
                raise
            if len(part) == 1:
                faults[f"{describe(part[0].key, EXISTS)} stays, empty: somebody else's rule jumps there"] = None
            else:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    if faults:
        raise ApplyError("; ".join(faults))


def _emptied(change: Change) -> Change:
    """A chain that loses its rules and stays, in place of one that goes."""
    return Change(change.key, change.old, () if isinstance(change.old, tuple) else change.old)


def _kernel(variant: Variant, families: Sequence[Family]) -> IptablesKernel:
    return IptablesKernel(families, variant, guards_localhost=False)
