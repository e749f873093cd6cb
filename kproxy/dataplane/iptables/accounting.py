"""Counters of nfacct: objects that rules refer to, and that must exist before them.

Message layout: linux/netfilter/nfnetlink_acct.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

from kproxy.dataplane.nftables.nfnetlink import NETLINK_NETFILTER
from kproxy.netlink import NetlinkSocket, Request, attribute, attributes

_NEW, _GET = 7 << 8, 7 << 8 | 1  # NFNL_SUBSYS_ACCT, NFNL_MSG_ACCT_NEW and _GET
_NAME, _PACKETS = 1, 2  # NFACCT_NAME, NFACCT_PKTS
_GENERIC = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)  # nfgenmsg


def ensure_counters(names: Sequence[str]) -> frozenset[str]:
    """Create the counters that are missing; returns those that exist now. Those that exist keep what they counted.

    Where the kernel has no nfacct, there is none, and no error.
    """
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as kernel:
            requests = [Request(_NEW, _GENERIC + attribute(_NAME, name.encode() + b"\0")) for name in names]
            answers = kernel.acknowledged(requests)
    except OSError:
        return frozenset()
    return frozenset(name for name, answer in zip(names, answers, strict=True) if answer in (0, errno.EBUSY))


def packets() -> dict[str, int]:
    """What each counter has counted. Empty where the kernel has no nfacct."""
    found = {}
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as kernel:
            for payload in kernel.dump(Request(_GET, _GENERIC)):
                members = attributes(payload, len(_GENERIC))
                found[members[_NAME].rstrip(b"\0").decode()] = int.from_bytes(members[_PACKETS], "big")
    except OSError:
        return {}
    return found


def is_supported() -> bool:
    """Whether the kernel has nfacct. Changes nothing."""
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as kernel:
            list(kernel.dump(Request(_GET, _GENERIC)))
    except OSError:
        return False
    return True
