"""The dummy interface that holds the addresses of Services, so that the node takes their packets for its own.

It stays down: an address counts as local all the same, and nothing is ever sent through it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.ipvs.entries import AddressKey
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.model import Family
from kproxy.netlink import NetlinkSocket, Request, attribute, attributes

_BROADCAST = "ff:ff:ff:ff:ff:ff"
_NETLINK_ROUTE = 0
_NEW, _DELETE, _GET = 20, 21, 22  # RTM_NEWADDR …
_HEADER = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
_ADDRESS, _LOCAL = 1, 2  # IFA_ADDRESS, IFA_LOCAL
_NO_DETECTION = 0x02  # IFA_F_NODAD: no neighbour can have it, for none is asked
_LINK_SCOPE = 253  # addresses that IPv6 makes by itself, should someone set the interface up
_ADDRESS_FAMILY = {Family.IPv4: socket.AF_INET, Family.IPv6: socket.AF_INET6}
_FAMILY = {number: family for family, number in _ADDRESS_FAMILY.items()}


def index() -> int:
    """The number of the interface; 0: it is not there."""
    try:
        return socket.if_nametoindex(DEVICE)
    except OSError:
        return 0


def make() -> None:
    """Make the interface unless it is there. Raises OSError."""
    _link("add", {"ifname": DEVICE, "kind": "dummy"}, errno.EEXIST)


def probe() -> None:
    """Find out whether the kernel has such interfaces, without making one. Raises UnsupportedError and OSError."""
    if index():
        return
    try:
        # They look at the hardware address before they come to be, and none can have that of everybody.
        _link("add", {"ifname": DEVICE, "kind": "dummy", "address": _BROADCAST}, errno.EADDRNOTAVAIL)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise UnsupportedError("ipvs mode: the kernel has no dummy interfaces; load the module dummy") from error
        raise


def remove() -> None:
    """Remove the interface, with its addresses, unless it has gone. Raises OSError."""
    if number := index():
        _link("del", {"index": number}, errno.ENODEV)


def _link(command: str, what: dict[str, str | int], done_already: int) -> None:
    from pyroute2 import IPRoute  # 22 MB, and who only looks does not need it
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            route.link(command, **what)
    except NetlinkError as error:
        if error.code != done_already:
            raise OSError(error.code, f"interface {DEVICE}: {error.args[-1]}") from error


def addresses() -> set[AddressKey]:
    """The addresses on the interface. Raises OSError."""
    number = index()
    found: set[AddressKey] = set()
    if not number:
        return found
    everything = Request(_GET, _HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    with NetlinkSocket(_NETLINK_ROUTE) as kernel:
        for payload in kernel.dump(everything):
            family, _, _, scope, interface = _HEADER.unpack_from(payload)
            if interface == number and family in _FAMILY and scope != _LINK_SCOPE:
                fields = attributes(payload, _HEADER.size)
                address = fields[_LOCAL] if _LOCAL in fields else fields[_ADDRESS]
                found.add(AddressKey(_FAMILY[family], socket.inet_ntop(family, address)))
    return found


def bind(keys: Iterable[AddressKey]) -> dict[AddressKey, int]:
    """Put addresses on the interface. Returns the errno of each that the kernel refused. Raises OSError."""
    return _send(_NEW, list(keys), errno.EEXIST)


def unbind(keys: Iterable[AddressKey]) -> dict[AddressKey, int]:
    """Take addresses off the interface. Returns the errno of each that the kernel refused. Raises OSError."""
    return _send(_DELETE, list(keys), errno.EADDRNOTAVAIL)


def _send(kind: int, keys: list[AddressKey], done_already: int) -> dict[AddressKey, int]:
    number = index()
    if not number:
        return dict.fromkeys(keys, errno.ENODEV) if kind == _NEW else {}
    with NetlinkSocket(_NETLINK_ROUTE) as kernel:
        codes = kernel.acknowledged([Request(kind, _packed(key, number)) for key in keys])
    return {key: code for key, code in zip(keys, codes, strict=True) if code not in (0, done_already)}


def _packed(key: AddressKey, interface: int) -> bytes:
    family = _ADDRESS_FAMILY[key.family]
    flags = _NO_DETECTION if key.family is Family.IPv6 else 0
    address = socket.inet_pton(family, key.address)
    return (
        _HEADER.pack(family, key.family.bits, flags, 0, interface)
        + attribute(_LOCAL, address)
        + attribute(_ADDRESS, address)
    )
