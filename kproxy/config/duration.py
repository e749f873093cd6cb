"""Durations as Go writes them: `1h2m`, `30s`, `1.5h`, `100ms`."""

from __future__ import annotations

import re
from typing import Self

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, micro sign
    "μs": 1_000,  # U+03BC, Greek letter mu
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_TERM = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_LIMIT = 1 << 63  # Go keeps nanoseconds in an int64
_DIGITS = 19  # of that limit


class Duration(int):
    """A number of nanoseconds; `str` prints it as Go does, such as `24h0m0s`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read Go's notation. Raises ValueError."""
        sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
        if rest == "0":
            return cls(0)
        nanoseconds = 0
        end = 0
        while term := _TERM.match(rest, end):
            whole, _, fraction = term[1].partition(".")
            fraction = fraction[:_DIGITS]  # what comes after is less than a nanosecond
            if len(whole.lstrip("0")) > _DIGITS:
                raise ValueError(f'"{text}" is longer than 292 years')
            unit = _NANOSECONDS[term[2]]
            nanoseconds += int(whole[-_DIGITS:] or "0") * unit + int(fraction or "0") * unit // 10 ** len(fraction)
            end = term.end()
        if not rest or end != len(rest):
            raise ValueError(f'"{text}" is not a duration such as 30s, 1h2m or 100ms')
        if nanoseconds >= _LIMIT:
            raise ValueError(f'"{text}" is longer than 292 years')
        return cls(sign * nanoseconds)

    @property
    def seconds(self) -> float:
        """The same in seconds, which Python's clocks count."""
        return self / 1_000_000_000

    def __str__(self) -> str:
        if self == 0:
            return "0s"
        sign, nanoseconds = ("-", -int(self)) if self < 0 else ("", int(self))
        if nanoseconds < _NANOSECONDS["s"]:
            unit = next(unit for unit in ("ms", "µs", "ns") if nanoseconds >= _NANOSECONDS[unit])
            return f"{sign}{_decimal(nanoseconds, _NANOSECONDS[unit])}{unit}"
        minutes, rest = divmod(nanoseconds, _NANOSECONDS["m"])
        seconds = f"{_decimal(rest, _NANOSECONDS['s'])}s"
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{sign}{hours}h{minutes}m{seconds}"
        return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"

    __repr__ = __str__


class FlushFrequency(Duration):
    """A duration that may also be given as a number of nanoseconds, which only `logging.flushFrequency` may."""


def _decimal(nanoseconds: int, unit: int) -> str:
    whole, fraction = divmod(nanoseconds, unit)
    digits = str(unit).count("0")
    return f"{whole}.{fraction:0{digits}d}".rstrip("0") if fraction else str(whole)
