"""The source that follows an API server: one thread a kind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kproxy.api.events import Event, Sink
from kproxy.api.resources import watched
from kproxy.api.watch import Pace, Watch

if TYPE_CHECKING:
    from kproxy.api.client import Connection

STOP_SECONDS = 1.0


class ApiServerSource:
    """Services, EndpointSlices, ServiceCIDRs and the own Node, as an API server has them.

    `stream` asks for lists by watching where the server can, instead of in pages.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        node_name: str,
        stream: bool = True,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        randomness: random.Random | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._sink: Sink | None = None
        self._threads: list[threading.Thread] = []
        self._watches = [
            Watch(
                connection,
                resource,
                self._deliver,
                stream=stream,
                pace=pace or Pace(),
                clock=clock,
                randomness=randomness,
            )
            for resource in watched(node_name)
        ]

    def start(self, sink: Sink) -> None:
        """Begin to deliver. `sink` is called by one thread at a time."""
        self._sink = sink
        for watch in self._watches:
            thread = threading.Thread(target=watch.run, name=f"watch-{watch.kind}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End the threads; no event comes after it returns.

        A thread that waits for a server to begin its answer cannot be woken. It is left behind after a second and
        ends with its request.
        """
        for watch in self._watches:
            watch.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._sink = None

    def _deliver(self, event: Event) -> None:
        with self._lock:
            if self._sink is not None:
                self._sink(event)
