"""Kernel settings of ipvs mode, written once at start (reference: section 4.2.1)."""

from __future__ import annotations

import platform
import re

import structlog

from kproxy.sysctl import Setting

_VS = "proc/sys/net/ipv4/vs/"
_REUSE_ADDED = (4, 1)
_REUSE_MENDED = (5, 9)  # no second of waiting with conn_reuse_mode 1 any more

log = structlog.get_logger(__name__)


def kernel_version(release: str) -> tuple[int, int]:
    """Major and minor number of a kernel's release, such as 6.1.0-18-amd64. Raises ValueError."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if not found:
        raise ValueError(f"{release!r} is no release of Linux")
    return int(found[1]), int(found[2])


def settings(kernel: tuple[int, int], *, strict_arp: bool) -> list[Setting]:
    """What to write on a kernel of this version.

    `strict_arp`: the node answers ARP only for addresses of the interface that was asked, so that others may have a
    load balancer's address. `conn_reuse_mode` is set where a client's reuse of a port would take a second to connect.
    """
    found = [Setting(f"{_VS}conntrack", 1)]
    if _REUSE_ADDED <= kernel < _REUSE_MENDED:
        found.append(Setting(f"{_VS}conn_reuse_mode", 0))
    found += [
        Setting(f"{_VS}expire_nodest_conn", 1),
        Setting(f"{_VS}expire_quiescent_template", 1),
        Setting("proc/sys/net/ipv4/ip_forward", 1),
    ]
    if strict_arp:
        found += [
            Setting("proc/sys/net/ipv4/conf/all/arp_ignore", 1),
            Setting("proc/sys/net/ipv4/conf/all/arp_announce", 2),
        ]
    return found


def settings_here(*, strict_arp: bool) -> list[Setting]:
    """What to write on this machine."""
    kernel = kernel_version(platform.release())
    if kernel < _REUSE_ADDED:
        log.error("a client that uses a port again waits for a second: this kernel is older than 4.1", kernel=kernel)
    return settings(kernel, strict_arp=strict_arp)
