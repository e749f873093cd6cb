"""Elements of sets and maps as the kernel has them: packed for a transaction, and parsed from a dump.

This is the hot part of the mode: a cluster has hundreds of thousands of endpoints, and an element takes well under a
microsecond either way. So the attributes round a key and its data, which are the same for every element of a
map of endpoints, are built once and compared as a whole.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from kproxy.dataplane.base import ApplyError, Key, Value
from kproxy.dataplane.nftables.containers import COMMENT_BYTES, Container
from kproxy.dataplane.nftables.expressions import NFPROTO, VERDICTS, verdict_attribute
from kproxy.dataplane.nftables.fields import tlv
from kproxy.dataplane.nftables.nfnetlink import Flag, Message, Msg, each, parsed, string, text, u32
from kproxy.dataplane.nftables.ruleset import TABLE_NAME
from kproxy.netlink import attribute

# NFTA_SET_ELEM_LIST_*
_LIST_TABLE, LIST_SET, LIST_ELEMENTS = 1, 2, 3
_LIST_ELEM = 1
# NFTA_SET_ELEM_*
_KEY, _DATA, _FLAGS, _USERDATA, _KEY_END = 1, 2, 3, 6, 10
_CATCH_ALL = 2
_VALUE, _VERDICT = 1, 2
_NOTE_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT

MESSAGE_BYTES = 60_000  # of elements in one message: an attribute's length has 16 bits
_MESSAGE_HEADER = 20
_VERDICT_NAMES = {code & 0xFFFFFFFF: name for name, code in VERDICTS.items()}

_ATTRIBUTE = struct.Struct("=HH")
_COUNTER = struct.Struct("=20s8s4s8s")  # the expression's name and two headers, bytes, a header, packets


class Step(NamedTuple):
    """A message and the keys of the entries that it is about."""

    message: Message
    keys: tuple[Key, ...]


def location(container: Container) -> bytes:
    """The attributes that say which container is meant."""
    return string(_LIST_TABLE, TABLE_NAME) + string(LIST_SET, container.name)


def additions(container: Container, elements: Iterable[tuple[bytes, Value]]) -> list[Step]:
    """Messages that add elements. Raises ApplyError for a value that does not fit the container."""
    return _steps(container, Msg.NEWSETELEM, Flag.CREATE, elements, _encoder(container))


def removals(container: Container, keys: Iterable[bytes], kind: Msg = Msg.DELSETELEM) -> list[Step]:
    """Messages that remove elements."""
    return _steps(container, kind, Flag.NONE, ((key, None) for key in keys), _key_encoder(container))


def _steps(
    container: Container,
    kind: Msg,
    flags: Flag,
    elements: Iterable[tuple[bytes, Value | None]],
    encode: Callable[[bytes, Value | None], bytes],
) -> list[Step]:
    steps = []
    family, where = NFPROTO[container.family], location(container)
    keys: list[Key] = []
    packed: list[bytes] = []
    size = 0
    for key, value in elements:
        try:
            element = encode(key, value)
        except ValueError as error:
            raise ApplyError(f"{container} {' . '.join(container.show_key(key))}: {error}", (key,)) from None
        size += len(element)
        if size > MESSAGE_BYTES:
            steps.append(
                Step(Message(kind, family, where + attribute(LIST_ELEMENTS, b"".join(packed)), flags), tuple(keys))
            )
            keys, packed, size = [], [], len(element)
        keys.append(key)
        packed.append(element)
    if keys:
        steps.append(
            Step(Message(kind, family, where + attribute(LIST_ELEMENTS, b"".join(packed)), flags), tuple(keys))
        )
    return steps


@lru_cache(maxsize=256)
def _headers(container: Container) -> tuple[int, bytes, bytes]:
    """Bytes of the key attribute with its headers, those headers, and the headers of data of a fixed length."""
    length = container.key_length
    key_header = _ATTRIBUTE.pack(length + 8, _KEY) + _ATTRIBUTE.pack(length + 4, _VALUE)
    data = container.data_length
    data_header = _ATTRIBUTE.pack(data + 8, _DATA) + _ATTRIBUTE.pack(data + 4, _VALUE)
    return length + 8, key_header, data_header


def _key_encoder(container: Container) -> Callable[[bytes, Value | None], bytes]:
    key_size, key_header, _ = _headers(container)
    header = _ATTRIBUTE.pack(4 + key_size, _LIST_ELEM) + key_header

    def encode(key: bytes, _: Value | None) -> bytes:
        if len(key) == 1:  # `*`, which only somebody else can have added
            return _element(u32(_FLAGS, _CATCH_ALL))
        return _element(_interval(container, key)) if container.has_intervals else header + key[1:]

    return encode


def _encoder(container: Container) -> Callable[[bytes, Value | None], bytes]:
    key_size, key_header, data_header = _headers(container)
    if container.data_length:
        header = _ATTRIBUTE.pack(4 + key_size + 8 + container.data_length, _LIST_ELEM) + key_header
        length = container.data_length

        def endpoint(key: bytes, value: Value | None) -> bytes:
            if type(value) is not bytes or len(value) != length:
                raise ValueError(f"{value!r} is not an address and port of {length} bytes")
            return header + key[1:] + data_header + value

        return endpoint

    def other(key: bytes, value: Value | None) -> bytes:
        packed = _interval(container, key) if container.has_intervals else key_header + key[1:]
        match value:
            case str(comment) if not container.data:
                return _element(packed + _comment(comment))
            case (str(verdict), str(comment)) if container.data:
                return _element(packed + _verdict(verdict) + _comment(comment))
            case _:
                raise ValueError(f"{value!r} is not what its elements hold")

    return other


def _element(content: bytes) -> bytes:
    return _ATTRIBUTE.pack(len(content) + 4, _LIST_ELEM) + content


def _interval(container: Container, key: bytes) -> bytes:
    end = container.key_length + 1
    return attribute(_KEY, attribute(_VALUE, key[1:end])) + attribute(_KEY_END, attribute(_VALUE, key[end:]))


@lru_cache(maxsize=4096)
def _verdict(verdict: str) -> bytes:
    try:
        return verdict_attribute(_DATA, verdict)
    except KeyError:
        raise ValueError(f"{verdict!r} is not a verdict") from None


def _comment(comment: str) -> bytes:
    if not comment:
        return b""
    encoded = comment.encode()
    if len(encoded) > COMMENT_BYTES:
        raise ValueError(f"comment {comment!r} has {len(encoded)} bytes; nft can load {COMMENT_BYTES}")
    return attribute(_USERDATA, tlv(_NOTE_COMMENT, encoded + b"\0"))


def element_at(step: Step, offset: int) -> Key | None:
    """Which element of a message the kernel refused, going by the offset of the attribute that it complains of."""
    for kind, start, _ in _spans(step.message.attributes):
        if kind == LIST_ELEMENTS:
            inner = step.message.attributes[start:]
            for key, (_, at, end) in zip(step.keys, _spans(inner), strict=False):
                if at - 4 <= offset - _MESSAGE_HEADER - start < end:
                    return key
    return None


def _spans(payload: bytes) -> Iterator[tuple[int, int, int]]:
    at = 0
    while at + 4 <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        yield kind, at + 4, at + length
        at += (length + 3) & ~3


def parse(container: Container, elements: bytes) -> Iterable[tuple[bytes, Value]]:
    """The elements of a dumped message as entries."""
    if container.data_length:
        return _endpoints(container, elements)
    return ((key, value) for key, value, _ in _parsed(container, elements))


def parse_counters(container: Container, elements: bytes) -> Iterator[tuple[bytes, Value, int]]:
    """The elements of a dumped message with their counters: key, value, packets."""
    for key, value, expression in _parsed(container, elements):
        if expression:  # none in a map of another version's layout
            _, _, _, packets = _COUNTER.unpack_from(expression)
            yield key, value, int.from_bytes(packets, "big")


def _endpoints(container: Container, elements: bytes) -> Iterable[tuple[bytes, Value]]:
    """All at once where they are alike, which they are unless somebody else added some."""
    plain, counted = _layouts(container)
    layout = plain if elements.startswith(_ATTRIBUTE.pack(plain.size, _LIST_ELEM)) else counted
    if not elements or len(elements) % layout.size:
        return ((key, value) for key, value, _ in _parsed(container, elements))
    _, key_header, data_header = _headers(container)
    header = _ATTRIBUTE.pack(layout.size, _LIST_ELEM) + key_header
    prefix = bytes((container.number,))
    found = list(layout.iter_unpack(elements))
    if any(first != header or middle != data_header for first, _, middle, _ in found):
        return ((key, value) for key, value, _ in _parsed(container, elements))
    return [(prefix + key, value) for _, key, _, value in found]


@lru_cache(maxsize=64)
def _layouts(container: Container) -> tuple[struct.Struct, struct.Struct]:
    """How elements of a map of endpoints are dumped: without and with a counter."""
    plain = f"=12s{container.key_length}s8s{container.data_length}s"
    return struct.Struct(plain), struct.Struct(f"{plain}{_ATTRIBUTE.size + _COUNTER.size}x")


def _parsed(container: Container, elements: bytes) -> Iterator[tuple[bytes, Value, bytes]]:
    prefix = bytes((container.number,))
    for _, element in each(elements):
        key = value = expression = comment = b""
        end = b""
        verdict = ""
        for kind, content in each(element):
            match kind:
                case 1:  # _KEY
                    key = content[4:]
                case 10:  # _KEY_END
                    end = content[4:]
                case 2:  # _DATA
                    if container.data == "verdict":
                        verdict = verdict_text(content)
                    else:
                        value = content[4:]
                case 6:  # _USERDATA
                    comment = content
                case 7:  # _EXPRESSION
                    expression = content
                case _:
                    pass
        shown = _comment_text(comment)
        match container.data:
            case None:
                yield prefix + key + end, shown, expression
            case "verdict":
                yield prefix + key, (verdict, shown), expression
            case _:
                yield prefix + key, value, expression


@lru_cache(maxsize=4096)
def verdict_text(content: bytes) -> str:
    """A verdict that the kernel dumped, as nft prints it."""
    members = parsed(parsed(content)[_VERDICT])
    code = int.from_bytes(members[1], "big")
    name = _VERDICT_NAMES.get(code, f"verdict {code}")
    return f"{name} {text(members[2])}" if 2 in members else name


def _comment_text(note: bytes) -> str:
    if len(note) < 2 or note[0] != _NOTE_COMMENT:
        return ""
    return sys.intern(text(note[2 : 2 + note[1]]))
