"""How the demo talks: what it does, what it saw, and whether that is what a Service promises."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from tests.lab.namespaces import CommandError

_BOLD, _DIM, _GREEN, _RED, _RESET = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"


class Step(NamedTuple):
    """A finished step."""

    number: int
    title: str
    broken: tuple[str, ...]  # the claims that did not hold
    finding: str  # one line for the summary
    seconds: float


class Report:
    """Prints the demo as it goes and remembers how each step ended."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._colors = self._out.isatty()
        self._broken: list[str] = []
        self._finding = ""
        self.steps: list[Step] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A step. What fails in it, makes the step fail and the demo go on."""
        number = len(self.steps) + 1
        self._broken, self._finding = [], ""
        self.line("")
        self.line(self._paint(_BOLD, f"{number}. {title}"))
        begin = time.monotonic()
        try:
            yield
        except (AssertionError, CommandError, OSError) as error:
            self.holds(False, f"{type(error).__name__}: {error}")
        finding = self._finding if not self._broken else f"failed: {self._broken[0].splitlines()[0]}"
        self.steps.append(Step(number, title, tuple(self._broken), finding, time.monotonic() - begin))

    def does(self, text: str) -> None:
        """Say what is done now."""
        self.line(f"   {text}")

    def saw(self, text: str) -> None:
        """Say what was observed."""
        for line in text.splitlines():
            self.line(self._paint(_DIM, f"   │ {line}"))

    def holds(self, held: bool, claim: str, *, finding: str = "") -> None:
        """Say whether a claim held; `finding` stands for the step in the summary."""
        if held:
            self._finding = finding or self._finding
        else:
            self._broken.append(claim)
        self.line(f"   {self._mark(held)} {claim}")

    def summary(self, seconds: float) -> bool:
        """Print all steps on one screen; whether all held."""
        failed = sum(bool(step.broken) for step in self.steps)
        self.line("")
        self.line(self._paint(_BOLD, "Summary"))
        for step in self.steps:
            self.line(f"   {self._mark(not step.broken)} {step.number:2}. {step.title}")
            self.line(self._paint(_DIM, f"         {step.finding}  ({step.seconds:.1f} s)"))
        count = len(self.steps)
        verdict = f"{count - failed} of {count} steps held" if failed else f"all {count} steps held"
        self.line("")
        self.line(self._paint(_RED if failed else _GREEN, f"{verdict}, in {seconds:.0f} s"))
        return not failed

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._out, flush=True)

    def _mark(self, held: bool) -> str:
        return self._paint(_GREEN, "✓") if held else self._paint(_RED, "✗")

    def _paint(self, color: str, text: str) -> str:
        return f"{color}{text}{_RESET}" if self._colors else text
