"""What a kube-proxy or kproxy in iptables mode left, in both variants (reference: section 4.1.8).

What kubelet has, too, stays: KUBE-FIREWALL, its jumps, its canaries and hints.
"""

from __future__ import annotations

from collections.abc import Sequence

from kproxy.dataplane.base import Change, UnsupportedError, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import is_kubelets
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.variant import contents
from kproxy.model import Family


def leftovers(variant: Variant, families: Sequence[Family]) -> list[Change]:
    """What is to be removed of one variant. Changes nothing. Raises UnsupportedError and OSError."""
    if not contents(variant, families).ours:
        return []
    if absent := commands.missing(variant, families):
        raise UnsupportedError(
            f"the {variant} variant of iptables holds rules of ours, but {', '.join(absent)} missing"
        )
    found = _kernel(variant, families).read()
    return [change for change in diff({}, found) if not is_kubelets(change.key)]


def remove(variant: Variant, families: Sequence[Family], changes: Sequence[Change]) -> None:
    """Remove what `leftovers` found. Raises ApplyError."""
    _kernel(variant, families).apply(changes)


def _kernel(variant: Variant, families: Sequence[Family]) -> IptablesKernel:
    return IptablesKernel(families, variant, guards_localhost=False)
