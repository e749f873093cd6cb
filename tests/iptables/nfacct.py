"""Counters of nfacct: objects that rules refer to, and that must exist before them."""

from __future__ import annotations

import socket
import struct

from kproxy.dataplane.iptables.options import INVALID_DROPPED, LOCALHOST_ACCEPTED
from kproxy.netlink import NetlinkSocket, Request, attribute
from tests.lab.namespaces import Namespace

NETLINK_NETFILTER = 12  # linux/netlink.h; Python has no name for it
ACCT_NEW = 7 << 8  # linux/netfilter/nfnetlink_acct.h
ACCT_NAME = 1


def make_counters(netns: Namespace) -> None:
    netns.run(_make_counters)


def _make_counters() -> None:
    with NetlinkSocket(NETLINK_NETFILTER) as kernel:
        header = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
        names = (INVALID_DROPPED, LOCALHOST_ACCEPTED)
        requests = [Request(ACCT_NEW, header + attribute(ACCT_NAME, name.encode() + b"\0")) for name in names]
        assert kernel.acknowledged(requests) == [0, 0]
