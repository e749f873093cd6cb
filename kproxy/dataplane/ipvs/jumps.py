"""The chains, and the jumps to them from the built-in ones (reference: section 4.2.5)."""

from __future__ import annotations

from kproxy.dataplane.iptables import entries
from kproxy.dataplane.iptables import names as shared
from kproxy.dataplane.iptables.jumps import BuiltInJump
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.rule import Comment, Jump, Rule
from kproxy.dataplane.ipvs import names

CHAINS: tuple[tuple[Table, str], ...] = (
    ("nat", shared.SERVICES),
    ("nat", shared.POSTROUTING),
    ("nat", names.NODE_PORT),
    ("nat", names.LOAD_BALANCER),
    ("nat", shared.MARK_MASQUERADE),
    ("filter", shared.FORWARD),
    ("filter", names.NODE_PORT),
    ("filter", shared.PROXY_FIREWALL),
    ("filter", names.SOURCE_RANGES_FIREWALL),
    ("filter", names.IPVS_FILTER),
    ("filter", names.IPVS_OUT_FILTER),
)


def _jump(table: Table, chain: str, target: str, comment: str) -> BuiltInJump:
    return BuiltInJump(table, chain, target, Rule((Comment(comment),), Jump(target)))


_ACCESS = "kubernetes ipvs access filter"
_FIREWALL = "kube-proxy firewall rules"
_SERVICES = "kubernetes service portals"

# In the order in which they stand in the kernel: each was put in front of those that were there.
JUMPS = (
    _jump("filter", "INPUT", names.IPVS_FILTER, _ACCESS),
    _jump("filter", "INPUT", shared.PROXY_FIREWALL, _FIREWALL),
    _jump("filter", "INPUT", names.NODE_PORT, "kubernetes health check rules"),
    _jump("filter", "FORWARD", shared.PROXY_FIREWALL, _FIREWALL),
    _jump("filter", "FORWARD", shared.FORWARD, "kubernetes forwarding rules"),
    _jump("filter", "OUTPUT", names.IPVS_OUT_FILTER, _ACCESS),
    _jump("nat", "PREROUTING", shared.SERVICES, _SERVICES),
    _jump("nat", "OUTPUT", shared.SERVICES, _SERVICES),
    _jump("nat", "POSTROUTING", shared.POSTROUTING, "kubernetes postrouting rules"),
)
BUILT_IN: frozenset[tuple[Table, str]] = frozenset((jump.table, jump.chain) for jump in JUMPS)


def jumps_from(table: Table, chain: str) -> list[BuiltInJump]:
    """Those of one built-in chain, from the top."""
    return [jump for jump in JUMPS if jump.table == table and jump.chain == chain]


# What iptables mode does not have under the same name.
OWN = frozenset(CHAINS) - entries.DISPATCH - entries.FIXED
