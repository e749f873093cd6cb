"""Sets of the kernel's ipset, over netlink: pyroute2 makes and destroys them, members go in many to a message.

Formats: linux/netfilter/ipset/ip_set.h. IPv4 and IPv6 need sets of their own, but share one space of names.
pyroute2 is imported where it is used: other modes read sets, too, to see whether there are any left to remove.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kproxy.dataplane.base import Entries, UnsupportedError
from kproxy.dataplane.iptables.entries import EXISTS
from kproxy.dataplane.ipvs.entries import Member, MemberKey, SetKey, SetKind, SetType
from kproxy.dataplane.ipvs.names import set_name
from kproxy.dataplane.ipvs.sets import SETS
from kproxy.model import Family, Protocol
from kproxy.netlink import NetlinkSocket, Request, attribute, attributes, nested

_NETLINK_NETFILTER = 12
_LIST, _ADD, _DELETE = 6 << 8 | 7, 6 << 8 | 9, 6 << 8 | 10  # NFNL_SUBSYS_IPSET, IPSET_CMD_*
_PROTOCOL_VERSION = 6  # since Linux 2.6.39; 7 adds what is not used here
_HEADER = struct.pack("=BBH", socket.AF_INET, 0, 0)  # nfgenmsg; the family is that of the set, whatever is said here

# IPSET_ATTR_*: of a message, …
_VERSION, _NAME, _TYPE_NAME, _FAMILY, _MEMBERS, _LINE = 1, 2, 3, 5, 8, 9
# … and of a member.
_MEMBER, _ADDRESS, _PORT, _PROTOCOL, _SOURCE, _SOURCE_LENGTH = 7, 1, 4, 7, 20, 21
_IPV4, _IPV6 = 1, 2
_BIG_ENDIAN = 0x4000  # NLA_F_NET_BYTEORDER
_ATTRIBUTE = struct.Struct("=HH")
_BIG_SHORT = struct.Struct("!H")

_NFPROTO = {Family.IPv4: socket.AF_INET, Family.IPv6: socket.AF_INET6}

_TOGETHER = 200  # members in a message: some 14 kB
_NO_SUCH_SET = errno.ENOENT
_FULL = 4352  # IPSET_ERR_HASH_FULL
_BUSY = 4100  # IPSET_ERR_BUSY
_TEXTS = {
    _FULL: "the set is full (65536 members)",
    _BUSY: "the set is in use by a rule",
    4098: "the kernel has no such type of set",
    4103: "it is there already",
}
_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


def explain(code: int) -> str:
    """What an errno means; ipset has some of its own."""
    return _TEXTS.get(code) or os.strerror(code)


def probe() -> None:
    """Find out whether the kernel has ipset, in a version that will do. Raises UnsupportedError and OSError."""
    from pyroute2 import IPSet
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPSet() as sets:
            (answer,) = sets.get_proto_version()
            version = answer.get_attr("IPSET_ATTR_PROTOCOL")
    except (NetlinkError, OSError) as error:
        raise UnsupportedError(f"ipvs mode: the kernel has no ipset ({error}); load the module ip_set") from error
    if version < _PROTOCOL_VERSION:
        raise UnsupportedError(f"ipvs mode: the kernel speaks version {version} of ipset's protocol, 6 is needed")


def read(families: Iterable[Family]) -> Entries:
    """Our sets, as far as they are there, and their members. Raises OSError."""
    entries: Entries = {}
    with NetlinkSocket(_NETLINK_NETFILTER) as kernel:
        for family, name in ((family, set_name(name, family)) for family in families for name in SETS):
            try:
                messages = list(kernel.dump(Request(_LIST, _message(name))))
            except OSError as error:
                if error.errno == _NO_SUCH_SET:
                    continue
                raise
            for payload in messages:
                fields = attributes(payload, len(_HEADER))
                if _TYPE_NAME in fields:  # only in the first message
                    found = _type(fields, family)
                    if not found:
                        break
                    entries[SetKey(name)] = found
                entries |= {MemberKey(name, _member(data)): EXISTS for data in _several(fields.get(_MEMBERS, b""))}
    return entries


def _type(fields: Mapping[int, bytes], family: Family) -> SetType | None:
    """What a set holds; None: nothing that a set of ours may hold."""
    name = fields[_TYPE_NAME].rstrip(b"\0").decode()
    if name not in set(SetKind) or (name != SetKind.PORT and fields[_FAMILY] != bytes((_NFPROTO[family],))):
        return None
    return SetType(SetKind(name), family)


def make(wanted: Mapping[SetKey, SetType]) -> dict[SetKey, int]:
    """Make sets, in place of those of another type. Returns the errno of each that could not be made."""
    from pyroute2 import IPSet
    from pyroute2.netlink.exceptions import NetlinkError

    failed = {}
    with IPSet() as sets:
        for key, value in wanted.items():
            try:
                try:
                    _create(sets, key, value)
                except NetlinkError as error:
                    if error.code != errno.EEXIST:
                        raise
                    if read([value.family]).get(key) == value:
                        continue
                    sets.destroy(key.name)
                    _create(sets, key, value)
            except NetlinkError as error:
                failed[key] = int(error.code)
    return failed


def _create(sets: Any, key: SetKey, value: SetType) -> None:
    size: dict[str, object] = {"hashsize": 1024, "maxelem": 65536}
    if value.kind is SetKind.PORT:
        size = {"bitmap_ports_range": (0, 65535)}
    sets.create(key.name, stype=value.kind.value, family=_NFPROTO[value.family], **size)


def destroy(keys: Iterable[SetKey]) -> dict[SetKey, int]:
    """Remove sets with their members. Returns the errno of each that could not go, such as one that a rule names."""
    from pyroute2 import IPSet
    from pyroute2.netlink.exceptions import NetlinkError

    failed = {}
    with IPSet() as sets:
        for key in keys:
            try:
                sets.destroy(key.name)
            except NetlinkError as error:
                if error.code != _NO_SUCH_SET:
                    failed[key] = int(error.code)
    return failed


def add(keys: Iterable[MemberKey]) -> dict[MemberKey, int]:
    """Add members; those that are there stay. Returns the errno of each that was refused. Raises OSError."""
    return _send(_ADD, keys)


def delete(keys: Iterable[MemberKey]) -> dict[MemberKey, int]:
    """Remove members, unless they have gone. Returns the errno of each that was refused. Raises OSError."""
    return {key: code for key, code in _send(_DELETE, keys).items() if code != _NO_SUCH_SET}


def _send(command: int, keys: Iterable[MemberKey]) -> dict[MemberKey, int]:
    by_set: defaultdict[str, list[MemberKey]] = defaultdict(list)
    for key in keys:
        by_set[key.set_name].append(key)
    parts = [of[i : i + _TOGETHER] for of in by_set.values() for i in range(0, len(of), _TOGETHER)]
    failed: dict[MemberKey, int] = {}
    with NetlinkSocket(_NETLINK_NETFILTER) as kernel:

        def carry_out(groups: Sequence[Sequence[MemberKey]]) -> Iterator[tuple[Sequence[MemberKey], int]]:
            # One by one: the answer to a refused message repeats it, and many of them are more than a socket holds.
            for group in groups:
                payload = _message(group[0].set_name, [key.member for key in group])
                (code,) = kernel.acknowledged([Request(command, payload)])
                yield group, code

        for part, code in carry_out(parts):
            if code:  # at the first member that is wrong, the rest of the message is left out
                failed |= {key: alone for (key,), alone in carry_out([[key] for key in part]) if alone}
    return failed


def _message(name: str, members: Sequence[Member] = ()) -> bytes:
    start = _HEADER + attribute(_VERSION, bytes((_PROTOCOL_VERSION,))) + attribute(_NAME, name.encode() + b"\0")
    if not members:
        return start
    return start + attribute(_LINE, bytes(4)) + nested(_MEMBERS, *map(_packed, members))


def _packed(member: Member) -> bytes:
    parts = []
    if member.address:
        parts.append(_packed_address(_ADDRESS, member.address))
    if member.protocol or not member.address:
        parts.append(attribute(_PORT | _BIG_ENDIAN, _BIG_SHORT.pack(member.port)))
    if member.protocol:
        parts.append(attribute(_PROTOCOL, bytes((member.protocol.number,))))
    if member.source:
        address, _, length = member.source.partition("/")
        parts.append(_packed_address(_SOURCE, address))
        if length:
            parts.append(attribute(_SOURCE_LENGTH, bytes((int(length),))))
    return nested(_MEMBER, *parts)


def _packed_address(kind: int, address: str) -> bytes:
    if ":" in address:
        return nested(kind, attribute(_IPV6 | _BIG_ENDIAN, socket.inet_pton(socket.AF_INET6, address)))
    return nested(kind, attribute(_IPV4 | _BIG_ENDIAN, socket.inet_pton(socket.AF_INET, address)))


def _several(data: bytes) -> Iterator[dict[int, bytes]]:
    """What is in each of several attributes of the same type."""
    start = 0
    while start < len(data):
        length, _ = _ATTRIBUTE.unpack_from(data, start)
        yield attributes(data[start : start + length], _ATTRIBUTE.size)
        start += length + 3 & ~3


def _member(fields: Mapping[int, bytes]) -> Member:
    port = _BIG_SHORT.unpack(fields[_PORT])[0] if _PORT in fields else 0
    source = _address(fields[_SOURCE]) if _SOURCE in fields else ""
    if _SOURCE_LENGTH in fields:
        source += f"/{fields[_SOURCE_LENGTH][0]}"
    return Member(
        _address(fields[_ADDRESS]) if _ADDRESS in fields else "",
        _PROTOCOLS[fields[_PROTOCOL][0]] if _PROTOCOL in fields else None,
        port,
        source,
    )


def _address(data: bytes) -> str:
    ((kind, address),) = attributes(data).items()
    return socket.inet_ntop(socket.AF_INET6 if kind == _IPV6 else socket.AF_INET, address)
