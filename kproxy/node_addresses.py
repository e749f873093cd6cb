"""Which addresses this node has, which families it serves, and on which addresses it accepts node ports.

Addresses are read over rtnetlink directly: one request and one fixed header, where pyroute2's import costs 22 MB.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from kproxy.model import Family, canonical_address, canonical_cidr
from kproxy.netlink import DumpInterruptedError, NetlinkSocket, Request, attributes

PRIMARY = "primary"
LOOPBACK = {Family.IPv4: "127.0.0.1", Family.IPv6: "::1"}

_NETLINK_ROUTE = 0
_GET_ADDRESS = 22  # RTM_GETADDR
_ADDRESS_GROUPS = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_ADDRESS_HEADER = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_LISTINGS = 5  # attempts, where the addresses change meanwhile
_RETRY_MILLISECONDS = 1000

log = structlog.get_logger(__name__)


class NodePortAddressesError(ValueError):
    """The configured `nodePortAddresses` cannot be used; the message names the entry."""


class NodeIPs(msgspec.Struct, frozen=True):
    """The primary address of this node in each family, loopback where none is known, and the family that leads."""

    primary: Family
    ips: dict[Family, str]

    @property
    def known(self) -> bool:
        """Whether the leading family's address is a real one. If not, features that need it do not work."""
        return not is_loopback(self.ips[self.primary])


def primary_node_ips(addresses: Iterable[tuple[str, str]], bind_address: str = "") -> NodeIPs:
    """Chosen from the (type, address) pairs of a Node's `status.addresses` (reference: section 8.4).

    InternalIP goes before ExternalIP; the first of all decides the leading family. A bind address that is not
    unspecified (0.0.0.0, ::) takes its family's place and leads. Raises ValueError for a bind address that is none.
    """
    pairs = list(addresses)
    candidates = []
    for wanted in ("InternalIP", "ExternalIP"):
        for kind, text in pairs:
            if kind == wanted:
                try:
                    candidates.append(canonical_address(text))
                except ValueError:
                    continue  # the cluster's data, not ours to refuse: another address may do
    primary = Family.of(candidates[0]) if candidates else Family.IPv4
    ips = LOOPBACK | first_of_each_family(candidates)
    if bind_address:
        bound = canonical_address(bind_address)
        if not ipaddress.ip_address(bound).is_unspecified:
            primary = Family.of(bound)
            ips[primary] = bound
    return NodeIPs(primary, ips)


def first_of_each_family(values: Iterable[str]) -> dict[Family, str]:
    """The first address, or CIDR, of each family: as node IPs and pod CIDRs are read."""
    first: dict[Family, str] = {}
    for value in values:
        first.setdefault(Family.of(value), value)
    return first


def node_port_cidrs(values: Sequence[str], ips: Mapping[Family, str]) -> dict[Family, tuple[str, ...] | None]:
    """The CIDRs of `nodePortAddresses` for each family; None: every local address (reference: section 8.3).

    `ips` are the node's primary addresses; a loopback one counts as unknown. Raises NodePortAddressesError.
    """
    cidrs: list[str] = []
    if list(values) == [PRIMARY]:
        cidrs = [f"{ips[f]}/{f.bits}" for f in Family if f in ips and not is_loopback(ips[f])]
    else:
        for index, value in enumerate(values):
            if value == PRIMARY:
                raise NodePortAddressesError(f"nodePortAddresses[{index}]: {PRIMARY!r} must be the only entry")
            try:
                cidrs.append(canonical_cidr(value))
            except ValueError as e:
                raise NodePortAddressesError(f"nodePortAddresses[{index}]: {e}") from e
    chosen: dict[Family, tuple[str, ...] | None] = {}
    for family in Family:
        own = tuple(dict.fromkeys(cidr for cidr in cidrs if Family.of(cidr) is family))
        chosen[family] = None if not own or any(cidr.endswith("/0") for cidr in own) else own
    return chosen


def node_port_warning(values: Sequence[str], ips: Mapping[Family, str], families: Sequence[Family]) -> str:
    """The families that `nodePortAddresses` leaves open on every local address, as a sentence; "" if it asks for that.

    `families` are those that the node serves. A node whose primary address is of one family only is nothing unusual.
    """
    if not values:
        return ""
    if list(values) == [PRIMARY]:
        named = set(families if any(not is_loopback(address) for address in ips.values()) else ())
    else:
        named = {Family.of(value) for value in values}
    if left_out := [family.name for family in families if family not in named]:
        names = " and ".join(left_out)
        return f"nodePortAddresses names no {names} address: {names} node ports accept connections on every local one"
    return ""


def accepts_ipv4_loopback(cidrs: Sequence[str] | None) -> bool:
    """Whether node ports are wanted on 127.0.0.0/8, for the modes that can serve them there. None: everywhere."""
    loopback = ipaddress.IPv4Network("127.0.0.0/8")
    return cidrs is None or any(
        loopback.overlaps(ipaddress.IPv4Network(cidr)) for cidr in cidrs if Family.of(cidr) is Family.IPv4
    )


