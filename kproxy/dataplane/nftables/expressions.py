"""Rules from pieces: each piece is a stretch of a rule in nft's words and the expressions that do it.

The text is what `nft list` of 1.0.6 prints. Expressions are encoded as the kernel dumps them; numbers are those of
`linux/netfilter/nf_tables.h`.
"""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

from kproxy.dataplane.nftables.containers import Container
from kproxy.dataplane.nftables.fields import ADDRESSES, FAMILY_WORDS, PORT, REGISTER_BYTES, Attributes, Field, slot
from kproxy.dataplane.nftables.nfnetlink import Nfproto, each, nested, parsed, string, u32
from kproxy.model import Family
from kproxy.netlink import attribute

EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_VERDICT_REGISTER = 0
_FIRST = 1  # NFT_REG_1: the first 4-byte register, by the name that the kernel gives it
_EQUAL, _NOT_EQUAL = 0, 1

VERDICTS = {"drop": 0, "accept": 1, "jump": -3, "goto": -4, "return": -5}

_CT_STATE, _CT_STATUS = 0, 2
_CT_STATE_NEW = 1 << 3
_CT_STATUS_DNAT = 1 << 5
_META_MARK, _META_IIFNAME = 3, 6
_FIB_ADDRESS_TYPE = 3
_FIB_SADDR, _FIB_DADDR = 1, 2
_RTN_LOCAL = 2
_IFNAMSIZ = 16
_NAT_DESTINATION = 1
_NAT_BY_ADDRESS_AND_PORT = 3
_MASQUERADE_FULLY_RANDOM = 1 << 4
_REJECT_ICMP = 0
_PORT_UNREACHABLE = {Family.IPv4: 3, Family.IPv6: 4}
_UPDATE = 1
NFPROTO = {Family.IPv4: Nfproto.IPV4, Family.IPv6: Nfproto.IPV6}

Canonical = tuple[tuple[str, Attributes], ...]


class Piece(NamedTuple):
    """A stretch of a rule."""

    text: str
    expressions: tuple[bytes, ...]


@dataclass(frozen=True)
class Rule:
    """A rule. Compared by what its expressions do and by its comment.

    `text` is empty in a rule that was read from the kernel.
    """

    canonical: Canonical
    comment: str = ""
    text: str = field(default="", compare=False)
    expressions: tuple[bytes, ...] = field(default=(), compare=False, repr=False)


def rule(*pieces: Piece, comment: str = "") -> Rule:
    """A rule of pieces, from left to right."""
    expressions = tuple(expression for piece in pieces for expression in piece.expressions)
    return Rule(canonical(expressions), comment, " ".join(piece.text for piece in pieces), expressions)


def canonical(expressions: tuple[bytes, ...]) -> Canonical:
    """A form in which expressions that do the same are equal, whichever kernel dumped them.

    Kernels differ in the order of attributes, and newer ones add attributes with their defaults. A default is zero,
    and wherever a zero means something else than absence, the attribute is mandatory.
    """
    forms = []
    for expression in expressions:
        members = parsed(expression)
        name = members[EXPRESSION_NAME].rstrip(b"\0").decode()
        attributes = sorted(
            (kind, value) for kind, value in each(members.get(_EXPRESSION_DATA, b"")) if value.strip(b"\0")
        )
        forms.append((name, tuple(attributes)))
    return tuple(forms)


def _expression(name: str, *attributes: bytes) -> bytes:
    return string(EXPRESSION_NAME, name) + nested(_EXPRESSION_DATA, *attributes)


def _register(index: int) -> int:
    """The number of the 4-byte register `index`: every fourth goes by the name of a 16-byte register."""
    return 8 + index if index % 4 else 1 + index // 4


def _load(loaded: Field, index: int = 0) -> bytes:
    name, attributes = loaded.load
    return _expression(name, u32(1, _register(index)), *(attribute(kind, value) for kind, value in attributes))


def _load_all(fields: tuple[Field, ...], index: int = 0) -> tuple[bytes, ...]:
    loads = []
    for loaded in fields:
        loads.append(_load(loaded, index))
        index += loaded.registers
    return tuple(loads)


def _words(fields: tuple[Field, ...]) -> str:
    return " . ".join(part.text for part in fields)


def _lookup(name: str, *, into: int | None = None, inverted: bool = False) -> bytes:
    register = () if into is None else (u32(3, into),)
    return _expression("lookup", string(1, name), u32(2, _FIRST), *register, u32(5, int(inverted)))


def _compare(operation: int, value: bytes) -> bytes:
    return _expression("cmp", u32(1, _FIRST), u32(2, operation), nested(3, attribute(_DATA_VALUE, value)))


