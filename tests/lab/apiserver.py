"""A stand-in for the Kubernetes API server: real HTTP list and watch over objects in memory, with faults on demand.

As a library it lives in threads of the test's process: `with ApiServer() as api: api.put({...})`. As a process of its
own, for measurements: `python -m tests.lab.apiserver --port 8080 --generate 10000 --endpoints 10`.
"""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Self

from tests.lab.apiserver_faults import Faults
from tests.lab.apiserver_http import Handler
from tests.lab.apiserver_load import generated
from tests.lab.apiserver_store import BY_KIND, Key, Object, Resource, Store

_STOP_SECONDS = 5.0


class Request(NamedTuple):
    """A request that the server has seen."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class ApiServer:
    """An API server on an address of the network namespace in which `start` and `up` are called.

    Port 0 takes a free one and keeps it over `down` and `up`. `tokens` None lets everybody in. `listen` opens the
    socket (the cluster lab opens it inside a namespace). All methods are thread-safe.

    Attributes that a test may change at any time: `tokens`; `selectors` (False: ignore them, as a poor server does);
    `stream_lists` ("serve", "ignore" as servers without the feature, "refuse" with 422); `bookmark_seconds`; `faults`.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        tokens: set[str] | None = None,
        tls: ssl.SSLContext | None = None,
        bookmark_seconds: float = 60.0,
        listen: Callable[[str, int], socket.socket] | None = None,
    ) -> None:
        self.address, self.port = address, port
        self.tokens = tokens
        self.selectors = True
        self.stream_lists = "serve"
        self.bookmark_seconds = bookmark_seconds
        self.faults = Faults()
        self.store = Store()
        self.requests: list[Request] = []
        self.generation = 0  # of the listening socket; requests of an earlier one are over
        self.bookmarks_ordered = 0
        self._tls = tls
        self._listen = listen or _listen
        self._listener: socket.socket | None = None
        self._watches: Counter[str] = Counter()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def client_flags(self) -> list[str]:
        """The flags with which a proxy finds it."""
        return [f"--master={self.url}"]

    # The life of the server

    def up(self) -> None:
        """Listen, for the first time or again; what is stored has stayed."""
        self._listener = self._listen(self.address, self.port)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), name="apiserver", daemon=True).start()

    def down(self) -> None:
        """Refuse new connections and cut those that are open."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with self.store.changed:
            self.generation += 1
            self.store.changed.notify_all()
        _shut(listener)
        listener.close()
        with self._lock:
            open_connections = dict(self._connections)
        for connection in open_connections:
            _shut(connection)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in open_connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return  # down() has closed it
            thread = threading.Thread(target=self._serve, args=(connection, peer), name="apiserver-client", daemon=True)
            with self._lock:
                self._connections[connection] = thread
                if listener is not self._listener:
                    _shut(connection)  # accepted while the server went down
                thread.start()  # before down() can find and join it

    def _serve(self, connection: socket.socket, peer: object) -> None:
        talk = connection
        try:
            if self._tls:
                connection.settimeout(_STOP_SECONDS)  # a client that never speaks TLS
                talk = self._tls.wrap_socket(connection, server_side=True)
                talk.settimeout(None)
                with self._lock:  # the plain socket has handed its descriptor over
                    self._connections[talk] = self._connections.pop(connection)
            Handler(talk, peer, self)  # type: ignore[arg-type]
        except (ConnectionError, TimeoutError, ssl.SSLError):
            pass  # clients come and go, and faults are meant
        except Exception:  # noqa: BLE001  a defect here must show in the test's output
            traceback.print_exc()
        finally:
            with self._lock:
                self._connections.pop(talk, None)
            _shut(talk)
            talk.close()
            connection.close()

    # What tests and the lab do

    def put(self, new: Object) -> Object:
        """Create or replace an object, with whatever is in it; returns it as stored."""
        return self.store.put(BY_KIND[new["kind"]], new)

    def put_all(self, objects: Iterable[Object]) -> None:
        """Create or replace many."""
        for new in objects:
            self.put(new)

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """An object. Raises ApiError if there is none."""
        return self.store.get(BY_KIND[kind], _key(kind, name, namespace))

    def patch(self, kind: str, name: str, change: Object, namespace: str = "default") -> Object:
        """Merge a change into an object."""
        return self.store.patch(BY_KIND[kind], _key(kind, name, namespace), change)

    def delete(self, kind: str, name: str, namespace: str = "default") -> Object:
        """Remove an object; returns its last state. Raises ApiError if there is none."""
        return self.store.delete(BY_KIND[kind], _key(kind, name, namespace))

    def objects(self, kind: str) -> list[Object]:
        """All objects of a kind, by namespace and name. `objects("Event")` are the Events that clients wrote."""
        return self.store.objects(BY_KIND[kind])

    def compact(self) -> None:
        """Forget the history: later watches and pages from before now get 410. Running watches go on."""
        self.store.compact()

    def bookmark(self) -> None:
        """Send a bookmark on every watch that takes them, now."""
        with self.store.changed:
            self.bookmarks_ordered += 1
            self.store.changed.notify_all()

    def watching(self, plural: str) -> int:
        """How many watches of a resource are running."""
        with self._lock:
            return self._watches[plural]

    # What the request handlers use

    def note_request(self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str]) -> None:
        """Keep a request for the test to look at."""
        with self._lock:
            self.requests.append(Request(method, path, query, dict(headers)))

    @contextmanager
    def watch_of(self, resource: Resource) -> Iterator[None]:
        """Count a running watch."""
        with self._lock:
            self._watches[resource.plural] += 1
        try:
            yield
        finally:
            with self._lock:
                self._watches[resource.plural] -= 1

    def wait_for_mercy(self, given_up: Callable[[], bool], *, until_cleared: bool = True) -> None:
        """Keep a client waiting until the faults are cleared, the server goes down or the client has gone."""
        generation, cleared = self.generation, self.faults.cleared
        with self.store.changed:
            while self.generation == generation and not given_up():
                if until_cleared and self.faults.cleared != cleared:
                    return
                self.store.changed.wait(0.05)


def _key(kind: str, name: str, namespace: str) -> Key:
    return Key(namespace if BY_KIND[kind].namespaced else "", name)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=128)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was first


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.apiserver", description=__doc__)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="Services to begin with")
    parser.add_argument("--endpoints", type=int, default=10, metavar="M", help="endpoints of each")
    arguments = parser.parse_args()
    server = ApiServer(arguments.address, arguments.port)
    server.put_all(generated(arguments.generate, arguments.endpoints))
    gc.freeze()  # a collection over so many objects would show up in what is measured
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with server:
        print(f"listening on {server.url}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    sys.exit(0)


if __name__ == "__main__":
    main()
