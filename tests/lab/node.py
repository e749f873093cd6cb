"""A node made of one network namespace, with all its surroundings behind two TUN devices.

A packet written to a TUN device has passed every hook when the write returns, so what comes out can be read at once.
Packets delivered to the node itself show up on raw sockets, which hear everything that passed the input hook. Only
what goes over the loopback device may take a moment more: `settle` waits for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from ipaddress import IPv6Address, ip_network
from pathlib import Path
from typing import NamedTuple

from kproxy.model import Family, Protocol
from tests.lab import frames
from tests.lab.namespaces import Namespace

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
RTF_LOCAL = 0x80000000
PATIENCE = 5.0  # seconds until the loopback device must have delivered, addresses be in force


class Sighting(NamedTuple):
    """A packet that came out, through a device or ("") by being delivered to the node."""

    packet: frames.Packet
    device: str


# The node's own addresses towards its pods: what masquerading puts in place of a source.
POD_GATEWAYS = ("198.18.0.1", "fd00:ffff::1")


class Node:
    """Forwards between its two devices as a Kubernetes node does; `addresses` are its own, without prefix length."""

    def __init__(self, addresses: Iterable[str], pod_networks: Iterable[str], outside: str, pods: str) -> None:
        self.netns = Namespace()
        self.outside = outside
        self.addresses = {*addresses, *POD_GATEWAYS}
        self._configure_kernel()
        self._tuns = {name: self.netns.run(_open_tun, name) for name in (outside, pods)}
        self._configure_addresses(pod_networks, pods)
        self._senders: dict[str, socket.socket] = {}
        self._listeners: list[socket.socket] = []
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], Sighting | None]] = {}
        for name, tun in self._tuns.items():
            self._read_when_ready(tun, partial(_read_tun, tun, name))
        for family in Family:
            icmp = frames.ICMP if family is Family.IPv4 else frames.ICMPV6
            for protocol in (*(p.number for p in Protocol), icmp):
                listener = self._listen(family, protocol)
                self._read_when_ready(listener.fileno(), partial(_READ_RAW[family], listener, protocol))
        self._loopback = self.open_socket(Family.IPv4, socket.SOCK_DGRAM)
        self._loopback.bind(("127.0.0.1", 0))
        self._loopback.settimeout(PATIENCE)

    def open_socket(self, family: Family, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of a process of the node."""
        af = socket.AF_INET if family is Family.IPv4 else socket.AF_INET6
        return self.netns.run(socket.socket, af, kind, protocol)

    def add_address(self, address: str) -> None:
        """Give the node one more address."""
        self.netns.command("ip", *_address_command(address, self.outside).split())
        self.addresses.add(address)
        self._await_addresses([address])

    def inject(self, device: str, packet: bytes) -> None:
        """Let a packet arrive through a device."""
        os.write(self._tuns[device], packet)

    def emit_sctp(self, source: str, destination: str, segment: bytes) -> None:
        """Send an SCTP packet from the node itself. The kernel's refusal (EPERM) is silence, as for a process."""
        sender = self._senders.get(source)
        if sender is None:
            sender = self._senders[source] = self.open_socket(Family.of(source), socket.SOCK_RAW, Protocol.SCTP.number)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            sender.bind((source, 0))
        try:
            sender.sendto(segment, (destination, 0))
        except OSError as error:
            if error.errno not in SILENT_REFUSALS:
                raise

    def seen(self) -> list[Sighting]:
        """What came out since the last call."""
        sightings: list[Sighting] = []
        while ready := self._epoll.poll(0):
            for fd, _ in ready:
                read = self._readers[fd]
                try:
                    while True:
                        if sighting := read():
                            sightings.append(sighting)
                except BlockingIOError:
                    pass
        return sightings

    def settle(self) -> None:
        """Wait until the loopback device has delivered all that was sent so far, on every processor."""
        processors = os.sched_getaffinity(0)
        try:
            for processor in processors:
                os.sched_setaffinity(0, {processor})
                self._loopback.sendto(b"settled?", self._loopback.getsockname())
                self._loopback.recv(16)
        finally:
            os.sched_setaffinity(0, processors)

    def flush_conntrack(self) -> None:
        """Forget every connection, so that the next packet is a first one again."""
        flush = struct.pack("=IHHIIBBH", 20, 0x0102, 5, 1, 0, socket.AF_UNSPEC, 0, 0)  # ctnetlink delete, acknowledged
        with self.netns.run(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
            netlink.send(flush)
            error = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if error:
            raise OSError(error, f"conntrack flush: {os.strerror(error)}")

    def close(self) -> None:
        """Take the node apart. The kernel needs a tenth of a second to remove devices; nobody has to wait for that."""
        threading.Thread(target=self._close, name="node-close").start()

    def _close(self) -> None:
        self._epoll.close()
        for tun in self._tuns.values():
            os.close(tun)
        for opened in (self._loopback, *self._senders.values(), *self._listeners):
            opened.close()
        self.netns.close()

    def _configure_kernel(self) -> None:
        """Forward, believe every source address, never hold an ICMP error back."""
        for name in ("all", "default"):
            self.netns.sysctl(f"net/ipv4/conf/{name}/rp_filter", 0)
            self.netns.sysctl(f"net/ipv4/conf/{name}/send_redirects", 0)
            self.netns.sysctl(f"net/ipv6/conf/{name}/accept_ra", 0)
            self.netns.sysctl(f"net/ipv6/conf/{name}/forwarding", 1)
        self.netns.sysctl("net/ipv4/ip_forward", 1)
        self.netns.sysctl("net/ipv4/icmp_ratemask", 0)
        self.netns.sysctl("net/ipv6/icmp/ratemask", "")

    def _configure_addresses(self, pod_networks: Iterable[str], pods: str) -> None:
        lines = [f"link set {name} addrgenmode none up" for name in self._tuns]
        lines += [_address_command(a, pods if a in POD_GATEWAYS else self.outside) for a in sorted(self.addresses)]
        lines += [f"route add {network} dev {pods}" for network in pod_networks]
        lines += [f"route add {default} dev {self.outside}" for default in ("0.0.0.0/0", "::/0")]
        self.netns.command("ip", "-batch", "-", stdin="\n".join(lines) + "\n")
        self._await_addresses(self.addresses)

    def _await_addresses(self, addresses: Iterable[str]) -> None:
        """Wait until packets to these addresses are delivered: the kernel makes IPv6 addresses local a moment later."""
        wanted = {IPv6Address(address).packed.hex() for address in addresses if ":" in address}
        deadline = time.monotonic() + PATIENCE
        while not wanted <= self.netns.run(_local_ipv6_addresses):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the node's addresses are not in force after {PATIENCE} s: {sorted(addresses)}")
            time.sleep(0.001)

    def _listen(self, family: Family, protocol: int) -> socket.socket:
        listener = self.open_socket(family, socket.SOCK_RAW, protocol)
        listener.setblocking(False)
        if family is Family.IPv6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        self._listeners.append(listener)
        return listener

    def _read_when_ready(self, fd: int, read: Callable[[], Sighting | None]) -> None:
        self._readers[fd] = read
        self._epoll.register(fd, select.EPOLLIN)


# What a process sees when its packet is dropped on the way out, or has no way to go.
SILENT_REFUSALS = {errno.EPERM, errno.EHOSTUNREACH, errno.ENETUNREACH}


def _address_command(address: str, device: str) -> str:
    network = ip_network(address)
    return f"addr add {network} dev {device}{' nodad' * (network.version == 6)}"


def _local_ipv6_addresses() -> set[str]:
    """Destinations in hexadecimal of the routes that deliver to this network namespace itself."""
    routes = [line.split() for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()]
    return {fields[0] for fields in routes if int(fields[8], 16) & RTF_LOCAL}


def _open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def _read_tun(tun: int, name: str) -> Sighting | None:
    packet = frames.parse(os.read(tun, 2048))
    return Sighting(packet, name) if packet else None


def _read_raw_ipv4(listener: socket.socket, _protocol: int) -> Sighting | None:
    packet = frames.parse(listener.recv(2048))
    return Sighting(packet, "") if packet else None


def _read_raw_ipv6(listener: socket.socket, protocol: int) -> Sighting | None:
    """IPv6 raw sockets leave out the IP header; the addresses come beside the packet."""
    segment, ancillary, _, sender = listener.recvmsg(2048, 64)
    destination = socket.inet_ntop(socket.AF_INET6, ancillary[0][2][:16])
    packet = frames.parse_segment(protocol, sender[0].partition("%")[0], destination, segment)
    return Sighting(packet, "") if packet else None


_READ_RAW = {Family.IPv4: _read_raw_ipv4, Family.IPv6: _read_raw_ipv6}
