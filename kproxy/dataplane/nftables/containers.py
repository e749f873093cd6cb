"""Every set and map of the layout, declared once (README.md), and the packing of their keys and data.

An element is an entry of the diff:

- key: `bytes`, the container's number and the key as the kernel has it (each field padded to 4 bytes); of an interval
  set the lowest key and then the highest;
- value: `bytes` (address and port) in maps of endpoints, `(verdict, comment)` in maps of verdicts, the comment in sets.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from kproxy.dataplane.nftables.fields import (
    ADDRESSES,
    ORIGINAL_PORT,
    PORT,
    PROTOCOL,
    SLOT,
    Field,
)
from kproxy.model import Family

COMMENT_BYTES = 127  # nft loads no longer ones
AFFINITY_SIZE = 1 << 20  # clients remembered in one family: about 150 MB of kernel memory, which anyone can fill
_IPV6_BIT = 0x80


@dataclass(frozen=True, eq=False)
class Container:
    """A set or map of one family. Compared by identity: there is one object for each."""

    number: int  # the first byte of the keys of its elements
    family: Family
    name: str
    key_fields: tuple[Field, ...]
    data: Literal["verdict"] | tuple[Field, ...] | None = None
    has_intervals: bool = False
    learned: bool = False  # filled by packets, with a timeout
    counter: bool = False
    _packers: dict[int, struct.Struct] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        packers = {}
        pattern = ">B"
        for count, part in enumerate(self.key_fields, 1):
            pattern += part.pack
            packers[count] = struct.Struct(pattern)
        object.__setattr__(self, "_packers", packers)

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        return f"{'map' if self.data else 'set'} {self.name}"

    @cached_property
    def key_length(self) -> int:
        """Bytes of a packed key, or of one end of an interval."""
        return sum(part.registers * 4 for part in self.key_fields)

    @cached_property
    def data_fields(self) -> tuple[Field, ...]:
        """The fields of the data; none for verdicts."""
        return self.data if isinstance(self.data, tuple) else ()

    @cached_property
    def data_length(self) -> int:
        """Bytes of packed data; 0 for verdicts."""
        return sum(part.registers * 4 for part in self.data_fields)

    def key(self, *parts: bytes | int) -> bytes:
        """The key of the given fields: packed addresses, protocol and port numbers.

        With fewer than all fields, what the keys of such elements begin with: a slot follows as a number in host order.
        """
        return self._packers[len(parts)].pack(self.number, *parts)

    def interval(self, start: bytes, first: bytes, last: bytes) -> bytes:
        """The key of an interval: `start` of all fields but the last, which goes from `first` to `last`."""
        return b"".join((start, first, start[1:], last))

    def address_port(self, address: bytes, port: int) -> bytes:
        """The value of an endpoint."""
        return address + port.to_bytes(2, "big") + b"\0\0"

    def show_key(self, key: bytes) -> tuple[str, ...]:
        """The fields of a key as text."""
        shown = _show(self.key_fields, key[1:])
        if self.has_intervals:
            *_, width = self.key_fields
            end = self.key_length + 1
            first, last = key[end - width.length : end], key[-width.length :]
            shown = (*shown[:-1], _show_range(first, last))
        return shown

    def show_address_port(self, value: bytes) -> str:
        """An endpoint as `address:port`."""
        address, port = _show(self.data_fields, value)
        return f"[{address}]:{port}" if self.family is Family.IPv6 else f"{address}:{port}"


def _show(fields: tuple[Field, ...], packed: bytes) -> tuple[str, ...]:
    shown = []
    at = 0
    for part in fields:
        end = at + part.registers * 4
        shown.append(part.show(packed[at:end]))
        at = end
    return tuple(shown)


def _show_range(first: bytes, last: bytes) -> str:
    low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
    different = int.from_bytes(first, "big") ^ int.from_bytes(last, "big")
    network = ipaddress.ip_network(f"{low}/{low.max_prefixlen - different.bit_length()}", strict=False)
    return str(network) if (network[0], network[-1]) == (low, high) else f"{low}-{high}"


def element_comment(text: str) -> str:
    """A comment cut to what nft can load again."""
    if len(text) <= COMMENT_BYTES and text.isascii():
        return text
    return text.encode()[:COMMENT_BYTES].decode(errors="ignore")


def _declared(family: Family) -> list[Container]:
    source, destination, original = ADDRESSES[family]
    frontend = (destination, PROTOCOL, PORT)
    node_port = (PROTOCOL, PORT)
    endpoint = (destination, PORT)
    first = _IPV6_BIT if family is Family.IPv6 else 0

    def new(number: int, name: str, key: tuple[Field, ...], **what: object) -> Container:
        return Container(first | number, family, name, key, **what)  # type: ignore[arg-type]

    return [
        new(1, "cluster-ips", (destination,)),
        new(2, "nodeport-ips", (destination,)),
        new(3, "firewalled", frontend),
        new(4, "source-ranges", (*frontend, source), has_intervals=True),
        new(5, "hairpin", (source, *frontend)),
        new(6, "policies", frontend, data="verdict"),
        new(7, "services", frontend, data="verdict", counter=True),
        new(8, "local-services", frontend, data="verdict", counter=True),
        new(9, "endpoints", (*frontend, SLOT), data=endpoint, counter=True),
        new(10, "local-endpoints", (*frontend, SLOT), data=endpoint, counter=True),
        new(11, "nodeport-policies", node_port, data="verdict"),
        new(12, "nodeports", node_port, data="verdict", counter=True),
        new(13, "local-nodeports", node_port, data="verdict", counter=True),
        new(14, "nodeport-endpoints", (*node_port, SLOT), data=endpoint, counter=True),
        new(15, "local-nodeport-endpoints", (*node_port, SLOT), data=endpoint, counter=True),
        new(16, "no-endpoints", frontend, data="verdict"),
        new(17, "no-endpoint-nodeports", node_port, data="verdict"),
        new(18, "affinity", (source, original, PROTOCOL, ORIGINAL_PORT), data=endpoint, learned=True),
        new(19, "learn", (original, PROTOCOL, ORIGINAL_PORT), data="verdict"),
        new(20, "learn-nodeports", (PROTOCOL, ORIGINAL_PORT), data="verdict"),
    ]


CONTAINERS: dict[int, Container] = {c.number: c for family in Family for c in _declared(family)}
_BY_NAME = {(c.family, c.name): c for c in CONTAINERS.values()}


def container(family: Family, name: str) -> Container:
    """A container by name. Raises KeyError."""
    return _BY_NAME[family, name]


def unpack(key: bytes) -> tuple[Container, tuple[str, ...]]:
    """Which container a key belongs to, and its fields as text. Raises KeyError for a number that is not in use."""
    found = CONTAINERS[key[0]]
    return found, found.show_key(key)
