"""Notices that somebody else changed our tables: the netlink notifications of nf_tables, less our own."""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
from array import array
from collections.abc import Collection, Iterator
from typing import Self

from kproxy.dataplane.nftables.nfnetlink import NETLINK_NETFILTER, Msg, messages, parsed, string, text
from kproxy.dataplane.nftables.ruleset import TABLE_NAME

_GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_ATTACH_FILTER = 26
_RECEIVE_SIZE = 1 << 17
_GENERATION_PROCESS_ID, _GENERATION_PROCESS_NAME = 2, 3

# Classic BPF (linux/bpf_common.h): load a word, jump if equal, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("HP")  # struct sock_fprog
_PORT_OFFSET = 12  # of nlmsg_pid: in a notification, the port of who made the change
_PASS, _DROP = 0xFFFFFFFF, 0  # how many bytes of a notification to deliver


class Monitor:
    """Watches our tables in the network namespace of the thread that creates it.

    Changes that come from `own_ports` never reach it: the kernel drops their notifications, however many they are.
    """

    def __init__(self, own_ports: Collection[int]) -> None:
        self._stopped, self._stopper = socket.socketpair()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._touched = False
        try:
            _drop_changes_of(own_ports, self._socket)
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _GROUP_NFTABLES)
            self._socket.setblocking(False)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the sockets; `touches` must have ended."""
        for used in (self._socket, self._stopped, self._stopper):
            used.close()

    def stop(self) -> None:
        """End `touches` from any thread."""
        try:
            self._stopper.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended and is closed
            pass

    def touches(self) -> Iterator[str]:
        """Wait for foreign changes of our tables; who made them, as far as that is known. Ends on `stop`."""
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stopped.fileno() in ready:
                return
            if who := self._drain():
                yield ", ".join(who)

    def _drain(self) -> list[str]:
        """Who changed our tables."""
        who: dict[str, None] = {}
        while True:
            try:
                datagram = self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                return list(who)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._touched = False
                who["somebody (more notifications than could be received)"] = None
                continue
            for received in messages(datagram):
                if received.type != Msg.NEWGEN:
                    self._touched |= received.attributes.startswith(_OUR_TABLE)
                elif self._touched:  # a transaction's own notification comes last
                    self._touched = False
                    who[_process(received.attributes)] = None


_OUR_TABLE = string(1, TABLE_NAME)  # the table comes first in notifications of every kind


def _process(attributes: bytes) -> str:
    members = parsed(attributes)
    name = text(members.get(_GENERATION_PROCESS_NAME, b"")) or "a process"
    return f"{name} (process {int.from_bytes(members.get(_GENERATION_PROCESS_ID, b''), 'big')})"


def _drop_changes_of(ports: Collection[int], watcher: socket.socket) -> None:
    """Attach a filter that lets notifications pass unless one of the ports made the change."""
    program = [_INSTRUCTION.pack(_LOAD, 0, 0, _PORT_OFFSET)]
    for remaining, port in zip(range(len(ports), 0, -1), ports, strict=True):
        # The filter loads big-endian, while netlink headers are in host order.
        swapped = int.from_bytes(port.to_bytes(4, sys.byteorder), "big")
        program.append(_INSTRUCTION.pack(_JUMP_IF_EQUAL, remaining, 0, swapped))
    program.append(_INSTRUCTION.pack(_RETURN, 0, 0, _PASS))
    program.append(_INSTRUCTION.pack(_RETURN, 0, 0, _DROP))
    code = array("B", b"".join(program))
    address, _ = code.buffer_info()
    watcher.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(len(program), address))
