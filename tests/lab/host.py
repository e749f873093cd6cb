"""A host of the cluster lab: a network namespace, and what a program in it can do on the network."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.lab.namespaces import Namespace

TIMEOUT_SECONDS = 3.0


class Answer(NamedTuple):
    """What an HTTP server said, and who it was if it is a pod."""

    status: int
    text: str
    pod: str
    client: str  # the client's address as the pod saw it
    seconds: float
    headers: dict[str, str]


class Host:
    """A network namespace with a name; `ipv4` and `ipv6` are its addresses, "" where it has none."""

    def __init__(self, name: str, ipv4: str = "", ipv6: str = "") -> None:
        self.name, self.ipv4, self.ipv6 = name, ipv4, ipv6
        self.namespace = Namespace()
        self.sysctls({"net/ipv6/conf/default/accept_dad": 0})  # addresses are ours alone: use them at once

    def __str__(self) -> str:
        return self.name

    def close(self) -> None:
        """Leave the namespace, so that it goes."""
        self.namespace.close()

    def exec(self, *command: str, check: bool = True) -> str:
        """Run a command and return what it printed. Raises CommandError if it fails, unless `check` is off."""
        return self.namespace.command(*command, check=check).stdout

    def sysctls(self, values: dict[str, int]) -> None:
        """Write sysctls of the namespace, given by their paths below /proc/sys."""
        for name, value in values.items():
            self.namespace.sysctl(name, value)

    def configure(self, *commands: str) -> None:
        """Run `ip` commands, all in one process."""
        self.namespace.command("ip", "-batch", "-", stdin="\n".join(commands) + "\n")

    def socket(self, address: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this host for peers of the address's family."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return self.namespace.run(socket.socket, family, kind)

    def connect(self, address: str, port: int, *, timeout: float = TIMEOUT_SECONDS) -> socket.socket:
        """A TCP connection. Raises OSError: refused, unreachable, timed out."""
        connection = self.socket(address)
        try:
            connection.settimeout(timeout)
            connection.connect((address, port))
            _make_sure_of(connection, time.monotonic() + timeout)
        except OSError:
            connection.close()
            raise
        return connection

    def get(self, url: str, *, timeout: float = TIMEOUT_SECONDS) -> Answer:
        """GET a URL over a connection of its own. Raises OSError, or http.client.HTTPException for a broken answer."""
        parts = urlsplit(url)
        address, port = parts.hostname or "", parts.port or 80
        begin = time.monotonic()
        connection = http.client.HTTPConnection(address, port)
        connection.sock = self.connect(address, port, timeout=timeout)
        try:
            connection.request("GET", parts.path or "/", headers={"Connection": "close"})
            with connection.getresponse() as response:
                text = response.read().decode()
            headers = dict(response.headers)
        finally:
            connection.close()
        seconds = time.monotonic() - begin
        return Answer(response.status, text, headers.get("X-Pod", ""), headers.get("X-Client", ""), seconds, headers)

    def open_udp(self, address: str, port: int, *, source_port: int = 0, timeout: float = 1.0) -> socket.socket:
        """A UDP socket connected to a peer, with a source port of one's choice."""
        talk = self.socket(address, socket.SOCK_DGRAM)
        talk.settimeout(timeout)
        talk.bind(("::" if ":" in address else "0.0.0.0", source_port))
        talk.connect((address, port))
        return talk


def _make_sure_of(connection: socket.socket, deadline: float) -> None:
    """Raise the OSError with which connecting failed, if it did.

    An ICMP error wakes a client a moment before the socket tells the error, and `connect` takes that for a success.
    """
    while True:
        try:
            connection.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        else:
            return
        if failure := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(failure, os.strerror(failure))
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.001)
