"""Finds and reads the recordings of kube-proxy's behaviour.

They are no part of this repository: a folder of JSON files with what Kubernetes 1.36's own proxy tests feed in and
require. It is looked for in $KPROXY_CONFORMANCE, and in `shared/conformance` beside the checkout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kproxy.api.events import Changed, Deleted, Listed
from kproxy.api.objects import KINDS, Object
from kproxy.cluster import ClusterState
from kproxy.model import Family

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "conformance"


def read(name: str) -> dict[str, Any]:
    """One file of the recordings. Skips the calling module where they are not at hand."""
    path = Path(os.environ.get("KPROXY_CONFORMANCE") or BESIDE) / name
    if not path.exists():
        reason = f"the recordings of kube-proxy's behaviour are not here: {path} (set KPROXY_CONFORMANCE)"
        pytest.skip(reason, allow_module_level=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def named(cases: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The cases as test parameters, with their names as ids."""
    return [pytest.param(c, id=str(c.get("name") or c.get("test") or c.get("case") or i)) for i, c in enumerate(cases)]


def decoded(item: Mapping[str, Any]) -> Object:
    """An API object as kproxy reads it. A deleted one needs no more than its name."""
    return msgspec.convert(item, KINDS[item["kind"]])


def put(state: ClusterState, *items: Mapping[str, Any]) -> None:
    """Objects are added or changed."""
    for item in items:
        state.apply(Changed(item["kind"], decoded(item)))


def drop(state: ClusterState, *items: Mapping[str, Any]) -> None:
    """Objects are deleted."""
    for item in items:
        state.apply(Deleted(item["kind"], decoded(item)))


def new_state(node_name: str = "", families: Iterable[Family] = Family, *, started: float = 0.0) -> ClusterState:
    """An empty cluster that has been listed."""
    state = ClusterState(node_name, families, note=lambda _: None, started=started)
    for kind in KINDS:
        state.apply(Listed(kind, frozenset()))
    return state