def _bitwise(mask: bytes, flip: bytes) -> bytes:
    return _expression(
        "bitwise",
        u32(1, _FIRST),
        u32(2, _FIRST),
        u32(3, len(mask)),
        u32(6, 0),
        nested(4, attribute(_DATA_VALUE, mask)),
        nested(5, attribute(_DATA_VALUE, flip)),
    )


def _host(number: int) -> bytes:
    """A 32-bit number as registers have marks and conntrack bits: in host order."""
    return number.to_bytes(4, sys.byteorder)


def _is_set(bits: int) -> tuple[bytes, bytes]:
    return _bitwise(_host(bits), _host(0)), _compare(_NOT_EQUAL, _host(0))


def _ct(key: int) -> bytes:
    return _expression("ct", u32(1, _FIRST), u32(2, key))


def ct_new() -> Piece:
    """The first packet of a connection."""
    return Piece("ct state new", (_ct(_CT_STATE), *_is_set(_CT_STATE_NEW)))


def ct_dnat() -> Piece:
    """The destination was translated."""
    return Piece("ct status dnat", (_ct(_CT_STATUS), *_is_set(_CT_STATUS_DNAT)))


def in_set(where: Container) -> Piece:
    """The packet's fields are in a set."""
    return Piece(f"{_words(where.key_fields)} @{where.name}", (*_load_all(where.key_fields), _lookup(where.name)))


def not_in_set(where: Container) -> Piece:
    """The packet's fields are not in a set."""
    return Piece(
        f"{_words(where.key_fields)} != @{where.name}",
        (*_load_all(where.key_fields), _lookup(where.name, inverted=True)),
    )


def vmap(where: Container) -> Piece:
    """What the map says for the packet's fields; if nothing, the next rule."""
    return Piece(
        f"{_words(where.key_fields)} vmap @{where.name}",
        (*_load_all(where.key_fields), _lookup(where.name, into=_VERDICT_REGISTER)),
    )


def _dnat(where: Container, key: tuple[Field, ...]) -> Piece:
    address, port = _register(0), _register(where.data_fields[0].registers)
    translate = _expression(
        "nat",
        u32(1, _NAT_DESTINATION),
        u32(2, NFPROTO[where.family]),
        u32(3, address),
        u32(4, address),
        u32(5, port),
        u32(6, port),
        u32(7, _NAT_BY_ADDRESS_AND_PORT),
    )
    return Piece(
        f"dnat {FAMILY_WORDS[where.family]} to {_words(key)} map @{where.name}",
        (*_load_all(key), _lookup(where.name, into=_FIRST), translate),
    )


def dnat(where: Container, modulus: int) -> Piece:
    """Translate to what the map of endpoints has for one of `modulus` slots."""
    *frontend, _ = where.key_fields
    return _dnat(where, (*frontend, slot(modulus)))


def _packet_fields(where: Container) -> tuple[Field, ...]:
    """The key of the map of affinities as it reads before translation, when packet and connection agree."""
    source, _, protocol, _ = where.key_fields
    return source, ADDRESSES[where.family].destination, protocol, PORT


def dnat_affinity(where: Container) -> Piece:
    """Translate to the endpoint that the client had."""
    return _dnat(where, _packet_fields(where))


def update_affinity(where: Container, timeout_seconds: int) -> Piece:
    """Note the endpoint that the client got."""
    data_index = where.key_length // REGISTER_BYTES
    update = _expression(
        "dynset",
        u32(4, _FIRST),
        u32(5, _register(data_index)),
        u32(3, _UPDATE),
        string(1, where.name),
        attribute(6, (timeout_seconds * 1000).to_bytes(8, "big")),
        u32(9, 0),
    )
    key, data = _words(where.key_fields), _words(where.data_fields)
    return Piece(
        f"update @{where.name} {{ {key} timeout {_duration(timeout_seconds)} : {data} }}",
        (*_load_all(where.key_fields), *_load_all(where.data_fields, data_index), update),
    )


def _duration(seconds: int) -> str:
    """A time as nft prints it."""
    text = ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        text += f"{count}{unit}" if count else ""
    return text


