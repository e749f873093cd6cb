"""What `--dry-run` prints: the difference between what the kernel holds and what it should hold, by Service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kproxy.dataplane.base import Change, Dataplane, Key, Value
from kproxy.modes.remains import Remains
from kproxy.reconcile import Difference, Kind, kind

_COLORS = {"+": "\033[32m", "-": "\033[31m", "~": "\033[33m", "": "\033[1m"}
_RESET = "\033[0m"
_SIGNS: dict[Kind, str] = {"add": "+", "remove": "-", "change": "~"}


def _counts(differences: Sequence[Difference], remains: Sequence[Remains]) -> Counter[Kind]:
    changes = [change for difference in differences for change in difference.changes]
    changes += [change for left in remains for change in left.changes]
    return Counter(map(kind, changes))


def as_text(
    differences: Sequence[Difference],
    remains: Sequence[Remains],
    dataplane: Dataplane,
    *,
    mode: str,
    node: str,
    color: bool,
) -> Iterator[str]:
    """Lines for people: `+` would be added, `-` removed, `~` changed. `remains` go once the rest is in place."""

    def paint(sign: str, line: str) -> str:
        return f"{_COLORS[sign]}{line}{_RESET}" if color else line

    where = f"{mode} mode, node {node}"
    if not differences and not remains:
        yield f"{where}: nothing to change, the kernel holds what it should"
        return
    counts = _counts(differences, remains)
    services = sum(difference.service is not None for difference in differences)
    yield (
        f"{where}: {counts['add']} to add, {counts['remove']} to remove, {counts['change']} to change"
        f" ({services} {'Service' if services == 1 else 'Services'})"
    )
    for difference in differences:
        yield ""
        yield paint("", f"Service {difference.service}" if difference.service else "For all Services")
        for change in difference.changes:
            sign = _SIGNS[kind(change)]
            if change.old is not None and change.new is not None:
                yield paint(sign, f"  {sign} {dataplane.describe(change.key, change.new)}")
                yield paint(sign, f"    instead of {dataplane.describe(change.key, change.old)}")
            else:
                value = change.old if change.new is None else change.new
                yield paint(sign, f"  {sign} {dataplane.describe(change.key, value)}")
    for left in remains:
        yield ""
        yield paint("", f"Left by {left.owner}")
        for change in left.changes:
            yield paint("-", f"  - {left.describe(change.key, change.old)}")


def as_json(
    differences: Sequence[Difference], remains: Sequence[Remains], dataplane: Dataplane, *, mode: str, node: str
) -> str:
    """One JSON document for programs. Each change has `op` (add, remove, change) and `new`, `old` or both."""
    counts = _counts(differences, remains)
    document = {
        "mode": mode,
        "node": node,
        "counts": {name: counts[name] for name in _SIGNS},
        "services": [
            {
                "namespace": difference.service.namespace,
                "name": difference.service.name,
                "changes": [_change(change, dataplane.describe) for change in difference.changes],
            }
            for difference in differences
            if difference.service
        ],
        "shared": [
            _change(change, dataplane.describe)
            for difference in differences
            if not difference.service
            for change in difference.changes
        ],
        "left": [
            {"by": left.owner, "changes": [_change(change, left.describe) for change in left.changes]}
            for left in remains
        ],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def _change(change: Change, describe: Callable[[Key, Value], str]) -> dict[str, Any]:
    described: dict[str, Any] = {"op": kind(change)}
    if change.new is not None:
        described["new"] = describe(change.key, change.new)
    if change.old is not None:
        described["old"] = describe(change.key, change.old)
    return described
