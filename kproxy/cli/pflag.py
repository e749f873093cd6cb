"""The command line's syntax, as Go's pflag has it: kube-proxy's manifests and scripts must be read the same way.

`--flag=value` and `--flag value`; booleans take a value only with `=`; underscores may stand for hyphens; shorthands
are `-v 4`, `-v=4` and `-v4`; `--` ends the flags. Repeated lists and maps are joined, otherwise the last value counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from kproxy.config.duration import Duration, FlushFrequency
from kproxy.config.v1alpha1 import VModuleItem


class Kind(NamedTuple):
    """A type of value: its name in the help, and how its text is read. `parse` raises ValueError with the reason."""

    name: str
    parse: Callable[[str], Any]
    implied: str | None = None  # what a flag without a value means; None: it needs one


class Flag(NamedTuple):
    """A flag, and what it sets: `fields` of KubeProxyConfiguration, or the `own_field` of KproxyConfiguration."""

    name: str
    kind: Kind
    help: str
    fields: tuple[str, ...] = ()
    own_field: str = ""
    shorthand: str = ""
    no_effect: str = ""  # why, for a flag without fields that does nothing in kproxy
    with_config: bool = False  # counts even where --config is given


class Scanned(NamedTuple):
    """What was written: texts by flag name in their order, the bare arguments, and what could not be made sense of."""

    texts: dict[str, list[str]]
    operands: tuple[str, ...]
    problems: tuple[str, ...]


def scan(argv: Sequence[str], flags: Iterable[Flag]) -> Scanned:
    """Take a command line apart, without its first word."""
    by_name = {flag.name: flag for flag in flags}
    by_shorthand = {flag.shorthand: flag for flag in by_name.values() if flag.shorthand}
    texts: dict[str, list[str]] = {}
    operands: list[str] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            operands += words
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
            continue
        flag: Flag | None
        value: str | None
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            flag, value = by_name.get(name.replace("_", "-")), text if equals else None
            shown = f"--{name}"
        else:
            flag, rest = by_shorthand.get(word[1]), word[2:]
            value = rest.removeprefix("=") if rest else None
            shown = word
        if flag is None:
            problems.append(f"unknown flag: {shown}{_suggestion(shown, by_name)}")
            continue
        if value is None and flag.kind.implied is not None:
            value = flag.kind.implied
        elif value is None and words:
            value = words.pop(0)
        if value is None:
            problems.append(f"{shown}: needs a value ({flag.kind.name})")
        else:
            texts.setdefault(flag.name, []).append(value)
    return Scanned(texts, tuple(operands), tuple(problems))


def read_value(kind: Kind, texts: Iterable[str]) -> Any:
    """The value of a flag that was given with these texts. Raises ValueError with the reason."""
    values = [kind.parse(text) for text in texts]
    match values[0]:
        case tuple():
            return tuple(member for value in values for member in value)
        case dict():
            return {key: member for value in values for key, member in value.items()}
        case _:
            return values[-1]


def _suggestion(shown: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(shown.strip("-").partition("=")[0].replace("_", "-"), names, n=1)
    return f" (did you mean --{close[0]}?)" if close else ""


def boolean(text: str) -> bool:
    """As Go's strconv.ParseBool."""
    if text in {"1", "t", "T", "true", "TRUE", "True"}:
        return True
    if text in {"0", "f", "F", "false", "FALSE", "False"}:
        return False
    raise ValueError(f'"{text}" is not true or false')


def _integer(text: str, lowest: int, highest: int) -> int:
    try:
        value = int(text, 0)
    except ValueError as error:
        raise ValueError(f'"{text}" is not a whole number') from error
    if not lowest <= value <= highest:
        raise ValueError(f"{value} is not in the range {lowest} to {highest}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f'"{text}" is not a number') from error


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if malformed := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f'"{malformed[0].strip()}" has no value; expected NAME=VALUE[,NAME=VALUE]...')
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _gates(text: str) -> dict[str, bool]:
    def read(name: str, value: str) -> bool:
        try:
            return boolean(value)
        except ValueError as error:
            raise ValueError(f"feature gate {name}: {error}") from error

    return {name: read(name, value) for name, value in _pairs(text)}


def _vmodule(text: str) -> tuple[VModuleItem, ...]:
    return tuple(
        VModuleItem(file_pattern=name, verbosity=_integer(value, 0, 2**31 - 1)) for name, value in _pairs(text)
    )


BOOL = Kind("bool", boolean, implied="true")
INT = Kind("int", lambda text: _integer(text, -(2**31), 2**31 - 1))
LEVEL = Kind("level", lambda text: _integer(text, 0, 2**31 - 1))
NUMBER = Kind("number", _number)
TEXT = Kind("string", str)
DURATION = Kind("duration", Duration.parse)
FLUSH_FREQUENCY = Kind("duration", FlushFrequency.parse)
LIST = Kind("list", _list)
GATES = Kind("NAME=bool,...", _gates)
VMODULE = Kind("PATTERN=N,...", _vmodule)
