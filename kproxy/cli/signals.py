"""The signals that end kproxy: before a proxy runs, while it does, and while it starts itself anew."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """Have signals end this process from now on; those that were held back do it now.

    By default nothing would end the first process of a container: it gets no signal that it does not handle.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def wake_by_signals(wake: Callable[[], None]) -> None:
    """Have a thread call `wake` at each signal that has a handler, now or later.

    Python's handlers wait for the main thread's next instruction. One that is about to wait, or that another thread got
    the signal instead of, has none before something else wakes it.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen(_: socket.socket) -> None:
        while heard.recv(1):
            wake()

    signal.set_wakeup_fd(told.fileno())
    threading.Thread(target=listen, args=(told,), name="signals", daemon=True).start()


def hold_back() -> None:
    """Have signals wait for the program that this process is about to become.

    One that another thread gets nevertheless ends the process, unless that is the first of a container.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)
