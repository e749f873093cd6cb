"""The lock that everything which changes legacy tables holds, so that nobody's change is lost (libxtables' xshared)."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_SECONDS = 5.0  # as kube-proxy waits
_POLL_SECONDS = 0.01


class LockedError(Exception):
    """Somebody else kept the lock all the time."""


def lock_path() -> Path:
    """Where the lock is for the iptables commands of this process, too."""
    return Path(os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock")


@contextmanager
def xtables_lock(path: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock. Raises LockedError after `wait_seconds`, and OSError where there can be no such file."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                raise LockedError(f"another program holds {path}; waited {wait_seconds:g} s for it")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
