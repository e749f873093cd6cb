"""The jumps from the built-in chains (reference: section 4.1.2)."""

from __future__ import annotations

from typing import NamedTuple

from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.rule import Comment, Conntrack, Jump, Match, Rule


class BuiltInJump(NamedTuple):
    """A jump from a built-in chain to one of ours."""

    table: Table
    chain: str
    target: str
    rule: Rule


def _jump(table: Table, chain: str, target: str, comment: str = "", *, new: bool = False) -> BuiltInJump:
    matches: list[Match] = [Conntrack("NEW")] if new else []
    if comment:
        matches.append(Comment(comment))
    return BuiltInJump(table, chain, target, Rule(tuple(matches), Jump(target)))


_FIREWALL = "kubernetes load balancer firewall"
_EXTERNAL = "kubernetes externally-visible service portals"
_SERVICES = "kubernetes service portals"

# In the order in which they stand in the kernel: each was put in front of those that were there.
JUMPS = (
    _jump("filter", "INPUT", names.KUBELET_FIREWALL),
    _jump("filter", "INPUT", names.PROXY_FIREWALL, _FIREWALL, new=True),
    _jump("filter", "INPUT", names.NODE_PORTS, "kubernetes health check service ports"),
    _jump("filter", "INPUT", names.EXTERNAL_SERVICES, _EXTERNAL, new=True),
    _jump("filter", "FORWARD", names.PROXY_FIREWALL, _FIREWALL, new=True),
    _jump("filter", "FORWARD", names.FORWARD, "kubernetes forwarding rules"),
    _jump("filter", "FORWARD", names.SERVICES, _SERVICES, new=True),
    _jump("filter", "FORWARD", names.EXTERNAL_SERVICES, _EXTERNAL, new=True),
    _jump("filter", "OUTPUT", names.KUBELET_FIREWALL),
    _jump("filter", "OUTPUT", names.PROXY_FIREWALL, _FIREWALL, new=True),
    _jump("filter", "OUTPUT", names.SERVICES, _SERVICES, new=True),
    _jump("nat", "PREROUTING", names.SERVICES, _SERVICES),
    _jump("nat", "OUTPUT", names.SERVICES, _SERVICES),
    _jump("nat", "POSTROUTING", names.POSTROUTING, "kubernetes postrouting rules"),
)


def jumps_from(table: Table, chain: str) -> list[BuiltInJump]:
    """Those of one built-in chain, from the top."""
    return [jump for jump in JUMPS if jump.table == table and jump.chain == chain]
