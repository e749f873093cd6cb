"""Which of a node's addresses count for ipvs mode (reference: section 4.2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from kproxy.model import Family
from kproxy.node_addresses import matching


def usable(addresses: Iterable[str], family: Family) -> tuple[str, ...]:
    """Those of a family that node ports can have, and that are not bound to the device as well.

    `addresses` are those of all interfaces but the device. Loopback and, in IPv6, link-local ones are not among them.
    """
    found = matching(addresses, family, None)
    return tuple(a for a in found if not (family is Family.IPv6 and ip_address(a).is_link_local))
