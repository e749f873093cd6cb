"""A DNS server for the cluster lab: the names of Services as CoreDNS answers them, IPv4 only."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_store import ApiError

DOMAIN = "cluster.local"
_A, _CNAME, _IN = 1, 5, 1
_NO_ERROR, _NO_NAME = 0, 3
_TTL = 1

Addresses = Callable[[dict[str, str]], list[str]]


class Dns:
    """Answers datagrams on a socket until it is closed. `addresses` gives those of the ready pods with some labels."""

    def __init__(self, api: ApiServer, sock: socket.socket, addresses: Addresses) -> None:
        self._api, self._socket, self._addresses = api, sock, addresses
        self._thread = threading.Thread(target=self._serve, name="dns", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is not connected; the thread wakes up all the same
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, client = self._socket.recvfrom(1500)
            except OSError:
                return
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, end = _read_name(query, 12)
        question = query[12 : end + 4]
        kind = struct.unpack_from("!H", query, end)[0]
        found = self._records(".".join(labels))
        records = [] if found is None else [record for record in found if kind == _A or record[1] == _CNAME]
        code = _NO_NAME if found is None else _NO_ERROR
        head = query[:2] + struct.pack("!HHHHH", 0x8580 | code, 1, len(records), 0, 0)
        return head + question + b"".join(_record(*record) for record in records)

    def _records(self, name: str) -> list[tuple[str, int, bytes]] | None:
        """Records for a name, with the name they belong to; None if there is no such name."""
        suffix = f".svc.{DOMAIN}"
        service, _, namespace = name.lower().removesuffix(suffix).partition(".")
        if not name.lower().endswith(suffix) or not namespace or "." in namespace:
            return None
        try:
            spec = self._api.get("Service", service, namespace)["spec"]
        except ApiError:
            return None
        if spec["type"] == "ExternalName":
            target = spec["externalName"]
            return [(name, _CNAME, _write_name(target)), *(self._records(target) or [])]
        addresses = self._addresses(spec["selector"]) if spec["clusterIP"] == "None" else [spec["clusterIP"]]
        return [(name, _A, socket.inet_aton(address)) for address in addresses]


def _record(name: str, kind: int, content: bytes) -> bytes:
    return _write_name(name) + struct.pack("!HHIH", kind, _IN, _TTL, len(content)) + content


def _write_name(name: str) -> bytes:
    labels = name.rstrip(".").split(".")
    return b"".join(bytes([len(label)]) + label.encode() for label in labels) + b"\0"


def _read_name(message: bytes, begin: int) -> tuple[list[str], int]:
    labels = []
    while length := message[begin]:
        labels.append(message[begin + 1 : begin + 1 + length].decode())
        begin += 1 + length
    return labels, begin + 1
