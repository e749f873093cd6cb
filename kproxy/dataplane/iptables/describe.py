"""Entries for people: in one line, and by the Services that they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kproxy.dataplane.base import Key, Value
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, JumpKey, SettingKey
from kproxy.dataplane.iptables.rule import Jump
from kproxy.model import Family, ServiceName

_COMMANDS = {Family.IPv4: "iptables", Family.IPv6: "ip6tables"}


def describe(key: Key, value: Value) -> str:
    """An entry of the iptables mode as one line, its rules as iptables-save prints them."""
    return _describe(key, value).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def _describe(key: Key, value: Value) -> str:
    match key:
        case ChainKey(family, table, chain) | BlockKey(family, table, chain) | JumpKey(family, table, chain):
            what = f"{_COMMANDS[family]} {table} chain {chain}"
        case SettingKey(_, path):
            return f"sysctl {path.removeprefix('proc/sys/').replace('/', '.')} = {value}"
        case other:
            return str(other)
    match value:
        case ():
            return f"{what}: no rules"
        case tuple(rules):
            return f"{what}: {'; '.join(map(str, rules))}"
        case _ if isinstance(key, JumpKey):
            return f"{what}: {value}"
        case _:
            return what


def labels(entries: Mapping[Key, Value]) -> dict[Key, ServiceName]:
    """The Services that entries were made for: by the comments of their rules, or by who jumps there."""
    found: dict[Key, ServiceName] = {}
    labelled: list[ChainKey | BlockKey] = []
    for key, value in entries.items():
        if isinstance(key, ChainKey | BlockKey):
            service = _service(key.service_port if isinstance(key, BlockKey) else _comments(value))
            if service:
                found[key] = service
                labelled.append(key)
    for known in labelled:  # grows: in large clusters the chains of endpoints have no comments
        for target in _jumps(entries[known]):
            chain = ChainKey(known.family, "nat", target)
            if chain in entries and chain not in found and target.startswith(names.SERVICE_PREFIXES):
                found[chain] = found[known]
                labelled.append(chain)
    return found


def _jumps(value: Value) -> Iterator[str]:
    for rule in value if isinstance(value, tuple) else ():
        if isinstance(rule.target, Jump):
            yield rule.target.to


def _comments(value: Value) -> str:
    return " ".join(rule.comment for rule in value) if isinstance(value, tuple) else ""


def _service(text: str) -> ServiceName | None:
    """The Service of the first word that is a service port."""
    word = next((word for word in text.split() if "/" in word), "")
    namespace, _, name = word.partition(":")[0].partition("/")
    return ServiceName(namespace, name) if name else None
