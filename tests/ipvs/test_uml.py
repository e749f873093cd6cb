"""Running tests inside User-Mode Linux: what one is told of them out here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import uml

pytestmark = pytest.mark.skipif(bool(uml.why_unavailable()), reason=uml.why_unavailable() or "-")

REPOSITORY = Path(__file__).parents[2]

CONFTEST = """
import platform

from tests.ipvs.uml_outer import IpvsInUml


def pytest_configure(config):
    config.addinivalue_line("markers", "ipvs")
    if platform.node() != "uml":
        config.pluginmanager.register(IpvsInUml())
"""

TESTS = """
import platform
from pathlib import Path

import pytest


@pytest.mark.ipvs
def test_passes():
    assert platform.node() == "uml"


@pytest.mark.ipvs
@pytest.mark.parametrize("wanted", ["this", "that, and more"])
def test_compares(wanted):
    print("about to compare")
    assert wanted == "this"


@pytest.mark.ipvs
def test_is_skipped():
    pytest.skip("not today")


def test_runs_outside():
    assert platform.node() != "uml"


@pytest.mark.ipvs
def test_brings_the_kernel_down():
    Path("/proc/sysrq-trigger").write_text("c")


@pytest.mark.ipvs
def test_comes_too_late():
    pass
"""


def test_status_output_and_files_of_a_command() -> None:
    status, output = uml.run(["sh", "-c", f"pwd; echo problem >&2; touch {Path(__file__).parent}/made; exit 7"])

    assert status == 7
    assert output.startswith(f"{Path.cwd()}\nproblem\n")
    assert "Read-only file system" in output


def test_a_command_that_takes_too_long_is_ended() -> None:
    with uml.Machine(["sleep", "1000"]) as machine, pytest.raises(uml.CrashError, match=r"not done within 0\.1 s"):
        machine.wait(0.1, lambda _: None)

    assert not machine.shared.exists()


def test_reports_are_replayed_under_their_names_and_a_crash_is_a_failure(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-rA")

    results = [line for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "SKIPPED"))]
    assert results == [
        "PASSED test_it.py::test_runs_outside",
        "PASSED test_it.py::test_passes",
        "PASSED test_it.py::test_compares[this]",
        "SKIPPED [1] test_it.py:22: not today",
        "FAILED test_it.py::test_compares[that, and more] - AssertionError: assert 'that, and more' == 'this'",
        "FAILED test_it.py::test_brings_the_kernel_down - User-Mode Linux crashed",
        "FAILED test_it.py::test_comes_too_late - User-Mode Linux crashed",
    ]
    assert "about to compare" in done.stdout
    assert "sysrq triggered crash" in done.stdout


def test_the_selection_and_the_first_failure_count_as_usual(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-x", "-k", "compares or skipped")

    assert "1 failed, 1 passed, 4 deselected" in done.stdout


def run_pytest(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={directory}", *options, "."]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=120, check=False)
