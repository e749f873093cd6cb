"""What iptables-restore says when it fails, and which commands that is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kproxy.dataplane.base import Key
from kproxy.dataplane.iptables.commands import Line

_LINE = re.compile(r"\bline:? (\d+)")
_CHAIN = re.compile(r"(?:Chain '|chain |target `)([^\s':]+)")
_TRANSIENT = (
    "xtables lock",
    "Resource temporarily unavailable",
    "Cannot allocate memory",
    "Permission denied",
    "Operation not permitted",
    "No buffer space",
)
_CONTEXT_LINES = 3
_USELESS = re.compile(r"^Try `.*$|^Another app is currently holding .*still.*$", re.MULTILINE)
_SPEAKER = re.compile(r"^ip6?tables\S*-restore(?: v\S+ \(\w+\))?: ")


class RefusedError(Exception):
    """Commands were refused. `committed`: some that come before may be in force all the same."""

    def __init__(self, message: str, culprits: tuple[Key, ...], *, transient: bool, committed: bool) -> None:
        super().__init__(message)
        self.culprits = culprits
        self.transient = transient
        self.committed = committed


def refusal(who: str, said: str, given: Sequence[Line]) -> RefusedError:
    """What went wrong, in the order: what was said, the lines about the one that it names, their entries."""
    said = _SPEAKER.sub("", " ".join(_USELESS.sub("", said).split())) or "it failed without a word"
    numbers = [int(number) for number in _LINE.findall(said)]
    at = numbers[-1] - 1 if numbers and 0 < numbers[-1] <= len(given) else None
    suspects = _suspects(said, given, at)
    message = f"{who}: {said}"
    shown = sorted({near for number in suspects or ([] if at is None else [at]) for near in _near(number, given)})
    if len(shown) > _CONTEXT_LINES * 7:
        shown = shown[: _CONTEXT_LINES * 7]
    for number in shown:
        message += f"\n{'>' if number in suspects else ' '} {number + 1}: {given[number].text}"
    first_commit = next((number for number, line in enumerate(given) if line.text == "COMMIT"), len(given))
    return RefusedError(
        message,
        tuple(dict.fromkeys(command.key for number in suspects if (command := given[number].command))),
        transient=any(text in said for text in _TRANSIENT),
        committed=at is None or at > first_commit,
    )


def _near(number: int, given: Sequence[Line]) -> range:
    return range(max(0, number - _CONTEXT_LINES), min(len(given), number + _CONTEXT_LINES + 1))


def _suspects(said: str, given: Sequence[Line], at: int | None) -> list[int]:
    """The lines to blame: the one that was named, else those before a failed COMMIT that name the chain in question."""
    if at is not None and given[at].command:
        return [at]
    chains = set(_CHAIN.findall(said))
    if not chains:
        return []
    return [number for number, line in enumerate(given[:at]) if line.command and chains & set(line.text.split())]
