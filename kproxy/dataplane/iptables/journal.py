"""Tells our own writes from those of others, without looking at any rule.

The kernel numbers the generations of nf_tables. Legacy tables have no such number, but it says for nothing how many
entries a table has, how many bytes, and where its built-in chains begin (IPT_SO_GET_INFO).
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.restore import TABLES
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.dataplane.nftables.nfnetlink import Msg, NetlinkSocket, Nfproto, parsed
from kproxy.model import Family

_GENERATION = 1  # NFTA_GEN_ID
_GET_INFO = 64  # IPT_SO_GET_INFO, IP6T_SO_GET_INFO
_INFO_BYTES = 84  # struct ipt_getinfo: name, hooks, where each begins and ends, number of entries, bytes
_LIBC = ctypes.CDLL(None, use_errno=True)
_SOCKET = {Family.IPv4: (socket.AF_INET, socket.IPPROTO_IP), Family.IPv6: (socket.AF_INET6, socket.IPPROTO_IPV6)}
_REMEMBERED = 1024

Shape = tuple[bytes, ...]


class Span(NamedTuple):
    """The generations that came while we wrote: those after `start`, up to `end`."""

    start: int
    end: int
    alone: bool  # nobody else's was among them


class Journal:
    """What became of the kernel in our writes. Made in the network namespace that it is about."""

    def __init__(self, variant: Variant, families: Sequence[Family]) -> None:
        self.lock = threading.Lock()  # held while we write
        self.writes = 0
        self.shape: Shape = ()  # of the legacy tables, after our last write or look
        self.disturbed = False  # somebody wrote before one of our writes
        self.holds: Counter[Family] = Counter()  # the legacy tables, if only we wrote since they were read (digest.py)
        self._variant = variant
        self._families = families
        self._spans: deque[Span] = deque(maxlen=_REMEMBERED)
        self._commits = 0
        self.read_at = 0  # the generation of nf_tables when it was last read

    def wrote(self, commits: int) -> None:
        """So many commits went in."""
        self._commits += commits

    def reads(self) -> None:
        """What others did until now is about to be seen."""
        with self.lock:
            self.read_at = self._now()
            if self._variant is Variant.LEGACY and not self.writes:
                self.shape = legacy_shape(self._families)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever happens in this block is our doing."""
        with self.lock:
            self._commits = 0
            start = self._now()
            shape = legacy_shape(self._families) if self._variant is Variant.LEGACY else ()
            if self.writes and shape != self.shape:
                self.disturbed = True
            try:
                yield
            finally:
                end = self._now()
                if end != start:
                    self._spans.append(Span(start, end, end - start <= self._commits))
                self.writes += 1
                if self._variant is Variant.LEGACY:
                    self.shape = legacy_shape(self._families)

    def _now(self) -> int:
        if self._variant is Variant.LEGACY:
            return 0
        with closing(NetlinkSocket()) as netlink:
            return generation(netlink)

    def are_ours(self, after: int, until: int) -> bool:
        """Whether the generations of nf_tables in between are the work of our writes alone. The lock must be held."""
        for span in self._spans:
            if span.alone and span.start <= after < span.end:
                after = span.end
        return after >= until


def generation(netlink: NetlinkSocket) -> int:
    """How many times nf_tables has been changed in the socket's network namespace. Raises OSError."""
    return int.from_bytes(parsed(netlink.get(Msg.GETGEN, Nfproto.UNSPEC).attributes)[_GENERATION], "big")


def legacy_shape(families: Sequence[Family]) -> Shape:
    """How large the legacy tables are. Does not make those that are not there. Raises OSError."""
    found = []
    for family in families:
        domain, level = _SOCKET[family]
        present = legacy_tables(family)
        if not present:
            continue
        with socket.socket(domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            found += [_info(raw, level, table) for table in TABLES if table in present]
    return tuple(found)


def _info(raw: socket.socket, level: int, table: str) -> bytes:
    # Python's getsockopt takes no argument for the kernel to read, and here it is the table's name.
    answer = ctypes.create_string_buffer(table.encode(), _INFO_BYTES)
    length = ctypes.c_uint(_INFO_BYTES)
    if _LIBC.getsockopt(raw.fileno(), level, _GET_INFO, answer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, f"IPT_SO_GET_INFO of table {table}: {os.strerror(number)}")
    return answer.raw