def _address(cidr: str, *, source: bool, operation: int) -> Piece:
    network = ipaddress.ip_network(cidr)
    family = Family(network.version)
    loaded = ADDRESSES[family].source if source else ADDRESSES[family].destination
    packed, bits = network.network_address.packed, network.prefixlen
    match_network: tuple[bytes, ...]
    if bits and bits % 8 == 0:  # whole bytes: load only those
        short = loaded._replace(load=(loaded.load[0], (*loaded.load[1][:-1], (4, (bits // 8).to_bytes(4, "big")))))
        match_network = (_load(short), _compare(operation, packed[: bits // 8]))
    else:
        match_network = (
            _load(loaded),
            _bitwise(network.netmask.packed, bytes(len(packed))),
            _compare(operation, packed),
        )
    shown = str(network.network_address) if bits == family.bits else str(network)
    sign = "!= " if operation == _NOT_EQUAL else ""
    return Piece(f"{loaded.text} {sign}{shown}", match_network)


def saddr(cidr: str) -> Piece:
    """The source is in a CIDR."""
    return _address(cidr, source=True, operation=_EQUAL)


def not_saddr(cidr: str) -> Piece:
    """The source is not in a CIDR."""
    return _address(cidr, source=True, operation=_NOT_EQUAL)


def daddr(cidr: str) -> Piece:
    """The destination is in a CIDR."""
    return _address(cidr, source=False, operation=_EQUAL)


def not_daddr(cidr: str) -> Piece:
    """The destination is not in a CIDR."""
    return _address(cidr, source=False, operation=_NOT_EQUAL)


def _iifname(name: str, *, prefix: bool, operation: int) -> Piece:
    value = name.encode() if prefix else name.encode().ljust(_IFNAMSIZ, b"\0")
    load = _expression("meta", u32(2, _META_IIFNAME), u32(1, _FIRST))
    sign = "!= " if operation == _NOT_EQUAL else ""
    return Piece(f'iifname {sign}"{name}{"*" if prefix else ""}"', (load, _compare(operation, value)))


def iifname(name: str, *, prefix: bool = False) -> Piece:
    """The packet came in by an interface, or by one whose name begins so."""
    return _iifname(name, prefix=prefix, operation=_EQUAL)


def not_iifname(name: str, *, prefix: bool = False) -> Piece:
    """The packet did not come in by the interface."""
    return _iifname(name, prefix=prefix, operation=_NOT_EQUAL)


def _is_local(what: int, text: str) -> Piece:
    load = _expression("fib", u32(1, _FIRST), u32(2, _FIB_ADDRESS_TYPE), u32(3, what))
    return Piece(f"fib {text} type local", (load, _compare(_EQUAL, _host(_RTN_LOCAL))))


def saddr_is_local() -> Piece:
    """The source is an address of this node."""
    return _is_local(_FIB_SADDR, "saddr")


def daddr_is_local() -> Piece:
    """The destination is an address of this node."""
    return _is_local(_FIB_DADDR, "daddr")


def _meta_mark() -> bytes:
    return _expression("meta", u32(2, _META_MARK), u32(1, _FIRST))


def _set_mark(text: str, keep: int, flip: int) -> Piece:
    write = _expression("meta", u32(2, _META_MARK), u32(3, _FIRST))
    return Piece(f"meta mark set meta mark {text}", (_meta_mark(), _bitwise(_host(keep), _host(flip)), write))


def mark_or(bits: int) -> Piece:
    """Set bits of the packet's mark."""
    return _set_mark(f"| {bits:#010x}", 0xFFFFFFFF ^ bits, bits)


def mark_xor(bits: int) -> Piece:
    """Flip bits of the packet's mark."""
    return _set_mark(f"^ {bits:#010x}", 0xFFFFFFFF, bits)


def mark_is_set(bits: int) -> Piece:
    """A bit of the packet's mark is set."""
    return Piece(f"meta mark & {bits:#010x} != 0x00000000", (_meta_mark(), *_is_set(bits)))


def masquerade() -> Piece:
    """Take this node's address and a random port for source."""
    return Piece("masquerade fully-random", (_expression("masq", u32(1, _MASQUERADE_FULLY_RANDOM)),))


def verdict_attribute(kind: int, verdict: str) -> bytes:
    """A verdict (`drop`, `goto pick-2` …) as data. Raises KeyError for what is no verdict."""
    name, _, chain = verdict.partition(" ")
    code = u32(_VERDICT_CODE, VERDICTS[name] & 0xFFFFFFFF)
    return nested(kind, nested(_DATA_VERDICT, code, string(_VERDICT_CHAIN, chain) if chain else b""))


def _verdict(text: str) -> Piece:
    return Piece(text, (_expression("immediate", u32(1, _VERDICT_REGISTER), verdict_attribute(2, text)),))


def jump(chain: str) -> Piece:
    """Go through a chain and come back."""
    return _verdict(f"jump {chain}")


def goto(chain: str) -> Piece:
    """Go on in a chain and do not come back."""
    return _verdict(f"goto {chain}")


def return_() -> Piece:
    """Back to where the chain was jumped to from."""
    return _verdict("return")


def accept() -> Piece:
    """Leave the base chain."""
    return _verdict("accept")


def drop() -> Piece:
    """Discard the packet."""
    return _verdict("drop")


def reject(family: Family) -> Piece:
    """Discard the packet and answer "port unreachable" by ICMP."""
    refuse = _expression("reject", u32(1, _REJECT_ICMP), attribute(2, bytes((_PORT_UNREACHABLE[family],))))
    return Piece("reject", (refuse,))
