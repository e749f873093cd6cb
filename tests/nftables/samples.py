"""Entries to write: every set and map with elements, and every piece of a rule."""

from __future__ import annotations

import ipaddress
import struct

from kproxy.dataplane.base import Entries
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables.containers import CONTAINERS, Container, container
from kproxy.dataplane.nftables.expressions import Rule, rule
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, Hook, SetKey, Table, TableKey
from kproxy.model import Family

MARK = 0x4000
BOTH = (Family.IPv4, Family.IPv6)
# nft 1.0.6 prints `ct original proto-dst` in a key but cannot parse it there; nft 1.1 can.
NOT_LOADABLE_BY_NFT_1_0_6 = ("affinity", "learn", "learn-nodeports")


def address(family: Family, number: int) -> bytes:
    """An address out of 10.0.0.0/8 or fd00::/8."""
    base = 10 << 24 if family is Family.IPv4 else 0xFD << 120
    return ipaddress.ip_address(base + number).packed if family is Family.IPv6 else struct.pack(">I", base + number)


def endpoint_key(where: Container, *parts: bytes | int, slot: int) -> bytes:
    return where.key(*parts) + struct.pack("=I", slot)


def empty_layout(*families: Family) -> Entries:
    """The tables with every set and map."""
    entries: Entries = {}
    for family in families:
        entries[TableKey(family)] = Table()
        for found in CONTAINERS.values():
            if found.family is family:
                entries[SetKey(family, found.name)] = found
    return entries


def elements(family: Family) -> Entries:
    """Something in every set and map that is not filled by packets, with and without comments."""
    vip, one, two = (address(family, n) for n in (1, 0x10001, 0x10002))
    entries: Entries = {}
    for found in CONTAINERS.values():
        if found.family is not family or found.learned:
            continue
        addresses = (vip,) if found.key_fields[0].pack.endswith("s") else ()
        match found.name:
            case "cluster-ips" | "nodeport-ips":
                entries[found.key(vip)] = "default/kubernetes:https"
                entries[found.key(one)] = ""
            case "hairpin":
                entries[found.key(one, one, 6, 8080)] = ""
            case "source-ranges":
                start = found.key(vip, 17, 53)
                entries[found.interval(start, address(family, 0x100), address(family, 0x1FF))] = "office"
                entries[found.interval(start, address(family, 0x300), address(family, 0x300))] = ""
            case _ if found.data == "verdict":
                entries[found.key(*addresses, 6, 80)] = ("goto masq", "default/web:http")
                entries[found.key(*addresses, 132, 443)] = ("drop", "")
            case _ if found.data:
                for slot, target in enumerate((one, two)):
                    entries[endpoint_key(found, *addresses, 6, 80, slot=slot)] = found.address_port(target, 8080 + slot)
            case _:
                entries[found.key(vip, 6, 80)] = "default/web:http"
    return entries


def rules(family: Family) -> list[Rule]:
    """Every piece, in rules that can stand in one chain."""

    def c(name: str) -> Container:
        return container(family, name)

    cidrs = {
        Family.IPv4: ("10.0.0.0/8", "10.16.0.0/12", "10.1.2.128/25", "192.0.2.7/32", "0.0.0.0/0"),
        Family.IPv6: ("fd00::/8", "fd10::/13", "2001:db8::/33", "::1/128", "::/0"),
    }[family]
    made = [rule(match(cidr), x.return_()) for cidr in cidrs for match in (x.saddr, x.daddr)]
    made += [rule(match(cidr), x.accept()) for cidr in cidrs[:-1] for match in (x.not_saddr, x.not_daddr)]
    for prefix in (False, True):
        made += [rule(x.iifname("cni0", prefix=prefix), x.drop()), rule(x.not_iifname("cni0", prefix=prefix), x.drop())]
    made += [
        rule(x.ct_new(), x.jump("masq")),
        rule(x.ct_dnat(), x.in_set(c("hairpin")), x.goto("masq"), comment="an endpoint that reaches itself"),
        rule(x.saddr_is_local(), x.mark_or(MARK)),
        rule(x.daddr_is_local(), x.not_daddr(cidrs[0]), x.jump("masq")),
        rule(x.in_set(c("firewalled")), x.not_in_set(c("source-ranges")), x.drop()),
        rule(x.in_set(c("cluster-ips")), x.reject(family)),
        rule(x.vmap(c("services"))),
        rule(x.vmap(c("nodeports"))),
        rule(x.dnat(c("endpoints"), 7)),
        rule(x.dnat(c("nodeport-endpoints"), 1)),
    ]
    return made


def affinity_rules(family: Family) -> list[Rule]:
    """The rules that look at the original direction of a connection."""
    affinity = container(family, "affinity")
    return [
        rule(x.dnat_affinity(affinity)),
        rule(x.update_affinity(affinity, 10800)),
        rule(x.update_affinity(affinity, 90061)),
        rule(x.vmap(container(family, "learn"))),
        rule(x.vmap(container(family, "learn-nodeports"))),
    ]


def chains(family: Family) -> dict[ChainKey, Chain]:
    masquerade = rule(x.mark_is_set(MARK), x.mark_xor(MARK), x.masquerade())
    return {
        ChainKey(family, "masq"): Chain(None, (rule(x.mark_or(MARK)),)),
        ChainKey(family, "every-rule"): Chain(None, tuple(rules(family))),
        ChainKey(family, "input"): Chain(Hook("filter", "input", 0), (rule(x.jump("masq")),)),
        ChainKey(family, "output"): Chain(Hook("filter", "output", -110), ()),
        ChainKey(family, "postrouting"): Chain(Hook("nat", "postrouting", 100), (masquerade,)),
    }


def everything(*families: Family) -> Entries:
    """All of it, except what looks at the original direction."""
    entries = empty_layout(*families)
    for family in families:
        entries.update(chains(family))
        entries.update(elements(family))
    return entries
