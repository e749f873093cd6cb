"""A port of this machine that leads into the lab, as docker's port mappings lead into a node."""

from __future__ import annotations

import socket
import threading
from typing import Self

from tests.lab.host import Host


class Forwarder:
    """Takes connections on the loopback device, one after the other, to an address that a host of the lab reaches."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self._host, self._target = host, (address, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="forwarder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self._forward(client)

    def _forward(self, client: socket.socket) -> None:
        """One request and its answer; the server closes."""
        try:
            with self._host.connect(*self._target) as server:
                server.sendall(client.recv(65536))
                while received := server.recv(65536):
                    client.sendall(received)
        except OSError:
            pass  # the client sees its connection end
