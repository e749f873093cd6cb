"""Network namespaces of our own, without names, without leftovers.

A namespace lives as long as the one thread that entered it. What must happen inside (opening a socket, creating a
device, starting a process) runs in that thread; sockets and devices opened there go on working from every thread.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CLONE_NEWNET = 0x40000000


class CommandError(Exception):
    """A command inside the namespace failed; the message holds what it printed."""


class Namespace:
    """A new network namespace with its loopback device up. Needs CAP_SYS_ADMIN, of a user namespace if need be."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns")
        try:
            self.path: Path = self._thread.submit(_enter_new).result()
        except OSError:
            self._thread.shutdown()
            raise
        self.command("ip", "link", "set", "lo", "up")

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the namespace's thread. Must not be called from that thread."""
        return self._thread.submit(function, *args, **kwargs).result()

    def command(
        self, *args: str, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises CommandError if it fails, unless `check` is off."""
        done = self.run(
            subprocess.run, args, input=stdin, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise CommandError(f"{' '.join(args)}: exit status {done.returncode}\n{done.stdout}{done.stderr}{stdin}")
        return done

    def start(self, args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process in the namespace; the caller ends it. `options` are Popen's."""

        def popen() -> subprocess.Popen[str]:
            return subprocess.Popen(args, text=True, **options)

        return self.run(popen)

    def sysctl(self, name: str, value: str | int) -> None:
        """Write a sysctl given by its path below /proc/sys."""
        self.run(Path("/proc/sys", name).write_text, f"{value}\n")

    def close(self) -> None:
        """Leave the namespace; it goes when the last socket of it is closed."""
        self._thread.shutdown()

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _enter_new() -> Path:
    """Move the calling thread into a namespace of its own; the path under which others can enter it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"unshare(CLONE_NEWNET): {os.strerror(error)}")
    return Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net")
