"""New connections for each frontend and endpoint, from the kernel's counters: those of maps, or those of rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.counters import RuleCounters, Taken
from kproxy.dataplane.iptables.names import hash16, identity
from kproxy.dataplane.nftables.containers import CONTAINERS, Container
from kproxy.dataplane.nftables.fields import PROTOCOL
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.metrics.connections import Reading
from kproxy.model import Endpoint, Family, Frontend, Protocol, ServicePortName

Owner = Callable[[Frontend], ServicePortName | None]

_SLOW_SECONDS = 0.5
_PAUSE = 9  # times as long as reading took: counters take at most a tenth of a core


class Traffic:
    """Reads the counters, from any thread, over a socket of its own. `owner` tells whose a frontend is."""

    def __init__(self, families: Sequence[Family], owner: Owner, counted_endpoints: int) -> None:
        self._kernel = NftablesKernel(families, counted_endpoints=counted_endpoints)
        self._counted = [c for c in CONTAINERS.values() if c.counter and c.family in families]
        self._owner = owner

    def readings(self) -> Iterator[Reading]:
        """Every counter of a frontend or endpoint that is in use. Raises OSError."""
        for where in self._counted:
            for key, value, packets in self._kernel.counters(where):
                frontend = _frontend(where, key)
                service_port = self._owner(frontend)
                if service_port is None:
                    continue
                at = _endpoint(where, value) if isinstance(value, bytes) else frontend
                yield Reading(service_port, at, key, packets)


def _frontend(where: Container, key: bytes) -> Frontend:
    fields = where.show_key(key)
    address, protocol, port = fields[:3] if where.key_fields[0] is not PROTOCOL else ("", *fields[:2])
    return Frontend(where.family, address, Protocol(protocol.upper()), int(port))


def _endpoint(where: Container, value: bytes) -> Endpoint:
    return _address_and_port(where.show_address_port(value))


class RuleTraffic:
    """Reads the counters of iptables rules, from any thread. `owner` tells whose a frontend is.

    Where reading takes long, what was read is given again for a while.
    """

    def __init__(
        self, variant: Variant, families: Sequence[Family], owner: Owner, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = RuleCounters(variant)
        self._owner = owner
        self._clock = clock
        self._accepted: dict[Family, _Accepted] = {family: {} for family in families}
        self._readings: list[Reading] = []
        self._read_again_at = 0.0

    def readings(self) -> Sequence[Reading]:
        """Every counter of a frontend or endpoint that is in use. Raises OSError."""
        started = self._clock()
        if self._readings and started < self._read_again_at:
            return self._readings
        self._readings = []
        readings = [reading for family in self._accepted for reading in self._of(family)]
        ended = self._clock()
        if ended - started > _SLOW_SECONDS:
            self._readings = readings
            self._read_again_at = ended + _PAUSE * (ended - started)
        return readings

    def _of(self, family: Family) -> Iterator[Reading]:
        before, now = self._accepted[family], _Accepted()
        counted = self._counters.translated(family)
        refused = self._counters.dropped(family)
        owners: dict[str, ServicePortName] = {}
        for frontend, taken in counted.frontends.items():
            name = self._owner(frontend)
            if name is None or hash16(identity(name)) != taken.hash16:
                continue  # rules of a service port that has just gone, or lost this frontend
            owners[taken.hash16] = name
            count = _Count.of(before.get((name, frontend)), taken, refused[frontend])
            now[name, frontend] = count
            yield Reading(name, frontend, frontend, count.accepted)
        self._accepted[family] = now
        for given in counted.endpoints:
            if owner := owners.get(given.hash16):
                yield Reading(owner, _address_and_port(given.destination), given.rule, given.packets)


class _Count(NamedTuple):
    """What came to a frontend, and what of it was not dropped."""

    taken: Taken
    dropped: int
    early: int  # dropped, as was seen before it was seen that it had come
    accepted: int

    @classmethod
    def of(cls, before: _Count | None, taken: Taken, dropped: int) -> _Count:
        """Bring it forward. It never falls, for a counter that has fallen is a new one."""
        if before is None:
            return cls(taken, dropped, 0, max(0, taken.packets - dropped))
        taken_before = before.taken.packets if before.taken.chain == taken.chain else 0
        more_dropped = _growth(before.dropped, dropped)
        more = _growth(taken_before, taken.packets) - more_dropped - before.early
        return cls(taken, dropped, min(more_dropped, max(0, -more)), before.accepted + max(0, more))


_Accepted = dict[tuple[ServicePortName, Frontend], _Count]


def _growth(before: int, now: int) -> int:
    return now - before if now >= before else now


def _address_and_port(text: str) -> Endpoint:
    address, _, port = text.rpartition(":")
    return Endpoint(address.strip("[]"), int(port))
