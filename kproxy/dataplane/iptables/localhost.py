"""Node ports on 127.0.0.1: the kernel setting that they take, and never without the rule that makes it safe."""

from __future__ import annotations

from collections.abc import Mapping

from kproxy.dataplane.base import Key, Value
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.entries import BUILT_IN, ChainKey, JumpKey
from kproxy.dataplane.iptables.jumps import jumps_from
from kproxy.model import Family
from kproxy.sysctl import Setting

_OPT_OUT = "iptables.localhostNodePorts: false"
_PATH = "proc/sys/net/ipv4/conf/all/route_localnet"
RESTORED = Setting(_PATH, 0)  # for clean-up


def route_localnet(wanted: Mapping[Key, Value], in_place: Mapping[Key, Value]) -> Setting:
    """The setting, to be written after the guard. Raises ValueError while the kernel does not hold that as wanted.

    With it the kernel routes packets to 127.0.0.0/8 that come from neighbours, to services that listen on loopback only
    (CVE-2020-8558).
    """
    guard: list[Key] = [ChainKey(Family.IPv4, "filter", names.KUBELET_FIREWALL)]
    for table, chain in BUILT_IN:
        for place, jump in enumerate(jumps_from(table, chain)):
            if jump.target == names.KUBELET_FIREWALL:
                guard.append(JumpKey(Family.IPv4, table, chain, place))
    for key in guard:
        if not wanted.get(key) or in_place.get(key) != wanted[key]:
            raise ValueError(f"route_localnet would let neighbours in: {key} is not in place")
    return Setting(_PATH, 1, opt_out=_OPT_OUT)
