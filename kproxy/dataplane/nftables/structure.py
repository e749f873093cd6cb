"""Tables, sets, chains and rules as messages, and back from what the kernel dumps."""

from __future__ import annotations

from kproxy.dataplane.nftables.containers import AFFINITY_SIZE, Container, container
from kproxy.dataplane.nftables.expressions import EXPRESSION_NAME, NFPROTO, Rule, canonical
from kproxy.dataplane.nftables.fields import TYPE_VERDICT, datatype, note32, tlv, typeof
from kproxy.dataplane.nftables.nfnetlink import Flag, Message, Msg, each, nested, parsed, string, text, u32
from kproxy.dataplane.nftables.ruleset import (
    TABLE_COMMENT,
    TABLE_NAME,
    Hook,
    HookName,
    PolicyName,
    UnknownSet,
)
from kproxy.model import Family
from kproxy.netlink import attribute

# NFTA_TABLE_*
TABLE_FLAGS, TABLE_USERDATA, TABLE_OWNER = 2, 6, 7
TABLE_DORMANT, TABLE_OWNED, TABLE_PERSIST = 1, 2, 4
_NOTE_TABLE_COMMENT = 0
# NFTA_CHAIN_*
_CHAIN_TABLE, CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_HOOKS: tuple[HookName, ...] = ("prerouting", "input", "forward", "output", "postrouting")
_POLICIES: tuple[PolicyName, ...] = ("drop", "accept")
# NFTA_RULE_*
_RULE_TABLE, RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 4, 7
_LIST_ELEM = 1
_NOTE_RULE_COMMENT = 0
_RULE_COMMENT_BYTES = 127
# NFTA_SET_*
_SET_TABLE, SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH, _SET_DATA_TYPE, _SET_DATA_LENGTH = 1, 2, 3, 4, 5, 6, 7
_SET_DESCRIPTION, _SET_ID, _SET_USERDATA, _SET_EXPRESSION, _SET_COUNT = 9, 10, 13, 17, 20
_DESCRIPTION_SIZE, _DESCRIPTION_FIELDS, _FIELD_LENGTH = 1, 2, 1
_SET_CONSTANT, _SET_INTERVAL, _SET_MAP, _SET_TIMEOUT, _SET_EVALUATED, _SET_CONCATENATION = 2, 4, 8, 16, 32, 128
_VERDICT_LENGTH = 16  # sizeof(struct nft_verdict)
# Notes on a set for nft: NFTNL_UDATA_SET_*
_NOTE_KEY_ORDER, _NOTE_DATA_ORDER, _NOTE_KEY_TYPEOF, _NOTE_DATA_TYPEOF, _NOTE_DATA_INTERVAL = 0, 1, 3, 4, 6
_ORDER_NONE, _ORDER_HOST, _ORDER_BIG = 0, 1, 2


def new_table(family: Family, flags: int, presence: Flag) -> Message:
    """Create our table, or change its flags."""
    comment = attribute(TABLE_USERDATA, tlv(_NOTE_TABLE_COMMENT, TABLE_COMMENT.encode() + b"\0"))
    return Message(Msg.NEWTABLE, NFPROTO[family], string(1, TABLE_NAME) + u32(TABLE_FLAGS, flags) + comment, presence)


def delete_table(family: Family, name: str) -> Message:
    """Delete a table with all that is in it."""
    return Message(Msg.DELTABLE, NFPROTO[family], string(1, name))


def new_set(container: Container, *, counted: bool) -> Message:
    """Create a set or map. `counted`: every element has a counter of the packets that it matched."""
    attributes = [
        string(_SET_TABLE, TABLE_NAME),
        string(SET_NAME, container.name),
        u32(_SET_FLAGS, _flags(container)),
        u32(_SET_KEY_TYPE, datatype(container.key_fields)),
        u32(_SET_KEY_LENGTH, container.key_length),
        u32(_SET_ID, container.number),
    ]
    if container.data:
        attributes.append(u32(_SET_DATA_TYPE, datatype(container.data_fields)))
        attributes.append(u32(_SET_DATA_LENGTH, container.data_length or _VERDICT_LENGTH))
    if description := _description(container):
        attributes.append(attribute(_SET_DESCRIPTION, description))
    if counted:
        attributes.append(nested(_SET_EXPRESSION, string(EXPRESSION_NAME, "counter")))
    attributes.append(attribute(_SET_USERDATA, _typeof_note(container)))
    return Message(Msg.NEWSET, NFPROTO[container.family], b"".join(attributes), Flag.CREATE | Flag.EXCL)


def delete_set(family: Family, name: str) -> Message:
    """Delete a set or map with its elements."""
    return Message(Msg.DELSET, NFPROTO[family], string(_SET_TABLE, TABLE_NAME) + string(SET_NAME, name))


def _flags(container: Container) -> int:
    flags = _SET_MAP if container.data else 0
    if container.has_intervals:
        flags |= _SET_INTERVAL | _SET_CONCATENATION
    if container.learned:
        flags |= _SET_TIMEOUT | _SET_EVALUATED
    return flags


def _description(container: Container) -> bytes:
    if container.has_intervals:
        fields = (nested(_LIST_ELEM, u32(_FIELD_LENGTH, field.length)) for field in container.key_fields)
        return nested(_DESCRIPTION_FIELDS, *fields)
    return u32(_DESCRIPTION_SIZE, AFFINITY_SIZE) if container.learned else b""


