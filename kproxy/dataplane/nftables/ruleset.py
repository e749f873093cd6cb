"""The entries of the nftables mode that are not elements: tables, chains with their rules, sets and maps."""

from __future__ import annotations

from typing import Literal

import msgspec

from kproxy.dataplane.nftables.expressions import Rule
from kproxy.model import Family

TABLE_NAME = "kproxy"
KUBE_PROXY_TABLE = "kube-proxy"
TABLE_COMMENT = "kproxy: Kubernetes services"

HookName = Literal["prerouting", "input", "forward", "output", "postrouting"]
PolicyName = Literal["drop", "accept"]


class TableKey(msgspec.Struct, frozen=True):
    """Our table in one family."""

    family: Family


class KubeProxyTableKey(msgspec.Struct, frozen=True):
    """The table that kube-proxy's nftables mode leaves; only ever removed. The value is a `Table`."""

    family: Family


class Table(msgspec.Struct, frozen=True):
    """That the table is there. `fault` says why what was found cannot be changed into ours, but must be replaced."""

    fault: str = ""


class SetKey(msgspec.Struct, frozen=True):
    """A set or map; the value is its `Container`."""

    family: Family
    name: str


class UnknownSet(msgspec.Struct, frozen=True):
    """A set or map in our table that is not in the layout."""

    key_length: int


class ChainKey(msgspec.Struct, frozen=True):
    """A chain."""

    family: Family
    name: str


class Hook(msgspec.Struct, frozen=True):
    """Where a base chain is attached, with its priority."""

    type: str
    name: HookName
    priority: int
    policy: PolicyName = "accept"


class Chain(msgspec.Struct, frozen=True):
    """A chain with its rules; attached to the packet's way if it has a hook."""

    hook: Hook | None
    rules: tuple[Rule, ...]
