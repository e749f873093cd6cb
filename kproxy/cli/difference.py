"""What `--dry-run` prints: the difference between what the kernel holds and what it should hold, by Service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from kproxy.dataplane.base import Change, Dataplane
from kproxy.reconcile import Difference

_COLORS = {"+": "\033[32m", "-": "\033[31m", "~": "\033[33m", "": "\033[1m"}
_RESET = "\033[0m"
_OPERATIONS = {"+": "add", "-": "remove", "~": "change"}


def _sign(change: Change) -> str:
    if change.old is None:
        return "+"
    return "-" if change.new is None else "~"


def _counts(differences: Sequence[Difference]) -> Counter[str]:
    return Counter(_sign(change) for difference in differences for change in difference.changes)


def as_text(
    differences: Sequence[Difference], dataplane: Dataplane, *, mode: str, node: str, color: bool
) -> Iterator[str]:
    """Lines for people: `+` would be added, `-` removed, `~` changed."""

    def paint(sign: str, line: str) -> str:
        return f"{_COLORS[sign]}{line}{_RESET}" if color else line

    where = f"{mode} mode, node {node}"
    if not differences:
        yield f"{where}: nothing to change, the kernel holds what it should"
        return
    counts = _counts(differences)
    services = sum(difference.service is not None for difference in differences)
    yield (
        f"{where}: {counts['+']} to add, {counts['-']} to remove, {counts['~']} to change"
        f" ({services} {'Service' if services == 1 else 'Services'})"
    )
    for difference in differences:
        yield ""
        yield paint("", f"Service {difference.service}" if difference.service else "For all Services")
        for change in difference.changes:
            sign = _sign(change)
            if change.old is not None and change.new is not None:
                yield paint(sign, f"  {sign} {dataplane.describe(change.key, change.new)}")
                yield paint(sign, f"    instead of {dataplane.describe(change.key, change.old)}")
            else:
                value = change.old if change.new is None else change.new
                yield paint(sign, f"  {sign} {dataplane.describe(change.key, value)}")


def as_json(differences: Sequence[Difference], dataplane: Dataplane, *, mode: str, node: str) -> str:
    """One JSON document for programs. Each change has `op` (add, remove, change) and `new`, `old` or both."""
    counts = _counts(differences)
    document = {
        "mode": mode,
        "node": node,
        "counts": {name: counts[sign] for sign, name in _OPERATIONS.items()},
        "services": [
            {
                "namespace": difference.service.namespace,
                "name": difference.service.name,
                "changes": [_change(change, dataplane) for change in difference.changes],
            }
            for difference in differences
            if difference.service
        ],
        "shared": [
            _change(change, dataplane)
            for difference in differences
            if not difference.service
            for change in difference.changes
        ],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def _change(change: Change, dataplane: Dataplane) -> dict[str, Any]:
    described = {"op": _OPERATIONS[_sign(change)]}
    if change.new is not None:
        described["new"] = dataplane.describe(change.key, change.new)
    if change.old is not None:
        described["old"] = dataplane.describe(change.key, change.old)
    return described
