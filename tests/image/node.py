"""Runs in a container, with the image's own Python, and makes its network namespace a node: `node.py DIRECTORY`.

Pods' addresses that answer, each with its name, and an API server that has the objects of DIRECTORY/objects.json, with
DIRECTORY/tls.crt and tls.key.
"""

from __future__ import annotations

import fcntl
import json
import socket
import ssl
import struct
import sys
import threading
from pathlib import Path

from tests.lab.apiserver import ApiServer

API_PORT = 6443
POD_PORT = 8080
PODS = ("10.244.0.5", "10.244.0.6")
READY = "the node is ready"
_SIOCSIFADDR = 0x8916


def main(directory: Path) -> None:
    """Never returns."""
    for number, address in enumerate(PODS):
        _add_address(f"lo:{number}", address)
        threading.Thread(target=_answer, args=[socket.create_server((address, POD_PORT)), address]).start()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    api = ApiServer(port=API_PORT, tls=tls, tokens={"a-token"})
    for item in json.loads((directory / "objects.json").read_text())["items"]:
        api.put(item)
    api.up()
    print(READY, flush=True)


def _add_address(label: str, address: str) -> None:
    """With the mask of its class, /8, which on a loopback device makes all of 10.0.0.0/8 this machine's."""
    request = struct.pack("16sH2s4s8x", label.encode(), socket.AF_INET, b"", socket.inet_aton(address))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFADDR, request)


def _answer(listener: socket.socket, name: str) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(name.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