def is_loopback(address: str) -> bool:
    """Whether an address is the machine's own talk."""
    return ipaddress.ip_address(address).is_loopback


def matching(addresses: Iterable[str], family: Family, cidrs: Sequence[str] | None) -> tuple[str, ...]:
    """Those of a family within any of the CIDRs (None: all), sorted; loopback is never among them."""
    networks = None if cidrs is None else [ipaddress.ip_network(cidr) for cidr in cidrs]
    found = sorted(ipaddress.ip_address(a) for a in addresses if Family.of(a) is family)
    return tuple(
        str(a) for a in found if not a.is_loopback and (networks is None or any(a in network for network in networks))
    )


def local_addresses(exclude: str = "") -> frozenset[str]:
    """Every address of this network namespace, loopback included, but those of the interface `exclude`.

    That is for IPVS's device, whose addresses are the services'. Raises OSError.
    """
    excluded = _interface_index(exclude)
    everything = Request(_GET_ADDRESS, _ADDRESS_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    attempts = _LISTINGS
    while True:
        attempts -= 1
        with NetlinkSocket(_NETLINK_ROUTE) as kernel:
            try:
                return frozenset(_address(message, excluded) for message in kernel.dump(everything)) - {""}
            except DumpInterruptedError:
                if not attempts:
                    raise


class AddressMonitor:
    """Calls back from a thread of its own with all local addresses whenever they have changed.

    `exclude`: as for `local_addresses`; thousands of changes there cost next to nothing.
    """

    def __init__(self, on_change: Callable[[frozenset[str]], None], exclude: str = "") -> None:
        self._on_change = on_change
        self._exclude = exclude
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._thread: threading.Thread | None = None

    def start(self) -> frozenset[str]:
        """Begin to watch the calling thread's network namespace; the addresses of now. Raises OSError."""
        kernel = NetlinkSocket(
            _NETLINK_ROUTE, _ADDRESS_GROUPS
        )  # before the first listing, so that nothing falls between
        try:
            known = local_addresses(self._exclude)
        except OSError:
            kernel.close()
            raise
        self._thread = threading.Thread(target=self._watch, args=(kernel, known), name="addresses", daemon=True)
        self._thread.start()
        return known

    def stop(self) -> None:
        """End the thread; no call comes after it returns."""
        self._stop_sender.send(b"x")
        if self._thread:
            self._thread.join()
        self._stop_sender.close()
        self._stop_receiver.close()

    def _watch(self, kernel: NetlinkSocket, known: frozenset[str]) -> None:
        poll = select.poll()
        poll.register(kernel, select.POLLIN)
        poll.register(self._stop_receiver, select.POLLIN)
        retry_in = None
        with kernel:
            while True:
                ready = [descriptor for descriptor, _ in poll.poll(retry_in)]
                if self._stop_receiver.fileno() in ready:
                    return
                if ready and not self._concerned(kernel) and retry_in is None:
                    continue
                try:
                    current = local_addresses(self._exclude)
                except OSError as e:
                    retry_in = _RETRY_MILLISECONDS
                    log.warning("cannot list the node's addresses; trying again", error=str(e))
                    continue
                retry_in = None
                if current != known:
                    known = current
                    self._on_change(current)

    def _concerned(self, kernel: NetlinkSocket) -> bool:
        """Whether any of the waiting notifications is about an interface that counts."""
        excluded = _interface_index(self._exclude)
        try:
            return any(_address(payload, excluded) for payload in kernel.notifications())
        except OSError:
            return True  # some were lost (ENOBUFS): look at everything


def supported_families(proc: Path = Path("/proc")) -> tuple[Family, ...]:
    """The families that the kernel offers here: IPv6 can be compiled out or switched off."""
    if not (proc / "net/if_inet6").exists():
        return (Family.IPv4,)
    try:
        disabled = (proc / "sys/net/ipv6/conf/all/disable_ipv6").read_text().strip() == "1"
    except FileNotFoundError:
        disabled = False
    return (Family.IPv4,) if disabled else tuple(Family)


def _interface_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name) if name else 0
    except OSError:
        return 0  # not there (yet)


def _address(message: bytes, excluded: int) -> str:
    """The address in an RTM_*ADDR message; "" if its interface is the excluded one."""
    family, _, _, _, interface = _ADDRESS_HEADER.unpack_from(message)
    if interface == excluded or family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    fields = attributes(message, _ADDRESS_HEADER.size)
    # On a point-to-point link IFA_ADDRESS is the other end.
    return socket.inet_ntop(family, fields[_IFA_LOCAL] if _IFA_LOCAL in fields else fields[_IFA_ADDRESS])
