"""Entries in one line for people."""

from __future__ import annotations

from kproxy.dataplane.base import Key, Value
from kproxy.dataplane.nftables.containers import CONTAINERS, Container
from kproxy.dataplane.nftables.elements import verdict_text
from kproxy.dataplane.nftables.expressions import Canonical, Rule
from kproxy.dataplane.nftables.fields import FAMILY_WORDS
from kproxy.dataplane.nftables.nfnetlink import parsed, text
from kproxy.dataplane.nftables.ruleset import (
    KUBE_PROXY_TABLE,
    TABLE_NAME,
    Chain,
    ChainKey,
    KubeProxyTableKey,
    SetKey,
    Table,
    TableKey,
)


def describe(key: Key, value: Value) -> str:
    """An entry of the nftables mode as one line."""
    match key:
        case bytes():
            return _element(key, value)
        case TableKey(family):
            fault = f" ({value.fault})" if isinstance(value, Table) and value.fault else ""
            return f"table {FAMILY_WORDS[family]} {TABLE_NAME}{fault}"
        case KubeProxyTableKey(family):
            return f"table {FAMILY_WORDS[family]} {KUBE_PROXY_TABLE} (kube-proxy's own, with all its rules)"
        case SetKey(family, name):
            shown = str(value) if isinstance(value, Container) else f"set or map {name} (not of this layout)"
            return f"{FAMILY_WORDS[family]} {shown}"
        case ChainKey(family, name):
            return f"{FAMILY_WORDS[family]} chain {name}{_chain(value)}"
        case other:
            return str(other)


def _element(key: bytes, value: Value) -> str:
    container = CONTAINERS.get(key[0]) if key else None
    if container is None:
        return f"element {key.hex()}"
    where = " . ".join(container.show_key(key)) if len(key) > 1 else "*"
    what = f"{FAMILY_WORDS[container.family]} {container}"
    match value:
        case bytes():
            return f"{what}: {where} → {container.show_address_port(value)}"
        case (str(verdict), str(comment)):
            return f"{what}: {where} → {verdict}{_note(comment)}"
        case str(comment):
            return f"{what}: {where}{_note(comment)}"
        case _:
            return f"{what}: {where}"


def _note(comment: str) -> str:
    return f" ({comment})" if comment else ""


def _chain(value: Value) -> str:
    if not isinstance(value, Chain):
        return ""
    rules = "; ".join(_rule(rule) for rule in value.rules) or "no rules"
    hook = f" at {value.hook.type} {value.hook.name} {value.hook.priority}" if value.hook else ""
    policy = f" policy {value.hook.policy}" if value.hook and value.hook.policy != "accept" else ""
    return f"{hook}{policy}: {rules}"


def _rule(rule: Rule) -> str:
    shown = rule.text or expressions_in_brief(rule.canonical)
    return f'{shown} comment "{rule.comment}"' if rule.comment else shown


def expressions_in_brief(canonical: Canonical) -> str:
    """What the expressions of a rule are about, where nobody wrote it down."""
    words = []
    for name, attributes in canonical:
        match name, dict(attributes):
            case "immediate", {2: data}:
                words.append(verdict_text(data) if 2 in parsed(data) else name)
            case "lookup", {1: where}:
                words.append(f"@{text(where)}")
            case _:
                words.append(name)
    return " ".join(words)
