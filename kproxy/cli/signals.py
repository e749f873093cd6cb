"""The signals that end kproxy: before a proxy runs, and while it starts itself anew."""

from __future__ import annotations

import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """Have signals end this process from now on; those that were held back do it now.

    By default nothing would end the first process of a container: it gets no signal that it does not handle.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def hold_back() -> None:
    """Have signals wait for the program that this process is about to become.

    Where another thread gets one nevertheless, it ends the process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)
