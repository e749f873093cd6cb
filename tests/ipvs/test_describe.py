"""Entries of ipvs mode in one line."""

from __future__ import annotations

import pytest

from kproxy.dataplane.iptables.entries import EXISTS, ChainKey
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import (
    MH_PORT,
    PERSISTENT,
    AddressKey,
    DeviceKey,
    Member,
    MemberKey,
    RealServer,
    RealServerKey,
    SetKey,
    SetKind,
    SetType,
    VirtualServer,
    VirtualServerKey,
)
from kproxy.model import Family, Protocol
from tests.iptables.samples import routed, service_port
from tests.ipvs.samples import rendered

V4 = Family.IPv4
VIP = "10.96.0.30"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (VirtualServerKey(V4, VIP, Protocol.TCP, 80), VirtualServer("rr"), f"virtual server {VIP}:80/TCP: rr"),
        (
            VirtualServerKey(Family.IPv6, "fd00:96::30", Protocol.UDP, 53),
            VirtualServer("mh", MH_PORT | PERSISTENT, 60),
            "virtual server [fd00:96::30]:53/UDP: mh, persistent, mh-port, timeout 60 s",
        ),
        (
            RealServerKey(V4, VIP, Protocol.TCP, 80, "10.180.0.1", 8080),
            RealServer(0),
            f"virtual server {VIP}:80/TCP to 10.180.0.1:8080: weight 0",
        ),
        (DeviceKey(), EXISTS, "interface kube-ipvs0"),
        (AddressKey(V4, VIP), EXISTS, f"interface kube-ipvs0: address {VIP}"),
        (
            SetKey("KUBE-LOOP-BACK"),
            SetType(SetKind.ADDRESS_PORT_ADDRESS, V4),
            "ipset KUBE-LOOP-BACK: hash:ip,port,ip for IPv4",
        ),
        (MemberKey("KUBE-NODE-PORT-TCP", Member(port=30080)), EXISTS, "ipset KUBE-NODE-PORT-TCP: member 30080"),
        (ChainKey(V4, "nat", "KUBE-SERVICES"), EXISTS, "iptables nat chain KUBE-SERVICES"),
    ],
)
def test_entries_for_people(key: object, value: object, text: str) -> None:
    assert describe(key, value) == text


def test_rules_for_people() -> None:
    port = service_port(load_balancer_ips=("198.51.100.10",), source_ranges=("203.0.113.0/24",))
    entries = rendered(routed(port))

    [text] = [describe(key, value) for key, value in entries.items() if "OUT-FILTER" in str(key)]

    assert text == (
        "iptables filter chain KUBE-IPVS-OUT-FILTER: "
        "-s 198.51.100.10/32 -m ipvs --vproto 6 --vaddr 198.51.100.10 --vport 80 -j DROP"
    )
