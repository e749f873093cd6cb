"""Connections that must not fail while proxies change: lasting ones, and a stream of new ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from tests.lab.host import Host
from tests.lab.traffic import Stream
from tests.lab.waiting import eventually

_REQUEST = b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"
_PATIENCE = 3.0  # seconds for an answer


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
    too, if its first packet is lost: that is sent again after a second, when the stream has given up.
    """

    def __init__(self, ways: Sequence[Way], lasting: int) -> None:
        self.ways = ways
        self._closing = ExitStack()
        self._lasting = [
            (way, _Lasting(self._closing.enter_context(way.client.connect(way.address, way.port))))
            for way in ways
            for _ in range(lasting)
        ]
        self.streams = [Stream(way.client, way.url) for way in ways]
        self.failures: list[str] = []
        self.rounds = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="lasting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        for stream in self.streams:
            self._closing.enter_context(stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._closing.close()
        self.failures += [f"{s}" for stream in self.streams for s in stream.failures]

    @property
    def connections(self) -> int:
        """How many new connections have been answered."""
        return sum(stream.connections for stream in self.streams)

    def more(self, connections: int, rounds: int = 2) -> None:
        """Wait until each way has so many more connections, and the lasting ones have all spoken so many times more."""
        goals = [(stream, stream.connections + connections) for stream in self.streams]
        goal = self.rounds + rounds

        def reached() -> bool:
            streams = all(stream.connections >= wanted or stream.failures for stream, wanted in goals)
            return streams and (self.rounds >= goal or bool(self.failures))

        eventually(reached, f"{connections} more connections on each way", seconds=30)

    def _speak(self) -> None:
        while not self._over.is_set():
            for way, lasting in self._lasting:
                if not lasting.failed and (trouble := lasting.speak()):
                    self.failures.append(f"a lasting connection of {way.client} to {way.url}: {trouble}")
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
            self._connection.sendall(_REQUEST)
            answer = self._connection.recv(4096).decode()
        except OSError as error:
            self.failed = True
            return repr(error)
        pod = next((line for line in answer.splitlines() if line.startswith("X-Pod")), "nobody")
        before, self._pod = self._pod or pod, pod
        return "" if before == pod else f"{before} has become {pod}"
