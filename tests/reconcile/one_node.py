"""One node in a network namespace: its kernel, an API server on its loopback device, and kproxy processes."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.lab.apiserver import ApiServer
from tests.lab.host import Host
from tests.lab.namespaces import Namespace
from tests.lab.proxy_process import ProxyProcess, kproxy_command, kproxy_environment
from tests.reconcile.objects import NODE, NODE_IPS, Object, node

_NFNETLINK = 12
_GET_GENERATION = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
# These would change the machine, not the namespace.
_HARMLESS = ("--conntrack-max-per-core=0", "--oom-score-adj=0")


class OneNode:
    """The node; a context manager. Its namespace has nothing but a loopback device, with the Node's address on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._closing = ExitStack()
        self.host = Host(NODE)
        self._closing.callback(self.host.close)
        self.host.configure(*(f"addr add {address} dev lo" for address in NODE_IPS))
        self.api = ApiServer(listen=self._listen)
        self.api.put(node())
        self._proxies = 0

    def __enter__(self) -> Self:
        self.api.up()
        self._closing.callback(self.api.down)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _listen(self, address: str, port: int) -> socket.socket:
        return self.host.namespace.run(socket.create_server, (address, port), backlog=64)

    def proxy(self, *flags: str, source: Sequence[str] | None = None) -> ProxyProcess:
        """A proxy that reads from the API server unless told; not started yet. It ends with the node."""
        self._proxies += 1
        log = self.folder / f"kproxy-{self._proxies}.log"
        where = self.api.client_flags() if source is None else source
        made = ProxyProcess(self.host, [f"--hostname-override={NODE}", *_HARMLESS, *where, *flags], log)
        self._closing.callback(made.stop)
        return made

    def started(self, *flags: str, source: Sequence[str] | None = None) -> ProxyProcess:
        """A proxy that has synced."""
        made = self.proxy(*flags, source=source)
        made.start()
        made.wait_until_synced()
        return made

    def kproxy(self, *flags: str, through: Sequence[str] = (), timeout: float = 30) -> Any:
        """Run kproxy to its end, started through another command if need be; how it ended and what it printed."""
        command = (*through, *kproxy_command([f"--hostname-override={NODE}", *flags]))
        return self.host.namespace.command(*command, env=kproxy_environment(), timeout=timeout, check=False)

    def kproxy_on_a_terminal(self, *flags: str) -> str:
        """What kproxy prints where its output is a terminal."""
        terminal, its_side = os.openpty()
        command = kproxy_command([f"--hostname-override={NODE}", *flags])
        process = self.host.namespace.start(command, env=kproxy_environment(), stdout=its_side, stderr=its_side)
        os.close(its_side)
        printed = b""
        try:
            while piece := os.read(terminal, 1 << 16):
                printed += piece
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that nobody writes any more
                raise
        finally:
            os.close(terminal)
            process.wait(10)
        return printed.decode().replace("\r\n", "\n")

    def nft(self, command: str) -> str:
        """Run an nft command as somebody else on the node would. Raises CommandError."""
        return self.host.exec("nft", command)

    @property
    def ruleset(self) -> str:
        """What `nft` lists."""
        return self.nft("list ruleset")

    def generation(self) -> int:
        """How many transactions nf_tables has committed on the node."""
        return generation(self.host.namespace)

    def manifests(self, *objects: Object, name: str = "cluster.yaml") -> Path:
        """A file with these objects, and the Node."""
        path = self.folder / name
        # In place of the old one at once, as editors and ConfigMap volumes do.
        draft = path.with_suffix(".draft")
        draft.write_text("\n---\n".join(json.dumps(item) for item in (*objects, node())))
        return draft.rename(path)

    def events(self, reason: str) -> list[Object]:
        """Events of a reason that proxies have written."""
        return [event for event in self.api.objects("Event") if event["reason"] == reason]


def generation(namespace: Namespace) -> int:
    """The number of transactions that nf_tables has committed in a namespace."""
    with namespace.run(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, _NFNETLINK) as netlink:
        netlink.send(struct.pack("=IHHIIBBH", 20, _GET_GENERATION, 1, 1, 0, 0, 0, 0))
        answer = netlink.recv(4096)
    return struct.unpack_from(">I", answer, 24)[0]
