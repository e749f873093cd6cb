"""Addresses to listen on, as kube-proxy understands them."""

from __future__ import annotations

import ipaddress
import socket
from typing import Literal

import msgspec

from kproxy.model import Family, join_host_port

Network = Literal["tcp", "tcp4", "tcp6"]

_WILDCARDS = ("0.0.0.0", "::")


class ListenAddress(msgspec.Struct, frozen=True):
    """Where to listen. A wildcard in network "tcp" means both families, as in Go, where the host has IPv6."""

    host: str
    port: int
    network: Network = "tcp"

    @classmethod
    def parse(cls, hostport: str) -> ListenAddress:
        """From `IP:port` or `[IPv6]:port`. Raises ValueError."""
        host, colon, port = hostport.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{hostport!r} is not an IP address and a port")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if ":" in bare and bare is host:
            raise ValueError(f"{hostport!r}: an IPv6 address needs brackets")
        return cls(str(ipaddress.ip_address(bare)), int(port))

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def bind(address: ListenAddress) -> socket.socket:
    """A listening socket. Raises OSError."""
    backlog = socket.SOMAXCONN
    if address.network == "tcp" and address.host in _WILDCARDS and socket.has_dualstack_ipv6():
        return socket.create_server(("::", address.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    family = socket.AF_INET if Family.of(address.host) is Family.IPv4 else socket.AF_INET6
    return socket.create_server((address.host, address.port), family=family, backlog=backlog)
