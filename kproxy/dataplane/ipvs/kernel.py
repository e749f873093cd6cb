"""The kernel side of ipvs mode: reads what it holds of ours, changes it, and looks after servers that drain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from kproxy.dataplane.base import Change, Entries
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import EXISTS
from kproxy.dataplane.ipvs import device, ipset, names, tables
from kproxy.dataplane.ipvs.addresses import usable
from kproxy.dataplane.ipvs.application import Application, connections_of
from kproxy.dataplane.ipvs.drain import DRAIN_SECONDS, Draining
from kproxy.dataplane.ipvs.entries import DeviceKey, RealServerKey, VirtualServerKey
from kproxy.dataplane.ipvs.ownership import Ownership
from kproxy.dataplane.ipvs.probe import Features, probe
from kproxy.dataplane.ipvs.servers import FoundRealServer, Servers
from kproxy.model import Family, Protocol
from kproxy.node_addresses import local_addresses


class IpvsKernel:
    """What is ours in the network namespace of the calling thread. Raises UnsupportedError and OSError.

    `excluded`: CIDRs whose virtual servers are left alone, but those of Services. `node_ports`: see `Ownership`.
    `drain_seconds`: how long a real server that is not wanted any more may keep its TCP connections; `clock` measures
    that.
    Reading, writing and draining may be asked of different threads.
    """

    def __init__(
        self,
        families: Sequence[Family],
        variant: Variant,
        *,
        excluded: Iterable[str] = (),
        node_ports: Mapping[Family, Sequence[str] | None] | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.families = tuple(families)
        self.variant = variant
        self._servers = Servers()
        self._ownership = Ownership(excluded, node_ports or {})
        self._draining = Draining(drain_seconds, clock)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the kernel; what is there stays in force, and servers that drain wait for the next process."""
        self._servers.close()

    def probe(self, scheduler: str) -> Features:
        """Try all that the mode needs, without making anything. Raises UnsupportedError and OSError."""
        with self._lock:
            return probe(self._servers, self.variant, self.families, scheduler)

    def set_timeouts(self, tcp: int, tcp_fin: int, udp: int) -> None:
        """Seconds after which IPVS forgets idle connections; 0 keeps what is set. Raises OSError."""
        if tcp or tcp_fin or udp:
            with self._lock:
                self._servers.set_timeouts(tcp, tcp_fin, udp)

    # --- reading ---

    def read(self) -> Entries:
        """What the kernel holds of ours. Changes nothing. Raises OSError.

        A real server that has weight 0 and TCP connections is not there as far as this is concerned: it is draining, if
        need be on behalf of a process that has ended. One that was given weight again, by whomever, drains no longer.
        """
        with self._lock:
            entries: Entries = {DeviceKey(): EXISTS} if device.index() else {}
            entries |= {key: EXISTS for key in device.addresses() if key.family in self.families}
            entries |= ipset.read(self.families)
            entries |= tables.read(self.variant, self.families)
            found = {server.key: server.value for server in self._servers.virtual_servers()}
            known = local_addresses(names.DEVICE)
            local = {address for family in self.families for address in usable(known, family)}
            candidates = [key for key in found if key.family in self.families]
            for key in self._ownership.ours(candidates, entries, local):
                entries[key] = found[key]
                for server in self._servers.real_servers(key):
                    if _is_draining(server):
                        self._draining.begin(server.key)
                    elif server.value.weight:
                        self._draining.end([server.key])
                    if server.key not in self._draining:
                        entries[server.key] = server.value
            return entries

    def connections(self) -> dict[VirtualServerKey | RealServerKey, int]:
        """How many connections each server has had since it was made; of those that others made, too.

        The kernel adds them up every two seconds. From any thread, over a socket of its own.
        Raises UnsupportedError and OSError.
        """
        counted: dict[VirtualServerKey | RealServerKey, int] = {}
        with Servers() as servers:
            for virtual in servers.virtual_servers():
                counted[virtual.key] = virtual.total
                counted |= {real.key: real.total for real in servers.real_servers(virtual.key)}
        return counted

    # --- writing ---

    def apply(self, changes: Iterable[Change]) -> None:
        """Make the changes. What new servers need comes before them, what old ones needed goes after them.

        Raises ApplyError. Where the kernel refuses something new, nothing of the changes is in force.
        """
        with self._lock:
            Application(self.variant, self._servers, self._ownership, self._draining).run(changes)

    # --- draining ---

    def due(self) -> float | None:
        """Seconds until `drain` should be called; None while nothing drains. From any thread."""
        with self._lock:
            return self._draining.due()

    def drain(self) -> int:
        """Delete the real servers that have no connections left or have had their time; how many. Raises OSError."""
        with self._lock:
            waiting, over = self._draining.look()
            connections = connections_of(self._servers, waiting)
            self._draining.end(waiting - connections.keys())
            done = [key for key, count in connections.items() if key in over or not count]
            failed = self._servers.remove(done)
            self._draining.end(key for key in done if key not in failed)
            return len(done) - len(failed)


def _is_draining(server: FoundRealServer) -> bool:
    """Whether somebody has taken it out of service and its clients are not done yet."""
    return server.key.protocol is Protocol.TCP and server.value.weight == 0 and server.connections > 0
