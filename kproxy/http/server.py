"""One thread that serves every HTTP socket of the proxy.

The thread waits for all listening sockets and connections at once and never for one client: a connection that does
not send its request or take its answer costs a descriptor until its deadline, and nobody else any time. Handlers
run on this thread and must be quick; what is slow (a scrape) they return as a callable, which runs in one thread of
its own, one after the other. Nothing wakes up while nobody asks.
"""

from __future__ import annotations

import errno
import math
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from queue import SimpleQueue
from typing import TypeVar

import msgspec
import structlog

from kproxy.http.address import ListenAddress, bind
from kproxy.http.message import (
    BadRequestError,
    Handler,
    Head,
    Request,
    Response,
    encode,
    end_of_head,
    parse_head,
    text,
)

RETRY_SECONDS = 5.0  # between attempts to bind (reference: 6.1, 7.2)
REQUEST_SECONDS = 10.0  # to send a request, once it has begun
WRITE_SECONDS = 30.0  # to take an answer
IDLE_SECONDS = 180.0  # between two requests of a connection; above the usual scrape intervals
LINGER_SECONDS = 2.0  # for a client to read the answer to a request that was not read to its end
MAX_CONNECTIONS = 256  # a further one replaces the one that has been waiting longest

_RECEIVE = 64 << 10

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class Listener:
    """A listening socket. Closing it ends its connections too."""

    def __init__(self, server: HttpServer, sock: socket.socket, handler: Handler) -> None:
        self._server = server
        self.sock = sock
        self.handler = handler
        host, port = sock.getsockname()[:2]
        self.address = ListenAddress(host, port)

    def close(self) -> None:
        """Stop listening. The port is free when this returns."""
        self._server.close_listener(self)


class _Phase(Enum):
    READING = selectors.EVENT_READ
    WORKING = 0
    WRITING = selectors.EVENT_WRITE
    LINGERING = -1


class _Connection:
    def __init__(self, sock: socket.socket, listener: Listener, now: float) -> None:
        self.sock = sock
        self.listener = listener
        self.enter(_Phase.READING, now, REQUEST_SECONDS)
        self.watched = 0
        self.received = bytearray()
        self.head: Head | None = None
        self.unsent = memoryview(b"")
        self.keep_alive = False

    def enter(self, phase: _Phase, now: float, patience: float) -> None:
        """Begin a phase that may last `patience` seconds."""
        self.phase = phase
        self.since = now
        self.deadline = now + patience


