"""What is sent and what became of it: the vocabulary of the packet lab."""

from __future__ import annotations

import socket
from enum import StrEnum
from typing import NamedTuple

from kproxy.model import Protocol, join_host_port


class Origin(StrEnum):
    """Where a connection comes from."""

    POD = "pod"
    OUTSIDE = "outside"
    NODE = "node"


class Flow(NamedTuple):
    """A connection to be tried. Source port 0: any that was not used yet."""

    origin: Origin
    source: str
    destination: str
    port: int
    protocol: Protocol = Protocol.TCP
    source_port: int = 0

    def __str__(self) -> str:
        return f"{self.protocol} from {self.origin} {self.source} to {join_host_port(self.destination, self.port)}"


class Fate(StrEnum):
    """What became of a packet."""

    FORWARDED = "forwarded"
    DELIVERED = "delivered to the node"
    REJECTED = "rejected"  # ICMP port unreachable
    RESET = "reset"  # TCP RST, though nothing was delivered
    UNREACHABLE = "unreachable"  # another ICMP error
    DROPPED = "dropped"


class Outcome(NamedTuple):
    """What became of a packet and what it looked like then. `device` is where it left the node."""

    fate: Fate
    destination: str = ""
    port: int = 0
    source: str = ""
    source_port: int = 0
    device: str = ""
    detail: str = ""

    def __str__(self) -> str:
        if not self.destination:
            return f"{self.fate} {self.detail}".rstrip()
        where = f" through {self.device}" if self.device else ""
        return f"{self.fate} as {self.source} → {join_host_port(self.destination, self.port)}{where}"


class Connection:
    """A connection that was tried, as far as it got. `flow` has its real source port."""

    def __init__(self, flow: Flow, tag: int, client: socket.socket | None = None) -> None:
        self.flow = flow
        self.tag = tag
        self.client = client  # of a process of the node
        self.outcome = Outcome(Fate.DROPPED)

    def close(self) -> None:
        """Forget the connection."""
        if self.client is not None:
            self.client.close()


class Conversation(NamedTuple):
    """The endpoint's answer as it reached the client, and the client's next packet as it left the node."""

    answer: Outcome
    next: Outcome

    def flaw(self, connection: Connection) -> str:
        """What a user of the connection would complain about; empty if nothing."""
        flow, first = connection.flow, connection.outcome
        answered = (self.answer.source, self.answer.source_port, self.answer.destination, self.answer.port)
        if answered != (flow.destination, flow.port, flow.source, flow.source_port):
            return f"{flow}: the answer of {join_host_port(first.destination, first.port)} was {self.answer}"
        if self.next != first:
            return f"{flow}: the first packet was {first}, the next one {self.next}"
        return ""
