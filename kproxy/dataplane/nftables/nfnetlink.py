"""nfnetlink as the kernel speaks it: attributes, messages, and a socket for batches and dumps.

Numbers and layouts are those of `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `nf_tables.h`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from kproxy.netlink import DumpInterruptedError, attribute

NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_REQUEST = 0x01
_NLM_F_DUMP = 0x300
_NLM_F_DUMP_INTR = 0x10
_NLM_F_ACK_TLVS = 0x200
_ATTR_MESSAGE = 1  # NLMSGERR_ATTR_MSG
_ATTR_OFFSET = 2  # NLMSGERR_ATTR_OFFS

_SUBSYSTEM_NFTABLES = 10
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11

HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_RECEIVE_SIZE = 1 << 17
_ERROR_BUFFER = 1 << 22  # room for the errors of thousands of messages of one batch
_SEND_MARGIN = 32  # netlink_sendmsg refuses what is longer than the send buffer less this


class Nfproto(IntEnum):
    """Families as netfilter numbers them."""

    UNSPEC = 0
    IPV4 = 2
    IPV6 = 10


class Msg(IntEnum):
    """nf_tables message types in use (`enum nf_tables_msg_types`)."""

    NEWTABLE = 0
    GETTABLE = 1
    DELTABLE = 2
    NEWCHAIN = 3
    GETCHAIN = 4
    DELCHAIN = 5
    NEWRULE = 6
    GETRULE = 7
    DELRULE = 8
    NEWSET = 9
    GETSET = 10
    DELSET = 11
    NEWSETELEM = 12
    GETSETELEM = 13
    DELSETELEM = 14
    NEWGEN = 15
    GETGEN = 16
    DESTROYSETELEM = 30


class Flag(IntFlag):
    """Message flags of additions."""

    NONE = 0
    EXCL = 0x200
    CREATE = 0x400
    APPEND = 0x800


class Message(NamedTuple):
    """One nf_tables message of a batch; `attributes` is the encoded payload."""

    type: Msg
    family: Nfproto
    attributes: bytes
    flags: Flag = Flag.NONE


class MessageError(NamedTuple):
    """The kernel's refusal of one message of a batch.

    `position` is that of the message, -1 for the batch as a whole; `offset` counts from the message's header to the
    attribute that was refused, 0 where the kernel did not say.
    """

    position: int
    errno: int
    text: str
    offset: int


def nested(kind: int, *members: bytes) -> bytes:
    """An attribute that holds attributes; nf_tables neither sets nor wants NLA_F_NESTED."""
    return attribute(kind, b"".join(members))


def u32(kind: int, value: int) -> bytes:
    """A number in network order, as nf_tables has them."""
    return attribute(kind, value.to_bytes(4, "big"))


def string(kind: int, text: str) -> bytes:
    """A string with its final zero."""
    return attribute(kind, text.encode() + b"\0")


def text(payload: bytes) -> str:
    """The string in an attribute."""
    return payload.rstrip(b"\0").decode(errors="replace")


def each(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a payload, in order, as (type, value)."""
    at, end = 0, len(payload)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        if length < 4:
            raise OSError(errno.EBADMSG, f"netlink attribute of length {length}")
        yield kind & _TYPE_MASK, payload[at + 4 : at + length]
        at += (length + 3) & ~3


def parsed(payload: bytes) -> dict[int, bytes]:
    """The attributes of a payload by type."""
    return dict(each(payload))


class Received(NamedTuple):
    """One message from the kernel; `type` is the nf_tables type, or the negated netlink type of control messages."""

    type: int
    flags: int
    port: int
    sequence: int
    family: int
    attributes: bytes


def messages(datagram: bytes) -> Iterator[Received]:
    """The messages in what was received at once."""
    at, end = 0, len(datagram)
    while at + HEADER.size <= end:
        length, kind, flags, sequence, port = HEADER.unpack_from(datagram, at)
        if length < HEADER.size:
            raise OSError(errno.EBADMSG, f"netlink message of length {length}")
        if kind >> 8 == _SUBSYSTEM_NFTABLES:
            yield Received(kind & 0xFF, flags, port, sequence, datagram[at + 16], datagram[at + 20 : at + length])
        else:
            yield Received(-kind, flags, port, sequence, 0, datagram[at + 16 : at + length])
        at += (length + 3) & ~3


def _frame(kind: int, flags: int, sequence: int, family: int, resource: int, attributes: bytes) -> bytes:
    header = HEADER.pack(20 + len(attributes), kind, flags | _NLM_F_REQUEST, sequence, 0)
    return header + _GENERIC.pack(family, 0, resource) + attributes


