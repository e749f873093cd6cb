"""A node of one network namespace in which addresses of every kind are on the loopback device."""

from __future__ import annotations

import socket

from kproxy.model import Family, join_host_port
from tests.lab.namespaces import Namespace

SERVICE_NETWORKS = "10.96.0.0/16", "10.244.0.0/16", "203.0.113.0/24", "fd00:96::/64", "fd00:244::/64", "2001:db8::/64"
CLIENT = {Family.IPv4: "192.168.7.1", Family.IPv6: "fd00:7::1"}
CLIENT_PORT = 40000
PATIENCE = 5.0


class UDPNode:
    """Balances by the rules it is told, and remembers connections as any node does."""

    def __init__(self, netns: Namespace) -> None:
        self.netns = netns
        self._sockets: list[socket.socket] = []
        self._table({}, ())
        self.netns.sysctl("net/ipv6/ip_nonlocal_bind", 1)  # IPv4 takes every address of a local route for its own
        for network in SERVICE_NETWORKS:
            self.netns.command("ip", "-6" if ":" in network else "-4", "route", "add", "local", network, "dev", "lo")
        for family, address in CLIENT.items():
            self.netns.command("ip", "addr", "add", f"{address}/{family.bits}", "dev", "lo", "nodad")

    def balance(self, *translations: tuple[str, int, str, int]) -> None:
        """Send new connections from address and port to address and port; "" for every address."""
        self._table({(address, port): (to, to_port) for address, port, to, to_port in translations}, ())

    def refuse(self, *frontends: tuple[str, int]) -> None:
        """Answer new connections with port unreachable, and balance nothing."""
        self._table({}, frontends)

    def listen(self, address: str, port: int) -> socket.socket:
        """A UDP server."""
        server = self._open(socket.AF_INET6 if ":" in address else socket.AF_INET)
        server.bind((address, port))
        return server

    def client(self, family: Family = Family.IPv4, port: int = CLIENT_PORT) -> socket.socket:
        """A UDP client that keeps its source port."""
        return self.listen(CLIENT[family], port)

    def flows(self, family: Family = Family.IPv4, protocol: str = "udp") -> list[str]:
        """The kernel's connections, as conntrack(8) prints them."""
        arguments = "-L", "-f", family.name.lower(), "-p", protocol
        return self.netns.command("conntrack", *arguments).stdout.splitlines()

    def close(self) -> None:
        for opened in self._sockets:
            opened.close()

    def _open(self, af: int) -> socket.socket:
        opened = self.netns.run(socket.socket, af, socket.SOCK_DGRAM)
        opened.settimeout(PATIENCE)
        self._sockets.append(opened)
        return opened

    def _table(
        self, translations: dict[tuple[str, int], tuple[str, int]], refused: tuple[tuple[str, int], ...]
    ) -> None:
        dnat = [
            f"meta nfproto {'ipv6' if ':' in to else 'ipv4'} meta l4proto {{tcp, udp}} "
            + (f"{_family(address)} daddr {address} " if address else "")
            + f"th dport {port} dnat {_family(to)} to {join_host_port(to, to_port)}"
            for (address, port), (to, to_port) in translations.items()
        ]
        reject = [
            f"{_family(address)} daddr {address} udp dport {port} ct state new reject" for address, port in refused
        ]
        newline = "\n"
        self.netns.command(
            "nft",
            "-f",
            "-",
            stdin=f"""
table inet node
delete table inet node
table inet node {{
  chain nat {{ type nat hook output priority -100; {newline.join(dnat)}
  }}
  chain filter {{ type filter hook output priority 0; ct state new counter; {newline.join(reject)}
  }}
}}
""",
        )


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"
