"""Keeps an eye on our part of the kernel, as long as somebody else could change it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.monitor import Monitor
from kproxy.proxy import Observer
from kproxy.reconcile import SyncReport


class Guarded(Observer):
    """Watches the tables while they are not ours alone; `touched` is told who changed them, from another thread.

    While anyone on the machine listens, the kernel makes a message of every element that is written (about 20 µs), so
    there is no watch during a first load, and none once the tables are owned.
    """

    def __init__(self, kernel: NftablesKernel, touched: Callable[[str], None]) -> None:
        self._kernel = kernel
        self._touched = touched
        self._monitor: Monitor | None = None
        self._protected = False

    def start(self) -> None:
        """Begin, if there is something to watch already. Raises OSError."""
        if self._kernel.tables():
            self._watch()

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - of the protocol
        """See `kproxy.proxy.Observer`."""
        if self._protected or (self._monitor and not report.changes):
            return
        self._protected = self._kernel.protected()
        if not self._protected and self._monitor is None:
            self._watch()
        elif self._protected and self._monitor:
            self._monitor.stop()

    def _watch(self) -> None:
        self._monitor = monitor = Monitor([self._kernel.port])

        def follow() -> None:
            with monitor:
                for who in monitor.touches():
                    self._touched(who)

        threading.Thread(target=follow, name="kernel-watch", daemon=True).start()
