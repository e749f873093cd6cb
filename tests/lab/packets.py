"""The packet lab: any packet in, what the kernel makes of it out.

No endpoint exists anywhere: a flow's first packet is sent, what comes out of the node tells its fate. Packets from
pods and from outside are written to the node's devices, thousands a second; connections of the node's own processes
are made with real sockets, one after the other.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType

from kproxy.model import Family, Protocol
from tests.lab import frames
from tests.lab.flows import Connection, Conversation, Fate, Flow, Origin, Outcome
from tests.lab.frames import Turn
from tests.lab.node import SILENT_REFUSALS, Node, Sighting

NODE_ADDRESSES = ("192.168.0.2", "fd00::c0a8:2")
POD_NETWORKS = ("10.0.0.0/8", "fd00:10::/32", "fd00::a00:0/104")

BATCH = 64  # packets that a TUN device surely holds until they are read
TAG_STEP = 16  # a TCP connection uses its tag and the number after it
SOURCE_PORTS = range(10000, 65536)


class Lab:
    """A node to send packets at, and its namespace to put rules into."""

    def __init__(
        self,
        addresses: Iterable[str] = NODE_ADDRESSES,
        pod_networks: Iterable[str] = POD_NETWORKS,
        *,
        outside: str = "eth0",
        pods: str = "pods",
    ) -> None:
        self.sent = 0
        self.node = Node(addresses, pod_networks, outside, pods)
        self.netns = self.node.netns
        self._devices = {Origin.OUTSIDE: outside, Origin.POD: pods}
        self._tags = count(TAG_STEP, TAG_STEP)
        self._source_ports = iter(SOURCE_PORTS)
        self._has_ipvs = self.netns.run(Path("/proc/thread-self/net/ip_vs").exists)
        self._kernel_tags: set[int] = set()  # of TCP connections that real sockets made

    def send(self, flow: Flow) -> Outcome:
        """Try one connection and say what became of its first packet."""
        return self.send_many([flow])[0]

    def send_many(self, flows: Sequence[Flow]) -> list[Outcome]:
        """Try connections; the outcomes are in the order of the flows."""
        connections = self.open_many(flows)
        for connection in connections:
            connection.close()
        return [connection.outcome for connection in connections]

    def open(self, flow: Flow) -> Connection:
        """Try one connection and keep it, so that it can go on."""
        return self.open_many([flow])[0]

    def open_many(self, flows: Sequence[Flow]) -> list[Connection]:
        """Try connections and keep them; the caller closes them."""
        self.sent += len(flows)
        opened: dict[int, Connection] = {}
        waiting = [i for i, flow in enumerate(flows) if flow.origin is not Origin.NODE]
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            opened.update(zip(part, self._open_batch([flows[i] for i in part]), strict=True))
        opened.update((i, self._open_from_node(flow)) for i, flow in enumerate(flows) if flow.origin is Origin.NODE)
        return [opened[i] for i in range(len(flows))]

    def converse(self, connection: Connection) -> Conversation:
        """Let the endpoint of a forwarded connection answer and the client send one more packet."""
        flow, first, tag = connection.flow, connection.outcome, connection.tag
        if first.fate is not Fate.FORWARDED:
            raise ValueError(f"{flow} was {first}; there is nobody who could answer")
        back = (first.destination, first.port, first.source, first.source_port)
        self.node.inject(first.device, frames.build(flow.protocol, *back, tag, Turn.ANSWER))
        sightings = self._sightings([tag])[tag]
        answer = _outcome(sightings)
        if flow.origin is Origin.NODE and flow.protocol is Protocol.TCP:
            # The node's own stack has answered the SYN ACK with an ACK.
            return Conversation(answer, _outcome([s for s in sightings if s.device]))
        return Conversation(answer, self.go_on(connection))

    def go_on(self, connection: Connection) -> Outcome:
        """Send one more packet of a connection, whatever has happened meanwhile."""
        self._send(connection, Turn.NEXT)
        return _outcome(self._sightings([connection.tag])[connection.tag])

    def flush_conntrack(self) -> None:
        """Forget every connection, so that the next packet is a first one again.

        IPVS forgets connections in its own time only: where the kernel has it, source ports go on to be fresh ones.
        """
        self.node.flush_conntrack()
        if not self._has_ipvs:
            self._source_ports = iter(SOURCE_PORTS)

    def close(self) -> None:
        """Take the node apart."""
        self.node.close()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open_batch(self, flows: Sequence[Flow]) -> list[Connection]:
        connections = [Connection(self._with_source_port(flow), next(self._tags)) for flow in flows]
        for connection in connections:
            self._send(connection, Turn.OPEN)
        sightings = self._sightings([c.tag for c in connections])
        for connection in connections:
            connection.outcome = _outcome(sightings[connection.tag])
        return connections

    def _open_from_node(self, flow: Flow) -> Connection:
        """Connect as a process of the node does, bound to the source address."""
        if flow.protocol is Protocol.SCTP:  # the kernel need not have it: a raw socket sends the INIT
            return self._open_batch([flow])[0]
        kind = socket.SOCK_STREAM if flow.protocol is Protocol.TCP else socket.SOCK_DGRAM
        flow = self._with_source_port(flow)
        client = self.node.open_socket(Family.of(flow.source), kind)
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the port is free at once
        client.bind((flow.source, flow.source_port))
        connection = Connection(flow, next(self._tags), client)
        error = client.connect_ex((flow.destination, flow.port))
        if error and error not in {errno.EINPROGRESS, errno.ECONNREFUSED, *SILENT_REFUSALS}:
            raise OSError(error, f"{flow}: connect: {errno.errorcode[error]}")
        if flow.protocol is Protocol.UDP:
            self._send(connection, Turn.OPEN)
        sightings = self._of(connection, self.node.seen())
        if not sightings:
            self.node.settle()
            sightings = self._of(connection, self.node.seen())
        connection.outcome = _outcome(sightings)
        return connection

    def _of(self, connection: Connection, sightings: Sequence[Sighting]) -> list[Sighting]:
        """Those of a connection that a real socket has just opened. Older ones may be heard retrying, too."""
        if connection.flow.protocol is Protocol.TCP:
            # Its sequence number, our tag, was the kernel's choice.
            new = [s for s in sightings if s.packet.protocol is Protocol.TCP and s.packet.tag not in self._kernel_tags]
            if new:
                connection.tag = new[0].packet.tag
                self._kernel_tags.add(connection.tag)
        return [s for s in sightings if s.packet.tag == connection.tag]

    def _send(self, connection: Connection, turn: Turn) -> None:
        flow, tag = connection.flow, connection.tag
        if connection.client is not None:
            try:
                connection.client.send(frames.datagram(tag))
            except OSError as error:
                if error.errno not in SILENT_REFUSALS:
                    raise
        elif flow.origin is Origin.NODE:
            packet = frames.segment(
                flow.protocol, flow.source, flow.source_port, flow.destination, flow.port, tag, turn
            )
            self.node.emit_sctp(flow.source, flow.destination, packet)
        else:
            packet = frames.build(flow.protocol, flow.source, flow.source_port, flow.destination, flow.port, tag, turn)
            self.node.inject(self._devices[flow.origin], packet)

    def _sightings(self, tags: Sequence[int]) -> dict[int, list[Sighting]]:
        """What came out, by tag. A tag without a sighting is looked for again when the node has come to rest."""
        found: dict[int, list[Sighting]] = {tag: [] for tag in tags}
        for attempt in range(2):
            for sighting in self.node.seen():
                if sighting.packet.tag in found:
                    found[sighting.packet.tag].append(sighting)
            if attempt or all(found.values()):
                break
            self.node.settle()
        return found

    def _with_source_port(self, flow: Flow) -> Flow:
        """A source port that conntrack has not seen: an older entry would decide where the flow goes."""
        if flow.source_port:
            return flow
        try:
            return flow._replace(source_port=next(self._source_ports))
        except StopIteration:
            raise RuntimeError("there are no more fresh source ports: call flush_conntrack()") from None


def _outcome(sightings: Sequence[Sighting]) -> Outcome:
    """The fate that the sightings of one packet prove. A delivered one is no refusal, though a closed port answers."""
    errors = [s.packet for s in sightings if s.packet.error]
    resets = [s.packet for s in sightings if not s.packet.error and s.packet.flags & frames.RST]
    passed = [s for s in sightings if not s.packet.error and not s.packet.flags & frames.RST]
    passed.sort(key=lambda s: s.device)  # delivered to the node first
    if passed:
        packet, device = passed[0]
        fate = Fate.FORWARDED if device else Fate.DELIVERED
        return Outcome(fate, packet.destination, packet.port, packet.source, packet.source_port, device)
    if resets:
        return Outcome(Fate.RESET, detail=f"by {resets[0].source}")
    if not errors:
        return Outcome(Fate.DROPPED)
    refusal = errors[0]
    if refusal.error in frames.PORT_UNREACHABLE:
        return Outcome(Fate.REJECTED, detail=f"by {refusal.reporter}")
    return Outcome(Fate.UNREACHABLE, detail=f"{frames.describe_error(refusal)} by {refusal.reporter}")
