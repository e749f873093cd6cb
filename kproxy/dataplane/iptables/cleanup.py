"""Takes away what a kube-proxy or kproxy in iptables mode left, in both variants (reference: section 4.1.8).

What kubelet has, too, stays: KUBE-FIREWALL, its jumps, its canaries and hints.
"""

from __future__ import annotations

from collections.abc import Sequence

from kproxy.dataplane.base import ApplyError, Change, UnsupportedError, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import is_kubelets
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.variant import contents
from kproxy.model import Family


def leftovers(variant: Variant, families: Sequence[Family]) -> list[Change]:
    """What would be removed of one variant. Changes nothing. Raises UnsupportedError and OSError."""
    if not contents(variant, families).ours:
        return []
    if absent := commands.missing(variant, families):
        raise UnsupportedError(
            f"the {variant} variant of iptables holds rules of ours, but {', '.join(absent)} missing"
        )
    found = IptablesKernel(families, variant, guards_localhost=False).read()
    return [change for change in diff({}, found) if not is_kubelets(change.key)]


def clean_up(families: Sequence[Family]) -> None:
    """Remove everything. What cannot be removed is told at the end. Raises ApplyError and OSError."""
    faults = []
    for variant in Variant:
        for family in families:
            try:
                removed = leftovers(variant, [family])
                IptablesKernel([family], variant, guards_localhost=False).apply(removed)
            except (ApplyError, UnsupportedError) as error:
                faults.append(str(error))
    if faults:
        raise ApplyError("\n".join(faults))
