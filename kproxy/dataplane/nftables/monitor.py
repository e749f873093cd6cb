"""Notices that somebody else changed our tables: the netlink notifications of nf_tables, less our own."""

from __future__ import annotations

import socket
import struct
import sys
from array import array
from collections.abc import Collection

from kproxy.dataplane.nftables.listener import Listener, process_of
from kproxy.dataplane.nftables.nfnetlink import Msg, Received, parsed, string
from kproxy.dataplane.nftables.ruleset import TABLE_NAME

_SO_ATTACH_FILTER = 26

# Classic BPF (linux/bpf_common.h): load a word, jump if equal, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("HP")  # struct sock_fprog
_PORT_OFFSET = 12  # of nlmsg_pid: in a notification, the port of who made the change
_PASS, _DROP = 0xFFFFFFFF, 0  # how many bytes of a notification to deliver


class Monitor(Listener):
    """Watches our tables in the network namespace of the thread that creates it.

    Changes that come from `own_ports` never reach it: the kernel drops their notifications, however many they are.
    """

    def __init__(self, own_ports: Collection[int]) -> None:
        self._own_ports = own_ports
        self._touched = False
        super().__init__()

    def _prepare(self, listening: socket.socket) -> None:
        _drop_changes_of(self._own_ports, listening)

    def _heard(self, received: Received) -> str:
        if received.type != Msg.NEWGEN:
            self._touched |= received.attributes.startswith(_OUR_TABLE)
            return ""
        touched, self._touched = self._touched, False
        return process_of(parsed(received.attributes)) if touched else ""

    def _lost(self) -> bool:
        self._touched = False
        return True


_OUR_TABLE = string(1, TABLE_NAME)  # the table comes first in notifications of every kind


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
