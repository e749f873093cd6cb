"""What keys and data of sets and maps are made of: how a field is loaded, packed, shown, and known to nft.

A `Field` is everything that is known of one component, so that rules, elements and the `typeof` note that nft reads
back all come from one declaration. Numbers are those of `linux/netfilter/nf_tables.h`; those of the `typeof` note,
which the kernel stores without looking at it, were read from sets that nft 1.0.6 made.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from kproxy.model import Family

REGISTER_BYTES = 4

_TRANSPORT_HEADER = 2  # NFT_PAYLOAD_TRANSPORT_HEADER
_NETWORK_HEADER = 1  # NFT_PAYLOAD_NETWORK_HEADER
META_L4PROTO = 16
CT_DST_IP, CT_DST_IP6, CT_PROTO_DST = 20, 22, 12
_DIRECTION_ORIGINAL = 0
_NUMGEN_RANDOM = 1

# Data types as nft numbers them (its `enum datatypes`); only nft reads them.
TYPE_VERDICT = 0xFFFFFF00
_TYPE_INTEGER, _TYPE_IPV4, _TYPE_IPV6, _TYPE_PROTOCOL, _TYPE_SERVICE = 4, 7, 8, 12, 13
TYPE_BITS = 6

# Expressions as nft numbers them in a typeof note.
_NOTE_PAYLOAD, _NOTE_META, _NOTE_CT, _NOTE_CONCAT, _NOTE_NUMGEN = 7, 9, 12, 13, 23
_NOTE_VERDICT = 1
_HEADER_TH, _HEADER_IP, _HEADER_IP6 = 11, 12, 13
_TH_DPORT = 2
_IP_SADDR, _IP_DADDR = 11, 12
_IP6_SADDR, _IP6_DADDR = 8, 9

FAMILY_WORDS = {Family.IPv4: "ip", Family.IPv6: "ip6"}
PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}

Attributes = tuple[tuple[int, bytes], ...]


class Field(NamedTuple):
    """One component of a key or of data.

    `load` names the expression that puts it in a register, with its attributes except the register. `note` is what a
    typeof note says of it. `pack` is its `struct` format with padding, big-endian; empty for what is in host order.
    """

    text: str
    length: int
    datatype: int
    pack: str
    load: tuple[str, Attributes]
    note: bytes

    @property
    def registers(self) -> int:
        """How many 4-byte registers it takes, which is its padded length in a concatenation."""
        return -(-self.length // REGISTER_BYTES)

    def show(self, packed: bytes) -> str:
        """A packed value as nft prints it."""
        match self.datatype:
            case 7:
                return socket.inet_ntop(socket.AF_INET, packed[:4])
            case 8:
                return socket.inet_ntop(socket.AF_INET6, packed)
            case 12:
                return PROTOCOLS.get(packed[0], str(packed[0]))
            case 13:
                return str(int.from_bytes(packed[:2], "big"))
            case _:
                return f"slot {struct.unpack('=I', packed)[0]}"


def _be32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def tlv(kind: int, value: bytes) -> bytes:
    """An entry of a note for nft: one byte for type and length each."""
    return bytes((kind, len(value))) + value


def note32(kind: int, number: int) -> bytes:
    """A number in a note, in host order."""
    return tlv(kind, struct.pack("=I", number))


def _note(expression: int, content: bytes) -> bytes:
    return note32(0, expression) + tlv(1, content)


def _payload(
    text: str, length: int, datatype: int, pack: str, base: int, offset: int, header: int, field: int
) -> Field:
    load = ("payload", ((2, _be32(base)), (3, _be32(offset)), (4, _be32(length))))
    return Field(text, length, datatype, pack, load, _note(_NOTE_PAYLOAD, note32(0, header) + note32(1, field)))


def _ct(text: str, length: int, datatype: int, pack: str, key: int) -> Field:
    load = ("ct", ((2, _be32(key)), (3, bytes((_DIRECTION_ORIGINAL,)))))
    return Field(text, length, datatype, pack, load, _note(_NOTE_CT, note32(0, key) + note32(1, _DIRECTION_ORIGINAL)))


def slot(modulus: int) -> Field:
    """`numgen random mod N`: in a key the number of a slot, in host order."""
    load = ("numgen", ((2, _be32(modulus)), (3, _be32(_NUMGEN_RANDOM)), (4, _be32(0))))
    # A note has room for one modulus, while rules with any modulus look the same map up; what nft needs is the type.
    note = _note(_NOTE_NUMGEN, note32(0, _NUMGEN_RANDOM) + note32(1, 2) + note32(2, 0))
    return Field(f"numgen random mod {modulus}", 4, _TYPE_INTEGER, "", load, note)


class Addresses(NamedTuple):
    """The address fields of one family."""

    source: Field
    destination: Field
    original_destination: Field


ADDRESSES = {
    Family.IPv4: Addresses(
        _payload("ip saddr", 4, _TYPE_IPV4, "4s", _NETWORK_HEADER, 12, _HEADER_IP, _IP_SADDR),
        _payload("ip daddr", 4, _TYPE_IPV4, "4s", _NETWORK_HEADER, 16, _HEADER_IP, _IP_DADDR),
        _ct("ct original ip daddr", 4, _TYPE_IPV4, "4s", CT_DST_IP),
    ),
    Family.IPv6: Addresses(
        _payload("ip6 saddr", 16, _TYPE_IPV6, "16s", _NETWORK_HEADER, 8, _HEADER_IP6, _IP6_SADDR),
        _payload("ip6 daddr", 16, _TYPE_IPV6, "16s", _NETWORK_HEADER, 24, _HEADER_IP6, _IP6_DADDR),
        _ct("ct original ip6 daddr", 16, _TYPE_IPV6, "16s", CT_DST_IP6),
    ),
}
PROTOCOL = Field(
    "meta l4proto",
    1,
    _TYPE_PROTOCOL,
    "B3x",
    ("meta", ((2, _be32(META_L4PROTO)),)),
    _note(_NOTE_META, note32(0, META_L4PROTO)),
)
PORT = _payload("th dport", 2, _TYPE_SERVICE, "H2x", _TRANSPORT_HEADER, 2, _HEADER_TH, _TH_DPORT)
ORIGINAL_PORT = _ct("ct original proto-dst", 2, _TYPE_SERVICE, "H2x", CT_PROTO_DST)
SLOT = slot(2)


def typeof(fields: tuple[Field, ...]) -> bytes:
    """The note for a key or for data; of no fields, that of a verdict."""
    match fields:
        case ():
            return _note(_NOTE_VERDICT, b"")
        case (single,):
            return single.note
        case _:
            return _note(_NOTE_CONCAT, b"".join(tlv(index, field.note) for index, field in enumerate(fields)))


def datatype(fields: tuple[Field, ...]) -> int:
    """nft's number for the type of a key or of data."""
    if not fields:
        return TYPE_VERDICT
    number = 0
    for field in fields:
        number = number << TYPE_BITS | field.datatype
    return number