class NetlinkSocket:
    """A netlink socket to nf_tables in the network namespace of the thread that creates it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._force_buffer(_SO_RCVBUFFORCE, socket.SO_RCVBUF, _ERROR_BUFFER)
        except OSError:
            self._socket.close()
            raise
        self._sequence = 0
        self.port: int = self._socket.getsockname()[0]

    def close(self) -> None:
        """Close it; the kernel then lets go of the tables that it owns."""
        self._socket.close()

    def room(self, length: int) -> int:
        """How many bytes one batch may have; the send buffer is widened to `length` where that is permitted."""
        if length > self._room():
            self._force_buffer(_SO_SNDBUFFORCE, socket.SO_SNDBUF, length)
        return self._room()

    def _room(self) -> int:
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _SEND_MARGIN

    def _force_buffer(self, forced: int, plain: int, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:  # in a user namespace of an older kernel; the system-wide limit then applies
            self._socket.setsockopt(socket.SOL_SOCKET, plain, size)

    def transact(self, batch: Sequence[Message]) -> list[MessageError]:
        """Send one transaction. It is in force if the list of errors is empty, otherwise nothing of it is.

        Raises OSError if it could not be sent.
        """
        first = self._sequence + 1
        self._sequence += len(batch) + 2
        frames = [_frame(_BATCH_BEGIN, 0, first, 0, _SUBSYSTEM_NFTABLES, b"")]
        frames += [
            _frame(_SUBSYSTEM_NFTABLES << 8 | kind, flags, sequence, family, 0, attributes)
            for sequence, (kind, family, attributes, flags) in enumerate(batch, first + 1)
        ]
        frames.append(_frame(_BATCH_END, 0, self._sequence, 0, _SUBSYSTEM_NFTABLES, b""))
        self._socket.send(b"".join(frames))
        return list(self._errors(first, len(batch)))

    def _errors(self, first: int, count: int) -> Iterator[MessageError]:
        # The kernel processes a batch before send() returns, so what it has to say is in the buffer by now.
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield MessageError(-1, errno.ENOBUFS, "more errors than the socket holds", 0)
                continue
            for received in messages(datagram):
                index = received.sequence - first - 1
                if received.type == -_NLMSG_ERROR and -1 <= index <= count:
                    number, extended, offset = _error(received)
                    if number:
                        yield MessageError(index if index < count else -1, number, extended, offset)

    def dump(self, kind: Msg, family: Nfproto, attributes: bytes = b"") -> Iterator[Received]:
        """Everything of a kind. Raises DumpInterruptedError if the ruleset changed meanwhile, OSError if refused."""
        yield from self._request(kind, family, attributes, _NLM_F_DUMP)

    def get(self, kind: Msg, family: Nfproto, attributes: bytes = b"") -> Received:
        """One object. Raises OSError, FileNotFoundError if there is none."""
        for received in self._request(kind, family, attributes, 0):
            return received
        raise OSError(errno.EBADMSG, f"no answer to {kind.name}")

    def _request(self, kind: Msg, family: Nfproto, attributes: bytes, flags: int) -> Iterator[Received]:
        self._sequence = sequence = self._sequence + 1
        self._socket.send(_frame(_SUBSYSTEM_NFTABLES << 8 | kind, flags, sequence, family, 0, attributes))
        interrupted = False
        while True:
            for received in messages(self._socket.recv(_RECEIVE_SIZE)):
                if received.sequence != sequence:
                    continue  # the rest of a dump that its reader gave up
                interrupted |= bool(received.flags & _NLM_F_DUMP_INTR)
                if received.type >= 0:
                    yield received
                    if flags == 0:
                        return
                elif received.type == -_NLMSG_DONE:
                    if interrupted:
                        raise DumpInterruptedError(errno.EINTR, "the ruleset changed while it was read")
                    return
                elif received.type == -_NLMSG_ERROR:
                    number, extended, _ = _error(received)
                    raise OSError(number, f"{kind.name}: {extended or os.strerror(number)}")


def _error(received: Received) -> tuple[int, str, int]:
    """Error number, the kernel's own words and the offset of the refused attribute."""
    number = -int.from_bytes(received.attributes[:4], sys.byteorder, signed=True)
    extended, offset = "", 0
    if received.flags & _NLM_F_ACK_TLVS:
        attributes = parsed(received.attributes[20:])
        extended = text(attributes.get(_ATTR_MESSAGE, b""))
        offset = int.from_bytes(attributes.get(_ATTR_OFFSET, b"\0"), sys.byteorder)
    return number, extended, offset
