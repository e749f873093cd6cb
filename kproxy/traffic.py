"""New connections for each frontend and endpoint, from the counters in the kernel's maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kproxy.dataplane.nftables.containers import CONTAINERS, Container
from kproxy.dataplane.nftables.fields import PROTOCOL
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.metrics.connections import Reading
from kproxy.model import Endpoint, Family, Frontend, Protocol, ServicePortName


class Traffic:
    """Reads the counters, from any thread, over a socket of its own. `owner` tells whose a frontend is."""

    def __init__(
        self, families: Sequence[Family], owner: Callable[[Frontend], ServicePortName | None], counted_endpoints: int
    ) -> None:
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
    address, _, port = where.show_address_port(value).rpartition(":")
    return Endpoint(address.strip("[]"), int(port))
