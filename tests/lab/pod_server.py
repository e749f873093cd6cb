"""The program in a pod: answers HTTP over TCP, and datagrams, saying who it is and whom it sees."""

from __future__ import annotations

import selectors
import socket
import threading

_REQUEST_END = b"\r\n\r\n"


class PodServer:
    """One thread that serves sockets opened in the pod's namespace. Connections stay open unless the client says no.

    HTTP: the text as body, the pod's name and the client's address as headers `X-Pod` and `X-Client`.
    UDP: a datagram is answered with `<name> <client address>`.
    """

    def __init__(self, name: str, says: str, listeners: list[socket.socket], datagrams: list[socket.socket]) -> None:
        self._name, self._says = name, says
        self._selector = selectors.DefaultSelector()
        self._stop, stopped = socket.socketpair()
        self._selector.register(stopped, selectors.EVENT_READ, None)
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        for datagram in datagrams:
            self._selector.register(datagram, selectors.EVENT_READ, self._answer_datagram)
        self._received: dict[socket.socket, bytes] = {}
        self._thread = threading.Thread(target=self._serve, name=f"pod-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close every socket, as the end of a process does."""
        self._stop.close()
        self._thread.join()

    def _serve(self) -> None:
        running = True
        while running:
            for key, _ in self._selector.select():
                if key.data is None:
                    running = False
                    break
                try:
                    key.data(key.fileobj)
                except OSError:  # the client has gone
                    if key.data == self._answer_request:
                        self._hang_up(key.fileobj)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(1.0)  # a client that does not read must not stop the others for long
        self._received[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, self._answer_request)

    def _answer_request(self, connection: socket.socket) -> None:
        received = connection.recv(65536)
        self._received[connection] += received
        if not received:
            self._hang_up(connection)
        elif self._received[connection].endswith(_REQUEST_END):
            last = b"connection: close" in self._received[connection].lower()
            self._received[connection] = b""
            connection.sendall(self._response(connection.getpeername()))
            if last:
                self._hang_up(connection)

    def _response(self, peer: tuple[str, int]) -> bytes:
        body = f"{self._says}\n".encode()
        head = (
            "HTTP/1.1 200 OK",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            f"X-Pod: {self._name}",
            f"X-Client: {_plain(peer[0])}",
        )
        return "\r\n".join((*head, "", "")).encode() + body

    def _answer_datagram(self, datagram: socket.socket) -> None:
        _, peer = datagram.recvfrom(65536)
        datagram.sendto(f"{self._name} {_plain(peer[0])}".encode(), peer)

    def _hang_up(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._received.pop(connection, None)
        connection.close()


def _plain(address: str) -> str:
    """An IPv4 client of a dual-stack socket, as IPv4."""
    return address.removeprefix("::ffff:")
