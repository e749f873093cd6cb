"""Listens to what nf_tables tells of changes, whoever made them."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator
from typing import Self

from kproxy.dataplane.nftables.nfnetlink import NETLINK_NETFILTER, Received, messages, text

_GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
_RECEIVE_SIZE = 1 << 17
_PROCESS_ID, _PROCESS_NAME = 2, 3  # of a generation
SOMEBODY = "somebody"
_TOO_MANY = f"{SOMEBODY} (more notifications than could be received)"


class Stoppable:
    """Waits for something until another thread says `stop`."""

    def __init__(self) -> None:
        self._stopped, self._stopper = socket.socketpair()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; the waiting must have ended."""
        self._stopped.close()
        self._stopper.close()

    def stop(self) -> None:
        """End the waiting; from any thread."""
        try:
            self._stopper.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended and is closed
            pass


class Listener(Stoppable):
    """Hears the notifications of the network namespace of the thread that creates it. Raises OSError.

    `buffer`: bytes of notifications that may wait, as far as that is permitted; 0: as usual.
    """

    def __init__(self, buffer: int = 0) -> None:
        super().__init__()
        self._behind = False
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._prepare(self._socket)
            if buffer:
                try:
                    self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
                except PermissionError:  # in a user namespace; then more is lost, and looked after
                    pass
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _GROUP_NFTABLES)
            self._socket.setblocking(False)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Release the sockets; `touches` must have ended."""
        self._socket.close()
        super().close()

    def touches(self) -> Iterator[str]:
        """Wait for changes that matter; who made them, as far as that is known. Ends on `stop`. Raises OSError."""
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stopped.fileno() in ready:
                return
            if who := list(dict.fromkeys(self._drain())):
                yield ", ".join(who)

    def _drain(self) -> Iterator[str]:
        """Whom the waiting notifications name."""
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                if self._behind and self._lost():
                    yield _TOO_MANY
                self._behind = False
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Until everything that waits has been received, the kernel tells of no further loss.
                self._behind = True
                if self._lost():
                    yield _TOO_MANY
                continue
            for received in messages(datagram):
                if who := self._heard(received):
                    yield who

    def _prepare(self, listening: socket.socket) -> None:
        """Before anything is heard."""

    def _heard(self, received: Received) -> str:
        """Who is to be told of; empty if nobody. A transaction's own notification comes after those of what it did."""
        raise NotImplementedError

    def _lost(self) -> bool:
        """Some notifications were lost, or may have been since this was last asked: whether that is worth telling."""
        raise NotImplementedError


def process_of(generation: dict[int, bytes]) -> str:
    """Who made a transaction, by the members of its notification."""
    name = text(generation.get(_PROCESS_NAME, b"")) or "a process"
    return f"{name} (process {int.from_bytes(generation.get(_PROCESS_ID, b''), 'big')})"
