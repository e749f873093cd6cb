"""The cluster as kubectl shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Object = dict[str, Any]


class LabError(Exception):
    """A check has found something else than it expected."""


class KubectlError(LabError):
    """kubectl failed; the message has the command and what it said."""

    def __init__(self, arguments: tuple[str, ...], said: str) -> None:
        super().__init__(f"kubectl {' '.join(arguments)}: {said.strip()}")


def run(*arguments: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run kubectl to its end, whether it succeeds or not. Raises KubectlError if it does not end."""
    try:
        return subprocess.run(
            ("kubectl", *arguments), input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise KubectlError(arguments, f"no answer in {timeout:g} s") from None


def kubectl(*arguments: str, stdin: str = "", timeout: float = 60) -> str:
    """Run kubectl and return what it printed. Raises KubectlError if it fails."""
    done = run(*arguments, stdin=stdin, timeout=timeout)
    if done.returncode:
        raise KubectlError(arguments, done.stderr or done.stdout)
    return done.stdout


def get(*arguments: str) -> Object:
    """One object, or a List."""
    found: Object = json.loads(kubectl("get", *arguments, "-o", "json"))
    return found


def missing_tool() -> str:
    """A line that says what is missing, or nothing."""
    if shutil.which("kubectl"):
        return ""
    return "kubectl is missing on this machine: it speaks to the cluster; https://kubernetes.io/docs/tasks/tools/"


def wait_for(look: Callable[[], T], what: str, seconds: float = 60, pause: float = 0.2) -> T:
    """The first true answer of `look`, asked again after a pause.

    Raises LabError with the last answer, or the last failure, if time is up.
    """
    deadline = time.monotonic() + seconds
    while True:
        last: object
        try:
            answer = look()
            if answer:
                return answer
            last = answer
        except LabError as error:
            last = error
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {seconds:g} s (last: {last})")
        time.sleep(pause)


def expect(found: object, expected: object, what: str) -> None:
    """Raise LabError unless both are equal."""
    if found != expected:
        raise LabError(f"{what}: expected {expected}, found {found}")