class HttpServer:
    """Serves until `close()`. All methods may be called from any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._wakened, self._waker = socket.socketpair()
        self._wakened.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._connections: set[_Connection] = set()
        self._listeners: set[Listener] = set()
        self._retries: list[tuple[float, Callable[[], None]]] = []
        self._lock = threading.Lock()  # guards the two below
        self._calls: list[Callable[[], None]] = []
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: no more
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()
        threading.Thread(target=self._run_work, name="http-work", daemon=True).start()

    def listen(self, address: ListenAddress, handler: Handler) -> Listener:
        """Serve `handler` on an address. Raises OSError if it cannot be bound."""
        return self._in_thread(lambda: self._listen(address, handler))

    def listen_or_retry(self, address: ListenAddress, handler: Handler, failed: Callable[[OSError], None]) -> None:
        """Serve `handler` on an address as soon as it can be bound; `failed` hears of every failed attempt."""

        def attempt() -> None:
            try:
                self._listen(address, handler)
            except OSError as error:
                self._retries.append((self._clock() + RETRY_SECONDS, attempt))
                failed(error)

        self._in_thread(attempt)

    def close_listener(self, listener: Listener) -> None:
        """See `Listener.close`."""
        self._in_thread(lambda: self._close_listener(listener))

    def close(self) -> None:
        """Close all sockets and end the thread. Work that is under way is left to itself."""
        with self._lock:
            self._closed = True
        self.wake()
        self._thread.join()
        self._work.put(None)

    def wake(self) -> None:
        """Have the thread look at the clock and its calls now."""
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full: it wakes anyway; closed: nothing is left to wake

    def _in_thread(self, function: Callable[[], _T]) -> _T:
        """Run a function between two rounds of the loop, so that sockets and lists have one owner."""
        if threading.current_thread() is self._thread:
            return function()
        future: Future[_T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - raised in the thread that asked
                future.set_exception(error)

        if not self._post(call):
            raise OSError(errno.ESHUTDOWN, "the HTTP server is closed")
        return future.result()

    def _post(self, call: Callable[[], None]) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._calls.append(call)
        self.wake()
        return True

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._patience()):
                match key.data:
                    case Listener() as listener:
                        self._accept(listener)
                    case _Connection() as connection if connection in self._connections:
                        self._advance(connection)
                    case None:
                        self._wakened.recv(4096)
            with self._lock:
                calls, self._calls = self._calls, []
                closed = self._closed
            for call in calls:
                call()
            if closed:
                break
            self._expire()
        for listener in tuple(self._listeners):
            self._close_listener(listener)
        self._selector.close()
        self._wakened.close()
        self._waker.close()

    def _patience(self) -> float | None:
        """Seconds until something is due; None: nothing is."""
        due = min(
            min((connection.deadline for connection in self._connections), default=math.inf),
            min((at for at, _ in self._retries), default=math.inf),
        )
        return None if due == math.inf else max(0.0, due - self._clock())

    def _expire(self) -> None:
        now = self._clock()
        for connection in [connection for connection in self._connections if connection.deadline <= now]:
            self._drop(connection)
        due = [attempt for at, attempt in self._retries if at <= now]
        self._retries = [(at, attempt) for at, attempt in self._retries if at > now]
        for attempt in due:
            try:
                attempt()
            except Exception:  # of the caller's callback: the probes of the other addresses must go on
                log.exception("reporting a failed bind failed")

    def _listen(self, address: ListenAddress, handler: Handler) -> Listener:
        sock = bind(address)
        sock.setblocking(False)
        listener = Listener(self, sock, handler)
        self._listeners.add(listener)
        self._selector.register(sock, selectors.EVENT_READ, listener)
        return listener

    def _close_listener(self, listener: Listener) -> None:
        if listener not in self._listeners:
            return
        self._listeners.remove(listener)
        self._selector.unregister(listener.sock)
        listener.sock.close()
        for connection in [connection for connection in self._connections if connection.listener is listener]:
            self._drop(connection)

    def _accept(self, listener: Listener) -> None:
        for _ in range(MAX_CONNECTIONS):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("cannot accept an HTTP connection", address=str(listener.address), error=str(error))
                if not self._make_room():
                    time.sleep(0.1)  # descriptors are used up elsewhere and nobody is being served: do not spin
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                self._make_room()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock, listener, self._clock())
            self._connections.add(connection)
            self._watch(connection)

    def _make_room(self) -> bool:
        """Drop the connection that has kept us waiting longest; False if there is none."""
        waiting = [connection for connection in self._connections if connection.phase is not _Phase.WORKING]
        if not waiting:
            return False
        self._drop(min(waiting, key=lambda connection: connection.since))
        return True

    def _drop(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection.watched:
            self._selector.unregister(connection.sock)
        connection.sock.close()

    def _watch(self, connection: _Connection) -> None:
        """Wait for what the connection's phase needs."""
        events = abs(connection.phase.value)
        if events == connection.watched:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.watched:
            self._selector.modify(connection.sock, events, connection)
        else:
            self._selector.register(connection.sock, events, connection)
        connection.watched = events

    def _advance(self, connection: _Connection) -> None:
        """The socket is ready for what the connection waits for."""
        try:
            if connection.phase in (_Phase.READING, _Phase.LINGERING):
                data = connection.sock.recv(_RECEIVE)
                if not data:
                    self._drop(connection)
                    return
                if connection.phase is _Phase.LINGERING:
                    return
                if not connection.received and connection.head is None:
                    connection.enter(_Phase.READING, self._clock(), REQUEST_SECONDS)
                connection.received += data
            self._progress(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    def _progress(self, connection: _Connection) -> None:
        """Take the connection as far as it gets without waiting. Raises OSError if the client has gone."""
        while True:
            match connection.phase:
                case _Phase.READING:
                    going_on = self._take_request(connection)
                case _Phase.WRITING:
                    going_on = self._write(connection)
                case _:
                    going_on = False
            if not going_on:
                break
        if connection in self._connections:
            self._watch(connection)

    def _take_request(self, connection: _Connection) -> bool:
        """Answer the next request; False if it has not arrived in full or is being worked on."""
        received = connection.received
        try:
            if connection.head is None:
                while received and received[0] in b"\r\n":  # RFC 9112, 2.2: empty lines before a request are skipped
                    del received[:1]
                if not (end := end_of_head(received)):
                    return False
                connection.head = parse_head(bytes(received[:end]))
                del received[:end]
        except BadRequestError as error:
            self._answer(connection, error.response)
            return True
        head = connection.head
        if len(received) < head.body_length:
            return False
        body = bytes(received[: head.body_length])
        del received[: head.body_length]
        request = msgspec.structs.replace(head.request, body=body)
        answer = _guarded(lambda: connection.listener.handler(request), request)
        if isinstance(answer, Response):
            self._answer(connection, answer)
            return True
        work = answer
        connection.enter(_Phase.WORKING, self._clock(), math.inf)
        self._work.put(lambda: self._work_done(connection, _guarded(work, request)))
        return False

    def _run_work(self) -> None:
        while work := self._work.get():
            work()

    def _work_done(self, connection: _Connection, response: Response) -> None:
        """Hand the result of slow work back to the server's thread."""

        def deliver() -> None:
            if connection not in self._connections:
                return  # its listener was closed meanwhile
            try:
                self._answer(connection, response)
                self._progress(connection)
            except OSError:
                self._drop(connection)

        self._post(deliver)

    def _answer(self, connection: _Connection, response: Response) -> None:
        head, connection.head = connection.head, None
        if head is None:  # the request could not be parsed
            data, connection.keep_alive = encode(response), False
        else:
            connection.keep_alive = head.keep_alive
            data = encode(
                response, version=head.version, keep_alive=head.keep_alive, body=head.request.method != "HEAD"
            )
        connection.unsent = memoryview(data)
        connection.enter(_Phase.WRITING, self._clock(), WRITE_SECONDS)

    def _write(self, connection: _Connection) -> bool:
        """Send what the socket takes; True once everything is sent and the next request may follow."""
        while connection.unsent:
            try:
                sent = connection.sock.send(connection.unsent)
            except BlockingIOError:
                return False
            connection.unsent = connection.unsent[sent:]
        now = self._clock()
        if connection.keep_alive:
            connection.enter(_Phase.READING, now, REQUEST_SECONDS if connection.received else IDLE_SECONDS)
            return True
        # Closing with unread bytes would reset the connection, and the client could lose the answer.
        connection.enter(_Phase.LINGERING, now, LINGER_SECONDS)
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        return False


def _guarded(function: Callable[[], _T], request: Request) -> _T | Response:
    try:
        return function()
    except Exception:  # a fault in one answer must not end the thread that gives all of them
        log.exception("an HTTP handler failed", method=request.method, path=request.path)
        return text(500, "500 Internal Server Error: see the log\n")
