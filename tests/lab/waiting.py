"""Waiting for what other processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.02


def eventually(look: Callable[[], T], what: str, *, seconds: float = 10.0) -> T:
    """The first true answer of `look`. Raises AssertionError with `what` and the last answer when the time is up.

    Connection errors count as an answer: what is looked at may not be there yet.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            seen: T | OSError = look()
        except OSError as error:
            seen = error
        if seen and not isinstance(seen, OSError):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s (last seen: {seen!r})")
        time.sleep(_POLL_SECONDS)
