"""Follows a running proxy's configuration file, also where it is a ConfigMap's, which changes by the swap of a link."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from kproxy.api.errors import ApiConfigError, ManifestError
from kproxy.api.inotify import LONGEST_SETTLE_SECONDS, Inotify, way_to
from kproxy.cli.actions import initialise
from kproxy.cli.assembly import api_connection, open_mode
from kproxy.cli.invocation import Invocation, parse
from kproxy.config.errors import ConfigError
from kproxy.dataplane.base import UnsupportedError
from kproxy.node_addresses import supported_families
from kproxy.sysctl import SysctlError

log = structlog.get_logger(__name__)


class ConfigurationFile:
    """Calls `changed`, from another thread, once the file says something else that this machine can do.

    `argv` is the command line that `running` came of. `rejected` hears whether what the file says cannot be used.
    """

    def __init__(
        self,
        argv: Sequence[str],
        running: Invocation,
        changed: Callable[[], None],
        rejected: Callable[[bool], None],
    ) -> None:
        self._argv = argv
        self._running = running
        self._changed = changed
        self._rejected = rejected
        self._problems: tuple[str, ...] = ()

    def start(self) -> None:
        """Begin to follow, if there is a file. Raises OSError."""
        if self._running.config_file:
            inotify = Inotify()
            follow = threading.Thread(
                target=self._run, args=(self._running.config_file, inotify), name="configuration", daemon=True
            )
            follow.start()

    def _run(self, path: Path, inotify: Inotify) -> None:
        while True:
            watching = self._watch(path, inotify)  # before reading, so that no change falls between
            if self._says_something_else():
                self._changed()
                return
            inotify.wait(None if watching else LONGEST_SETTLE_SECONDS)
            inotify.settle()

    def _watch(self, path: Path, inotify: Inotify) -> bool:
        names: defaultdict[Path, set[str]] = defaultdict(set)
        try:
            for folder, name in way_to(path):
                names[folder].add(name)
            inotify.watch(names)
        except OSError as error:  # something vanished while we looked, or the kernel grants no more watches
            log.warning("the configuration file cannot be followed; trying again", file=str(path), error=str(error))
            return False
        return True

    def _says_something_else(self) -> bool:
        """Whether the file asks for something else that can be had. What is wrong with it is told once."""
        try:
            differs = self._differs()
            problems: tuple[str, ...] = ()
        except ConfigError as error:
            problems = error.problems
        except (ApiConfigError, ManifestError, SysctlError, UnsupportedError, OSError) as error:
            problems = (str(error),)
        except Exception as error:  # whatever it is, what the file says next may be in order
            log.debug("unexpected", exc_info=error)
            problems = (f"{type(error).__name__}: {error}",)
        if problems and problems != self._problems:
            log.error(
                "the configuration file has changed and cannot be used; what it said before stays in force",
                problems=problems,
            )
        elif self._problems and not problems:
            log.info("the configuration file is in order again")
        self._problems = problems
        self._rejected(bool(problems))
        return not problems and differs

    def _differs(self) -> bool:
        """Raises what a start with the file as it is now would raise: all is tried before anything is written."""
        wanted = parse(self._argv)
        if _meaning(wanted) == _meaning(self._running):
            return False
        api_connection(wanted)
        _, opened = open_mode(wanted, supported_families(), writes=True)
        try:
            initialise(wanted.configuration, opened.settings())
        finally:
            opened.close()
        return True


def _meaning(invocation: Invocation) -> tuple[object, ...]:
    return invocation.configuration, invocation.settings
