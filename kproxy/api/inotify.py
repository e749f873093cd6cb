"""Waiting for changes in directories, by inotify(7).

Through ctypes: it takes three calls of libc, and no well-kept package offers them without more around it.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_ONLYDIR = 0x1000000
# Not IN_MODIFY: a file that is being written is of no interest until it is closed.
_EVENTS = (
    IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF
)
SETTLE_SECONDS = 0.1  # without a further change, before files are read
LONGEST_SETTLE_SECONDS = 1.0
_MOST_LINKS = 40  # as in the kernel
_HEADER = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, length of the name that follows

Names = Collection[str] | None  # None: all


class Inotify:
    """Watches directories for changes of entries with the given names, and of the directories themselves."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise _os_error("inotify_init1")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._names: dict[int, Names] = {}

    def watch(self, folders: Mapping[Path, Names]) -> None:
        """Watch exactly these. Those that do not exist are left out; raises OSError where the kernel's limit is hit."""
        names: dict[int, Names] = {}
        for folder, wanted in folders.items():
            watch = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _EVENTS | IN_ONLYDIR)
            if watch >= 0:
                known = names.get(watch, ())  # two paths may lead to one directory
                names[watch] = None if wanted is None or known is None else {*known, *wanted}
            elif ctypes.get_errno() in (28, 12):  # ENOSPC: fs.inotify.max_user_watches; ENOMEM
                raise _os_error(f"inotify_add_watch {folder}")
        for watch in self._names.keys() - names.keys():
            self._libc.inotify_rm_watch(self._fd, watch)
        self._names = names

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for a change, at most so long. False: none came, or `wake` was called."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
            if not ready or self._wake in ready:
                return False
            if self._changed():
                return True

    def settle(self) -> None:
        """Wait until nothing has changed for a moment, so that a group of changes is read at once."""
        deadline = time.monotonic() + LONGEST_SETTLE_SECONDS
        while self.wait(SETTLE_SECONDS) and time.monotonic() < deadline:
            pass

    def wake(self) -> None:
        """End this and all further waiting; from any thread."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._fd)
        os.close(self._wake)

    def _changed(self) -> bool:
        """Take what has happened; whether any of it is of interest."""
        try:
            events = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return False
        changed = False
        at = 0
        while at < len(events):
            watch, _, _, length = _HEADER.unpack_from(events, at)
            name = os.fsdecode(events[at + _HEADER.size : at + _HEADER.size + length].rstrip(b"\0"))
            at += _HEADER.size + length
            # Without a name it is about the directory itself, or (watch -1) the queue has overflowed.
            wanted = self._names.get(watch, ())
            changed |= not name or wanted is None or name in wanted
        return changed


def way_to(path: Path) -> Iterator[tuple[Path, str]]:
    """The entries whose replacement changes where a path leads: links, the last name, or the first that is missing."""
    current = Path("/")
    names = list((Path.cwd() / path).parts[1:])
    links = 0
    while names:
        name = names.pop(0)
        if name == "..":
            current = current.parent
            continue
        entry = current / name
        if entry.is_symlink() and links < _MOST_LINKS:
            links += 1
            yield current, name
            target = entry.readlink()
            names = [*(target.parts[1:] if target.is_absolute() else target.parts), *names]
            current = Path("/") if target.is_absolute() else current
        elif not names or not entry.exists():
            yield current, name
            return
        else:
            current = entry


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