def _typeof_note(container: Container) -> bytes:
    note = note32(_NOTE_KEY_ORDER, _ORDER_BIG if len(container.key_fields) == 1 else _ORDER_NONE)
    if container.data:
        note += note32(_NOTE_DATA_ORDER, _ORDER_HOST if container.data == "verdict" else _ORDER_NONE)
    note += tlv(_NOTE_KEY_TYPEOF, typeof(container.key_fields))
    if container.data:
        note += tlv(_NOTE_DATA_TYPEOF, typeof(container.data_fields)) + note32(_NOTE_DATA_INTERVAL, 0)
    return note


def read_set(family: Family, attributes: bytes) -> tuple[str, Container | UnknownSet | str]:
    """A dumped set's name, and the container that it is; a text says in what it is not the container of that name."""
    members = parsed(attributes)
    name = text(members[SET_NAME])
    key_length = _number(members, _SET_KEY_LENGTH)
    try:
        wanted = container(family, name)
    except KeyError:
        return name, UnknownSet(key_length)
    found = {
        "flags": (_number(members, _SET_FLAGS) & ~_SET_CONSTANT, _flags(wanted)),
        "key length": (key_length, wanted.key_length),
        "data length": (
            _number(members, _SET_DATA_LENGTH),
            (wanted.data_length or _VERDICT_LENGTH) if wanted.data else 0,
        ),
        "verdicts": (_number(members, _SET_DATA_TYPE) == TYPE_VERDICT, wanted.data == "verdict"),
        "size and fields": (members.get(_SET_DESCRIPTION, b""), _description(wanted)),
        "counter": (is_counted(attributes) and not wanted.counter, False),
    }
    for what, (there, should) in found.items():
        if there != should:
            return name, f"{what} of {wanted} differ from this version's"
    return name, wanted


def set_name(container: Container) -> bytes:
    """The attributes that name a set or map."""
    return string(_SET_TABLE, TABLE_NAME) + string(SET_NAME, container.name)


def is_counted(attributes: bytes) -> bool:
    """Whether the elements of a dumped set have counters."""
    return text(parsed(parsed(attributes).get(_SET_EXPRESSION, b"")).get(1, b"")) == "counter"


def element_count(attributes: bytes) -> int | None:
    """How many elements a dumped set has, where the kernel tells."""
    count = parsed(attributes).get(_SET_COUNT)
    return None if count is None else int.from_bytes(count, "big")


def _number(members: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(members.get(kind, b""), "big")


def new_chain(family: Family, name: str, hook: Hook | None) -> Message:
    """Create a chain."""
    attributes = _chain(name)
    if hook:
        number, priority = _HOOKS.index(hook.name), hook.priority & 0xFFFFFFFF
        attributes += nested(_CHAIN_HOOK, u32(_HOOK_NUMBER, number), u32(_HOOK_PRIORITY, priority))
        attributes += u32(_CHAIN_POLICY, _POLICIES.index(hook.policy)) + string(_CHAIN_TYPE, hook.type)
    return Message(Msg.NEWCHAIN, NFPROTO[family], attributes, Flag.CREATE)


def delete_chain(family: Family, name: str) -> Message:
    """Delete a chain; its rules must have gone."""
    return Message(Msg.DELCHAIN, NFPROTO[family], _chain(name))


def _chain(name: str) -> bytes:
    return string(_CHAIN_TABLE, TABLE_NAME) + string(CHAIN_NAME, name)


def read_hook(attributes: bytes) -> tuple[str, Hook | None]:
    """A dumped chain's name and hook."""
    members = parsed(attributes)
    name = text(members[CHAIN_NAME])
    if _CHAIN_HOOK not in members:
        return name, None
    hook = parsed(members[_CHAIN_HOOK])
    priority = int.from_bytes(hook[_HOOK_PRIORITY], "big", signed=True)
    where, policy = _HOOKS[_number(hook, _HOOK_NUMBER)], _POLICIES[_number(members, _CHAIN_POLICY)]
    return name, Hook(text(members[_CHAIN_TYPE]), where, priority, policy)


def flush_chain(family: Family, name: str) -> Message:
    """Delete a chain's rules."""
    return Message(Msg.DELRULE, NFPROTO[family], string(_RULE_TABLE, TABLE_NAME) + string(RULE_CHAIN, name))


def append_rule(family: Family, chain: str, rule: Rule) -> Message:
    """Add a rule at the end of a chain. Raises ValueError for a comment that nft could not load."""
    attributes = string(_RULE_TABLE, TABLE_NAME) + string(RULE_CHAIN, chain)
    attributes += nested(_RULE_EXPRESSIONS, *(attribute(_LIST_ELEM, e) for e in rule.expressions))
    if rule.comment:
        comment = rule.comment.encode()
        if len(comment) > _RULE_COMMENT_BYTES:
            raise ValueError(f"comment {rule.comment!r} has {len(comment)} bytes; nft can load {_RULE_COMMENT_BYTES}")
        attributes += attribute(_RULE_USERDATA, tlv(_NOTE_RULE_COMMENT, comment + b"\0"))
    return Message(Msg.NEWRULE, NFPROTO[family], attributes, Flag.CREATE | Flag.APPEND)


def read_rule(attributes: bytes) -> tuple[str, Rule]:
    """A dumped rule and the chain that it is in."""
    members = parsed(attributes)
    expressions = tuple(value for _, value in each(members.get(_RULE_EXPRESSIONS, b"")))
    note = members.get(_RULE_USERDATA, b"")
    comment = text(note[2 : 2 + note[1]]) if len(note) > 2 and note[0] == _NOTE_RULE_COMMENT else ""
    return text(members[RULE_CHAIN]), Rule(canonical(expressions), comment, "", expressions)
