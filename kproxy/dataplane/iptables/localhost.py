"""Node ports on 127.0.0.1: the kernel setting that they take, and the rule that makes it safe."""

from __future__ import annotations

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.entries import BUILT_IN, ChainKey, JumpKey, SettingKey
from kproxy.dataplane.iptables.jumps import jumps_from
from kproxy.dataplane.iptables.rule import Comment, Conntrack, Jump, Network, Rule
from kproxy.model import Family
from kproxy.sysctl import Setting

LOOPBACK = {Family.IPv4: "127.0.0.0/8", Family.IPv6: "::1/128"}

# With it the kernel routes packets to 127.0.0.0/8, also those that come from neighbours (CVE-2020-8558).
ROUTE_LOCALNET = SettingKey(Family.IPv4, "proc/sys/net/ipv4/conf/all/route_localnet")

# The rules of KUBE-FIREWALL; kubelet has the same.
GUARD = (
    Rule(
        (
            Comment("block incoming localnet connections"),
            Conntrack("RELATED,ESTABLISHED,DNAT", inverted=True),
        ),
        Jump("DROP"),
        source=Network(LOOPBACK[Family.IPv4], inverted=True),
        destination=Network(LOOPBACK[Family.IPv4]),
    ),
)


# All of KUBE-FIREWALL: the chain and the way to it.
GUARDED: Entries = {ChainKey(Family.IPv4, "filter", names.KUBELET_FIREWALL): GUARD} | {
    JumpKey(Family.IPv4, table, chain, place): jump.rule
    for table, chain in BUILT_IN
    for place, jump in enumerate(jumps_from(table, chain))
    if jump.target == names.KUBELET_FIREWALL
}


def is_guarded(in_place: Entries) -> bool:
    """Whether what the kernel holds keeps neighbours from what listens on loopback only."""
    return all(in_place.get(key) == value for key, value in GUARDED.items())


def setting(key: SettingKey, wanted: object) -> Setting:
    """What is to be written; None: the setting is taken back."""
    opt_out = "iptables.localhostNodePorts: false" if wanted is not None else ""
    return Setting(key.path, int(wanted is not None), opt_out=opt_out)
