"""The pytest inside User-Mode Linux: runs the items that the one outside selected, and writes down their reports.

Each line of the file is written and closed at once: that is when the host sees it.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.lab import uml

SELECTED = "selected"
REPORTS = "reports"


class Line(NamedTuple):
    """A line of the reports: of one `report` (pytest's own form), an item that is `done`, or the `end` of all."""

    kind: str
    content: Any


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ReportWriter(config))


class ReportWriter:
    """The pytest plugin of the inner side."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep what was selected, in the order in which it is waited for."""
        wanted = {nodeid: place for place, nodeid in enumerate(json.loads((uml.SHARED / SELECTED).read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in wanted), key=lambda item: wanted[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, call or tear-down of an item."""
        self._write("report", self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """An item is done."""
        self._write("done", nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """All is done."""
        seconds = float(Path("/proc/uptime").read_text().split()[0])
        self._write("end", {"status": int(exitstatus), "kernel": platform.release(), "seconds": seconds})

    def _write(self, kind: str, content: Any) -> None:
        with (uml.SHARED / REPORTS).open("a") as file:
            file.write(json.dumps([kind, content]) + "\n")
