"""Connections that must not fail while proxies change: lasting ones, and a stream of new ones."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from tests.lab.host import Host
from tests.lab.waiting import eventually

_REQUEST = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"
_PATIENCE = 3.0  # seconds for an answer on a lasting connection
_LOST = 0.9  # seconds; a first packet that got lost is sent again after one
_AT_ONCE = struct.pack("ii", 1, 0)


class Way(NamedTuple):
    """From a client to a frontend."""

    client: Host
    address: str
    port: int

    @property
    def url(self) -> str:
        """The frontend's URL."""
        return f"http://[{self.address}]:{self.port}/" if ":" in self.address else f"http://{self.address}:{self.port}/"


class Traffic:
    """On each way `lasting` connections that speak in turn, and a stream of new ones; a context manager.

    Afterwards `failures` tells each connection that failed or was answered by another pod than before. A new one fails,
    too, if its first packet was lost. `every`: seconds from one new connection of a way to the next, if it is done by
    then; the least leaves the processor to the others.
    """

    def __init__(self, ways: Sequence[Way], lasting: int, *, every: float = 0.001) -> None:
        self._closing = ExitStack()
        self._lasting = [
            (way, _Lasting(self._closing.enter_context(way.client.connect(way.address, way.port))))
            for way in ways
            for _ in range(lasting)
        ]
        self._over = threading.Event()
        self._lasting_failures: list[str] = []
        self.streams = [_Stream(way, self._over, every) for way in ways]
        self.rounds = 0
        self._threads = [threading.Thread(target=stream.run, name="stream", daemon=True) for stream in self.streams]
        self._threads.append(threading.Thread(target=self._speak, name="lasting", daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._closing.close()

    @property
    def failures(self) -> list[str]:
        """What went wrong."""
        return self._lasting_failures + [failure for stream in self.streams for failure in stream.failures]

    @property
    def connections(self) -> int:
        """How many new connections have been answered."""
        return sum(stream.answers.total() for stream in self.streams)

    def more(self, connections: int, rounds: int = 2) -> None:
        """Wait until each way has so many more connections, and the lasting ones have all spoken so many times more."""
        goals = [(stream, stream.answers.total() + connections) for stream in self.streams]
        goal = self.rounds + rounds

        def reached() -> bool:
            spoken = self.rounds >= goal and all(stream.answers.total() >= wanted for stream, wanted in goals)
            return spoken or bool(self.failures)

        eventually(reached, f"{connections} more connections on each way", seconds=30)

    def _speak(self) -> None:
        while not self._over.is_set():
            for way, lasting in self._lasting:
                if not lasting.failed and (trouble := lasting.speak()):
                    self._lasting_failures.append(f"a lasting connection of {way.client} to {way.url}: {trouble}")
            self.rounds += 1
            self._over.wait(0.02)


class _Lasting:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pod = ""
        self.failed = False
        connection.settimeout(_PATIENCE)

    def speak(self) -> str:
        """Exchange a few bytes; what went wrong, if anything."""
        try:
            pod = _ask(self._connection)
        except OSError as error:
            self.failed = True
            return repr(error)
        before, self._pod = self._pod or pod, pod
        return "" if before == pod else f"{before} has become {pod}"


class _Stream:
    def __init__(self, way: Way, over: threading.Event, every: float) -> None:
        self._way, self._over, self._every = way, over, every
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        """New connections, one after the other."""
        while not self._over.is_set():
            begin = time.monotonic()
            try:
                pod = self._connect_and_ask()
            except OSError as error:
                self.failures.append(f"a connection of {self._way.client} to {self._way.url}: {error!r}")
                self._over.wait(0.01)  # a refusal comes at once; do not spin on it
            else:
                self.answers[pod] += 1
            self._over.wait(self._every - (time.monotonic() - begin))

    def _connect_and_ask(self) -> str:
        with self._way.client.connect(self._way.address, self._way.port, timeout=_LOST) as connection:
            # With a reset nobody is left to remember the connection: where a pod does, and masquerading gives the same
            # port to another connection, that one has a false start.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            connection.settimeout(_PATIENCE)
            return _ask(connection)


def _ask(connection: socket.socket) -> str:
    """The pod that answers. Raises OSError."""
    connection.sendall(_REQUEST)
    answer = connection.recv(4096).decode()
    found = [line.partition(" ")[2] for line in answer.splitlines() if line.startswith("X-Pod: ")]
    if not found:
        raise ConnectionError(f"no answer, but {answer!r}")
    return found[0]
