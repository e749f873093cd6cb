"""Tests marked `ipvs` on a host whose kernel has no IPVS: all of them in User-Mode Linux, beside the other tests.

A machine has one processor, so there are two, and each runs whole test files. A pytest inside runs the selected items
and writes down their reports (`uml_inner.py`); this one replays them under the same names, so counts, `-x`, `-k`,
failures and their output are as if they had run here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.ipvs.uml_inner import REPORTS, SELECTED, Line
from tests.lab import uml

MARKER = "ipvs"

_SILENCE_SECONDS = 180.0  # between two lines; a test takes seconds, start and collection some ten
_DUMP_SECONDS = 5.0
_POLL_SECONDS = 0.02
_COVERAGE = "coverage"
_MACHINES = 2


class TroubleError(Exception):
    """No more reports come; the message says why."""


class InnerPytest:
    """The pytest in User-Mode Linux. Raises uml.UnavailableError."""

    def __init__(self, items: list[pytest.Item], *, coverage: bool) -> None:
        self.left = len(items)
        files = dict.fromkeys(str(item.path) for item in items)
        config = items[0].config
        options = [f"--rootdir={config.rootpath}", "-p", "no:cacheprovider", "-p", "tests.ipvs.uml_inner"]
        options += ["-o", f"faulthandler_timeout={_SILENCE_SECONDS - _DUMP_SECONDS:g}"]  # what hangs says where
        if coverage:
            options += ["-p", "pytest_cov.plugin", "--cov", "--cov-report="]
        options += _same_look(config)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        env |= {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # Python starts slowly there
            "HYPOTHESIS_STORAGE_DIRECTORY": "/dev/shm/hypothesis",
            "COVERAGE_FILE": str(uml.SHARED / _COVERAGE),
        }
        self._machine = uml.Machine(
            [sys.executable, "-m", "pytest", *options, *files],
            env=env,
            files={SELECTED: json.dumps([item.nodeid for item in items]), REPORTS: ""},
        )
        self._reports = (self._machine.shared / REPORTS).open("rb")
        self._unread = b""

    def next_line(self) -> Line:
        """What it says next. Raises TroubleError if it ended, crashed or stands still."""
        deadline = time.monotonic() + _SILENCE_SECONDS
        while True:
            trouble = self._trouble(deadline)  # first, so that all it wrote is read before
            self._unread += self._reports.read()
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                return Line(*json.loads(line))
            if trouble:
                raise TroubleError(trouble)
            time.sleep(_POLL_SECONDS)

    def copy_coverage(self) -> None:
        """Put what was measured inside beside what is measured here, where pytest-cov combines it."""
        ours = Path(os.environ.get("COVERAGE_FILE", ".coverage"))
        measured = self._machine.shared / _COVERAGE
        if measured.exists():
            shutil.copy(measured, ours.with_name(f"{ours.name}.{self._machine.shared.name}"))

    def close(self) -> None:
        """End it, done or not."""
        self._reports.close()
        self._machine.close()

    def _trouble(self, deadline: float) -> str:
        try:
            ended = self._machine.poll() is not None
        except uml.CrashError as error:
            return str(error)
        if ended:
            return f"pytest in User-Mode Linux ended too early\n{self._machine.last_words()}"
        if time.monotonic() > deadline:
            silence = f"nothing new for {_SILENCE_SECONDS:g} s"
            return f"pytest in User-Mode Linux: {silence}\n{self._machine.last_words()}"
        return ""


class IpvsInUml:
    """The pytest plugin of the outer side."""

    def __init__(self) -> None:
        self._inner: dict[Path, InnerPytest] = {}  # by the files that it runs
        self._trouble = ""
        self._done = 0
        self._seconds = 0.0
        self._kernel = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put them last: they run while the others do."""
        items.sort(key=_is_for_uml)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start as soon as it is known what to run."""
        items = [item for item in session.items if _is_for_uml(item)]
        if not items or session.config.option.collectonly:
            return
        option = session.config.option
        coverage = bool(getattr(option, "cov_source", None)) and not option.no_cov  # pytest-cov's, if it is there
        try:
            for part in _parts(items):
                inner = InnerPytest(part, coverage=coverage)
                self._inner |= dict.fromkeys((item.path for item in part), inner)
        except uml.UnavailableError as error:
            self._close()
            reason = f"the kernel has no IPVS, and {error}"
            if os.environ.get("CI") == "true":
                self._trouble = reason  # they fail: a green build without them would say too much
            else:
                for item in items:
                    item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Replay the reports of one item."""
        if not _is_for_uml(item) or not (self._inner or self._trouble):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if self._inner and not self._trouble:
            try:
                self._replay(item, self._inner[item.path])
            except TroubleError as error:
                self._trouble = str(error)
        if self._trouble:
            item.ihook.pytest_runtest_logreport(report=_failure(item, self._trouble))
            self._trouble = self._trouble.partition("\n")[0]  # the rest would be the same for each
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """Leave nothing behind."""
        self._close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where they ran."""
        if self._kernel:
            where = f"User-Mode Linux (kernel {self._kernel})"
            tests = "1 test" if self._done == 1 else f"{self._done} tests"
            terminalreporter.write_line(f"{tests} ran inside {where} in {self._seconds:.1f} s")

    def _close(self) -> None:
        for inner in set(self._inner.values()):
            inner.close()
        self._inner.clear()

    def _replay(self, item: pytest.Item, inner: InnerPytest) -> None:
        while (line := inner.next_line()).kind == "report":
            item.ihook.pytest_runtest_logreport(report=_report(item.config, line.content))
        if line.kind == "end" or line.content != item.nodeid:
            raise TroubleError(f"pytest in User-Mode Linux ran something else: {line}")
        self._done += 1
        inner.left -= 1
        if not inner.left:
            self._finish(inner)

    def _finish(self, inner: InnerPytest) -> None:
        line = inner.next_line()
        if line.kind != "end" or line.content["status"] not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
            raise TroubleError(f"pytest in User-Mode Linux ended badly: {line}")
        inner.copy_coverage()
        self._kernel = line.content["kernel"]
        self._seconds = max(self._seconds, line.content["seconds"])


def _parts(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """What each machine runs: whole files, the largest first to the one that has the fewest tests so far."""
    shares: list[set[Path]] = [set() for _ in range(_MACHINES)]
    sizes = [0] * _MACHINES
    for path, size in Counter(item.path for item in items).most_common():
        fewest = sizes.index(min(sizes))
        shares[fewest].add(path)
        sizes[fewest] += size
    return [[item for item in items if item.path in share] for share in shares if share]


def _is_for_uml(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None


def _same_look(config: pytest.Config) -> list[str]:
    """The options that shape what a report says of a failure."""
    option = config.option
    color = "yes" if config.get_terminal_writer().hasmarkup else "no"
    verbosity = f"-{'v' * option.verbose}" if option.verbose > 0 else "-q"
    return [f"--tb={option.tbstyle}", f"--color={color}", verbosity, *(["--showlocals"] if option.showlocals else [])]


def _report(config: pytest.Config, content: dict[str, Any]) -> pytest.TestReport:
    """A report as it was written down; JSON has no tuples, and where a test was skipped must be one."""
    report = config.hook.pytest_report_from_serializable(config=config, data=content)
    if isinstance(report.longrepr, list):
        report.longrepr = tuple(report.longrepr)
    report.location = tuple(report.location)
    return report


def _failure(item: pytest.Item, reason: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {item.name: 1}, "failed", reason, "call")
