"""UDP flows that the kernel still sends where no service sends them any more.

A UDP client that keeps its source port (DNS, statsd, QUIC) stays in one conntrack entry, and the entry keeps the
endpoint that was chosen at its first packet: it follows neither a change of endpoints nor the appearance of rules
until it has been silent for its timeout. So after a change the entries are compared with the services, and what is
wrong is deleted; the next packet is then balanced, or refused, afresh (reference: section 5.1).

An entry to a frontend of today is wrong when its replies come from anything but a *serving* endpoint. This takes in
flows that were never translated: their replies come from the frontend itself. It holds for services without
endpoints too, which kube-proxy leaves out: a deleted flow is then answered with an ICMP error instead of silence.
An entry to a frontend of yesterday is wrong when it was translated. TCP and SCTP are left alone: their clients
notice a dead peer, and a draining endpoint may finish its connections.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable

import msgspec

from kproxy.model import Endpoint, Family, Frontend, Protocol
from kproxy.netlink import DumpInterruptedError, NetlinkSocket, Request, attribute, attributes, nested

_NETLINK_NETFILTER = 12
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_GET_STATISTICS = 1 << 8 | 4  # IPCTNL_MSG_CT_GET_STATS_CPU
_ORIGINAL, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25  # CTA_*
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3  # CTA_TUPLE_*
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3  # CTA_PROTO_*
_FILTER_ORIGINAL_FLAGS, _FILTER_BY_PROTOCOL = 1, 1 << 3
_SOURCE_ADDRESS = {Family.IPv4: 1, Family.IPv6: 3}  # CTA_IP_V4_SRC, CTA_IP_V6_SRC; the destination is the next
_SOCKET_FAMILY = {Family.IPv4: socket.AF_INET, Family.IPv6: socket.AF_INET6}

_LISTINGS = 5


class ConntrackError(Exception):
    """The conntrack table could not be read or cleaned in full. `deleted` entries have gone nevertheless."""

    def __init__(self, message: str, deleted: int) -> None:
        super().__init__(message)
        self.deleted = deleted


def load_module() -> None:
    """Have the kernel load connection tracking, if that is a module which nobody has used yet.

    It does so when it is asked for what the module has to tell. Where it cannot, who needs the module will say so.
    """
    header = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)  # nfgenmsg
    try:
        with NetlinkSocket(_NETLINK_NETFILTER) as kernel:
            list(kernel.dump(Request(_GET_STATISTICS, header)))
    except OSError:
        pass


class UDPService(msgspec.Struct, frozen=True):
    """A UDP service port of one family: the frontends that it owns, and all its endpoints, serving or not."""

    frontends: tuple[Frontend, ...]
    endpoints: tuple[Endpoint, ...] = ()


class Expectation:
    """Where the replies of UDP flows of one family may come from: decides which conntrack entries are wrong.

    `retired` are frontends that no service has any more. `node_addresses` are the addresses on which node ports are
    served; None takes every destination for one of them, as kube-proxy does, and with it the flows that only pass
    through this node to a port of the same number elsewhere.
    """

    def __init__(
        self,
        family: Family,
        services: Iterable[UDPService],
        retired: Collection[Frontend] = (),
        node_addresses: Collection[str] | None = None,
    ) -> None:
        # Keys and values are address and port as the kernel writes them. Two services that claim one frontend share
        # it here, so that neither deletes the other's flows.
        self._serving: dict[bytes, set[bytes]] = {}
        self._node_ports: dict[bytes, set[bytes]] = {}
        for service in services:
            frontends = [f for f in service.frontends if f.family is family and f.protocol is Protocol.UDP]
            if not frontends:
                continue
            serving = {socket_address(e.address, e.port) for e in service.endpoints if e.serving}
            for frontend in frontends:
                if frontend.address:
                    key = socket_address(frontend.address, frontend.port)
                    self._serving.setdefault(key, set()).update(serving)
                else:
                    self._node_ports.setdefault(_port(frontend.port), set()).update(serving)
        gone = [f for f in retired if f.family is family]
        self._retired = {socket_address(f.address, f.port) for f in gone if f.address}
        self._retired_node_ports = {_port(f.port) for f in gone if not f.address}
        self._node_addresses = (
            None
            if node_addresses is None
            else {_address(address) for address in node_addresses if Family.of(address) is family}
        )

    def __bool__(self) -> bool:
        """Whether any entry could be wrong."""
        return bool(self._serving or self._node_ports or self._retired or self._retired_node_ports)

    def is_wrong(self, destination: bytes, reply_source: bytes) -> bool:
        """Whether a UDP flow from a client to `destination`, answered by `reply_source`, has to go."""
        serving = self._serving.get(destination)
        address, port = destination[:-2], destination[-2:]
        on_node = self._node_addresses is None or address in self._node_addresses
        if serving is None and on_node:
            serving = self._node_ports.get(port)
        if serving is not None:
            return reply_source not in serving
        retired = destination in self._retired or (on_node and port in self._retired_node_ports)
        return retired and reply_source != destination


class Conntrack:
    """Keeps the kernel's UDP entries in line with the services. Works in the calling thread's network namespace."""

    def __init__(self) -> None:
        self._known: frozenset[Frontend] = frozenset()
        self._retired: frozenset[Frontend] = frozenset()

    def reconcile(self, services: Collection[UDPService], node_addresses: Collection[str] | None = None) -> int:
        """Delete the entries that contradict `services`, which are all UDP service ports of both families.

        Returns how many there were. Frontends that were there at an earlier call and are no more are cleaned once.
        `node_addresses`: see `Expectation`. Raises ConntrackError; call again then, nothing is forgotten.
        """
        current = frozenset(f for service in services for f in service.frontends if f.protocol is Protocol.UDP)
        self._retired = (self._retired | self._known) - current
        self._known = current
        deleted = 0
        errors = []
        for family in Family:
            expectation = Expectation(family, services, self._retired, node_addresses)
            try:
                deleted += _clean(family, expectation) if expectation else 0
            except ConntrackError as e:
                deleted += e.deleted
                errors.append(str(e))
        if errors:
            raise ConntrackError("; ".join(errors), deleted)
        self._retired = frozenset()
        return deleted


def socket_address(address: str, port: int) -> bytes:
    """Address and port in network order."""
    return _address(address) + _port(port)


def _address(address: str) -> bytes:
    return socket.inet_pton(_SOCKET_FAMILY[Family.of(address)], address)


def _port(port: int) -> bytes:
    return port.to_bytes(2)


def _clean(family: Family, expectation: Expectation) -> int:
    """Delete the wrong entries of one family; how many. Raises ConntrackError."""
    subject = f"cannot clean the {family.name} UDP conntrack entries"
    deleted = 0
    refused: set[int] = set()
    complete = False
    try:
        with NetlinkSocket(_NETLINK_NETFILTER) as kernel:
            for _ in range(_LISTINGS):
                wrong, complete = _wrong_entries(kernel, family, expectation)
                codes = kernel.acknowledged(wrong)
                deleted += codes.count(0)
                refused = set(codes) - {0, errno.ENOENT}  # an entry that has gone meanwhile is no error
                if complete or refused:
                    break
    except OSError as e:
        raise ConntrackError(f"{subject}: {e}", deleted) from e
    if refused:
        reasons = ", ".join(os.strerror(code) for code in sorted(refused))
        raise ConntrackError(f"{subject}: the kernel refused to delete some: {reasons}", deleted)
    if not complete:
        raise ConntrackError(f"{subject}: the table changed during {_LISTINGS} listings in a row", deleted)
    return deleted


def _wrong_entries(kernel: NetlinkSocket, family: Family, expectation: Expectation) -> tuple[list[Request], bool]:
    """The requests that delete the wrong entries, and whether the listing was consistent. Raises OSError."""
    source = _SOURCE_ADDRESS[family]
    destination = source + 1
    wrong: list[Request] = []
    try:
        for entry in kernel.dump(_list_udp(family)):
            fields = attributes(entry, 4)
            original = attributes(fields[_ORIGINAL])
            # Other zones belong to who made them (Open vSwitch tracks the flows of pods there before translation).
            if _ZONE in fields or _TUPLE_ZONE in original:
                continue
            original_ports = attributes(original[_TUPLE_PROTO])
            if original_ports[_NUMBER][0] != Protocol.UDP.number:  # kernels before 5.8 do not filter
                continue
            reply = attributes(fields[_REPLY])
            if expectation.is_wrong(
                attributes(original[_TUPLE_IP])[destination] + original_ports[_DESTINATION_PORT],
                attributes(reply[_TUPLE_IP])[source] + attributes(reply[_TUPLE_PROTO])[_SOURCE_PORT],
            ):
                # The id tells it from an entry that the same client makes meanwhile under the new rules.
                exact = nested(_ORIGINAL, fields[_ORIGINAL]) + attribute(_ID, fields[_ID])
                wrong.append(Request(_DELETE, entry[:4] + exact))
    except DumpInterruptedError:
        return wrong, False  # what was found is wrong all the same
    return wrong, True


def _list_udp(family: Family) -> Request:
    """Asks for the UDP entries of a family (the filter: kernel 5.8)."""
    return Request(
        _GET,
        struct.pack("=BBH", _SOCKET_FAMILY[family], 0, 0)
        + nested(_ORIGINAL, nested(_TUPLE_PROTO, attribute(_NUMBER, bytes([Protocol.UDP.number]))))
        + nested(_FILTER, attribute(_FILTER_ORIGINAL_FLAGS, struct.pack("=I", _FILTER_BY_PROTOCOL))),
    )
