"""IP packets in bytes: the first packet of a connection, its reply, the next one, and what a reader makes of them.

Every packet carries a tag that survives address translation, so that what comes out of the kernel can be matched with
what went in: the initial sequence number in TCP, the payload in UDP, the initiate tag in SCTP. Both sides of a
connection use the same tag.
"""

from __future__ import annotations

import struct
from enum import Enum
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, inet_ntop
from typing import NamedTuple

from kproxy.model import Protocol

TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
SYN, RST, ACK = 0x02, 0x04, 0x10
SCTP_INIT, SCTP_INIT_ACK, SCTP_COOKIE_ECHO = 1, 2, 10

PORT_UNREACHABLE = {(3, 3), (1, 4)}  # IPv4, IPv6

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_ICMP_ERRORS = {3: "destination unreachable", 11: "time exceeded", 12: "parameter problem"}
_ICMPV6_ERRORS = {1: "destination unreachable", 2: "packet too big", 3: "time exceeded", 4: "parameter problem"}


class Turn(Enum):
    """Which packet of a connection."""

    OPEN = "open"  # SYN, datagram, INIT
    ANSWER = "answer"  # SYN ACK, datagram, INIT ACK: from the endpoint
    NEXT = "next"  # ACK, datagram, COOKIE ECHO: from the client again


class Packet(NamedTuple):
    """A packet that came out of the kernel; of an ICMP error, the packet inside it."""

    protocol: Protocol
    source: str
    source_port: int
    destination: str
    port: int
    tag: int
    flags: int = 0  # TCP
    error: tuple[int, int] | None = None  # ICMP type and code
    reporter: str = ""  # who sent the ICMP error


def build(
    protocol: Protocol, source: str, source_port: int, destination: str, port: int, tag: int, turn: Turn
) -> bytes:
    """One packet with its IP header and right checksums."""
    src, dst = ip_address(source).packed, ip_address(destination).packed
    payload = _segment(protocol, src, source_port, dst, port, tag, turn)
    if len(src) == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol.number, 0) + src + dst
        return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol.number, 64) + src + dst + payload


def segment(
    protocol: Protocol, source: str, source_port: int, destination: str, port: int, tag: int, turn: Turn
) -> bytes:
    """One packet without its IP header, for raw sockets."""
    src, dst = ip_address(source).packed, ip_address(destination).packed
    return _segment(protocol, src, source_port, dst, port, tag, turn)


def datagram(tag: int) -> bytes:
    """The payload of a UDP packet."""
    return struct.pack("!I", tag)


def parse(data: bytes) -> Packet | None:
    """What a packet says; None for packets that are not of the laboratory (neighbour discovery, echo …)."""
    if data[0] >> 4 == 4:
        header, protocol, family = (data[0] & 15) * 4, data[9], AF_INET
        src, dst = data[12:16], data[16:20]
    else:
        header, protocol, family = 40, data[6], AF_INET6
        src, dst = data[8:24], data[24:40]
    return parse_segment(protocol, inet_ntop(family, src), inet_ntop(family, dst), data[header:])


def parse_segment(protocol: int, source: str, destination: str, data: bytes) -> Packet | None:
    """What a packet without its IP header says. ICMP errors carry 8 bytes of the segment at least."""
    if protocol in (ICMP, ICMPV6):
        kinds = _ICMP_ERRORS if protocol == ICMP else _ICMPV6_ERRORS
        inner = parse(data[8:]) if data[0] in kinds and len(data) >= 36 else None
        return inner and inner._replace(error=(data[0], data[1]), reporter=source)
    if protocol not in _PROTOCOLS or len(data) < 8:
        return None
    source_port, port, word = struct.unpack_from("!HHI", data)
    flags, tag = 0, word
    match _PROTOCOLS[protocol]:
        case Protocol.TCP:
            flags = data[13] if len(data) > 13 else SYN
            if flags & RST and word == 0:
                tag = struct.unpack_from("!I", data, 8)[0] - 1
            elif not flags & SYN:
                tag = word - 1
        case Protocol.UDP:
            tag = struct.unpack_from("!I", data, 8)[0] if len(data) >= 12 else 0
        case Protocol.SCTP:
            tag = word or (struct.unpack_from("!I", data, 16)[0] if len(data) >= 20 else 0)
    return Packet(_PROTOCOLS[protocol], source, source_port, destination, port, tag & 0xFFFFFFFF, flags)


def describe_error(packet: Packet) -> str:
    """The ICMP error that a packet met, in words."""
    kind, code = packet.error or (0, 0)
    kinds = _ICMPV6_ERRORS if ":" in packet.reporter else _ICMP_ERRORS
    return f"{kinds[kind]} (type {kind} code {code})"


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _segment(protocol: Protocol, src: bytes, source_port: int, dst: bytes, port: int, tag: int, turn: Turn) -> bytes:
    match protocol:
        case Protocol.TCP:
            flags, seq, ack = {
                Turn.OPEN: (SYN, tag, 0),
                Turn.ANSWER: (SYN | ACK, tag, tag + 1),
                Turn.NEXT: (ACK, tag + 1, tag + 1),
            }[turn]
            data = struct.pack(
                "!HHIIBBHHH", source_port, port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 65535, 0, 0
            )
            return _with_checksum(data, 16, src, dst, TCP)
        case Protocol.UDP:
            data = struct.pack("!HHHH", source_port, port, 12, 0) + datagram(tag)
            return _with_checksum(data, 6, src, dst, UDP)
        case Protocol.SCTP:
            if turn is Turn.NEXT:
                chunk = struct.pack("!BBHI", SCTP_COOKIE_ECHO, 0, 8, 0)
            else:
                kind = SCTP_INIT if turn is Turn.OPEN else SCTP_INIT_ACK
                chunk = struct.pack("!BBHIIHHI", kind, 0, 20, tag, 65535, 1, 1, tag)
            head = struct.pack("!HHI", source_port, port, 0 if turn is Turn.OPEN else tag)
            crc = _crc32c(head + bytes(4) + chunk)
            return head + struct.pack("<I", crc) + chunk


def _with_checksum(data: bytes, at: int, src: bytes, dst: bytes, protocol: int) -> bytes:
    value = checksum(src + dst + struct.pack("!HH", protocol, len(data)) + data) or 0xFFFF
    return data[:at] + struct.pack("!H", value) + data[at + 2 :]


def _crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
