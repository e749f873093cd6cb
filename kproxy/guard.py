"""Keeps an eye on our part of the kernel, as long as somebody else could change it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from kproxy.modes.base import Mode, Watch
from kproxy.proxy import Observer
from kproxy.reconcile import SyncReport

log = structlog.get_logger(__name__)


class Guarded(Observer):
    """Watches while others could change what is ours; `touched` is told who did, from another thread.

    While anyone on the machine listens, the kernel makes a message of every nftables element that is written (about
    20 µs), so there is no watch during a first load.
    """

    def __init__(self, mode: Mode, touched: Callable[[str], None]) -> None:
        self._mode = mode
        self._touched = touched
        self._watch: Watch | None = None
        self._safe = False  # or not to be watched

    def start(self) -> None:
        """Begin, if there is something to watch already. Raises OSError."""
        if self._mode.is_exposed():
            self._begin()

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - of the protocol
        """See `kproxy.proxy.Observer`."""
        if self._safe or (self._watch and not report.changes):
            return
        self._safe = not self._mode.is_exposed()
        if not self._safe and self._watch is None:
            self._begin()
        elif self._safe and self._watch:
            self._watch.stop()

    def _begin(self) -> None:
        self._watch = watch = self._mode.watch()
        if watch is None:
            self._safe = True
            return

        def follow() -> None:
            try:
                for who in watch.touches():
                    self._touched(who)
            except (OSError, ValueError) as error:
                log.warning(
                    "our part of the kernel is not watched any more, only compared once an hour", error=str(error)
                )
            finally:
                watch.close()

        threading.Thread(target=follow, name="kernel-watch", daemon=True).start()
