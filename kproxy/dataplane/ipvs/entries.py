"""What the kernel holds of ours in ipvs mode as entries: keys and values for the diff.

Virtual servers with their real servers, addresses on the device, ipsets with their members, and rules of iptables.
Rules that are there only while a set has members, or once for each address, are blocks: entries that the Services
which need them have in common. A chain of ours is its blocks in the order of their places. Chains and jumps have the
keys that they have in iptables mode; `EXISTS` is from there, too.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import msgspec

from kproxy.dataplane.base import Key
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.ipvs import names
from kproxy.model import Family, Protocol, join_host_port

PERSISTENT = 0x1  # IP_VS_SVC_F_PERSISTENT
MH_PORT = 0x10  # IP_VS_SVC_F_SCHED_MH_PORT: the mh scheduler looks at source ports, too


class VirtualServerKey(NamedTuple):
    """A virtual server. Its value: a `VirtualServer`."""

    family: Family
    address: str
    protocol: Protocol
    port: int

    def __str__(self) -> str:
        return f"{join_host_port(self.address, self.port)}/{self.protocol}"


class VirtualServer(msgspec.Struct, frozen=True, gc=False):
    """How a virtual server chooses. Reading back leaves out the flags that the kernel sets by itself (hashed: 0x2)."""

    scheduler: str
    flags: int = 0  # PERSISTENT, MH_PORT
    timeout: int = 0  # seconds for which a client stays; 0 if it is not persistent


class RealServerKey(NamedTuple):
    """A real server, reached by masquerading. Its value: a `RealServer`.

    It goes with its virtual server: where the kernel removes one, the other's removal is done.
    """

    family: Family
    address: str
    protocol: Protocol
    port: int
    endpoint_address: str
    endpoint_port: int

    @property
    def virtual_server(self) -> VirtualServerKey:
        """The virtual server that it belongs to."""
        return VirtualServerKey(self.family, self.address, self.protocol, self.port)


class RealServer(msgspec.Struct, frozen=True, gc=False):
    """A real server's share of new connections; 0 where it only keeps those that it has. Ours have nothing else."""

    weight: int
    method: int = 0  # how it is reached: by masquerading (IP_VS_CONN_F_MASQ)
    upper: int = 0  # connections with which it gets no more; 0: however many it has
    lower: int = 0  # connections with which it gets some again; 0: three quarters of `upper`


class DeviceKey(NamedTuple):
    """The interface `kube-ipvs0`: dummy, down, without ARP. Its value: `EXISTS`."""

    name: str = names.DEVICE


class AddressKey(NamedTuple):
    """An address on that interface, with its full length as prefix. Its value: `EXISTS`."""

    family: Family
    address: str


class SetKind(StrEnum):
    """Types of ipset. Hash types: hashsize 1024, maxelem 65536; bitmaps: ports 0 to 65535."""

    ADDRESS = "hash:ip"
    ADDRESS_PORT = "hash:ip,port"
    ADDRESS_PORT_ADDRESS = "hash:ip,port,ip"
    ADDRESS_PORT_NETWORK = "hash:ip,port,net"
    PORT = "bitmap:port"


class SetKey(NamedTuple):
    """An ipset, by its name in the kernel: that of IPv6 is another. Its value: a `SetType`."""

    name: str


class SetType(msgspec.Struct, frozen=True, gc=False):
    """What a set holds. A bitmap is of no family in the kernel; here it has that of its rules."""

    kind: SetKind
    family: Family


class Member(NamedTuple):
    """A member of an ipset, in parts: nothing needs to be parsed to write it, or to compare it with what was read.

    Only what the kind of set has is filled. As text it is as `ipset` takes it.
    """

    address: str = ""  # canonical
    protocol: Protocol | None = None  # None in a set of ports or of addresses
    port: int = 0
    source: str = ""  # hash:ip,port,ip: an address; hash:ip,port,net: a CIDR, canonical, always with its length

    def __str__(self) -> str:
        parts = [self.address] if self.address else []
        if self.protocol:
            parts.append(f"{self.protocol.lower()}:{self.port}")
        elif not self.address:
            parts.append(str(self.port))
        if self.source:
            parts.append(self.source)
        return ",".join(parts)


class MemberKey(NamedTuple):
    """A member of a set. Its value: `EXISTS`."""

    set_name: str
    member: Member


class RuleKey(NamedTuple):
    """A block: rules that stand together in a chain of ours. Its value: a tuple of at least one rule.

    A block stands behind those with a lower place; the order of blocks with the same place means nothing. What stands
    in a chain of ours, and is no block or not in its place, has the place `STRAY`: nobody wants it.
    """

    family: Family
    table: Table
    chain: str
    place: int
    what: str = ""  # tells blocks with the same place from each other: a virtual server, or the text of a stray rule


STRAY = -1
AHEAD = -2  # in front of stray rules while these still serve; nobody wants it for long

_SHARED_SETS = frozenset(
    names.set_name(name, family)
    for name in (names.LOOP_BACK_SET, names.HEALTH_CHECK_SET, names.ADDRESSES_SET)
    for family in Family
)


def is_shared(key: Key) -> bool:
    """Whether Services can have an entry in common, so that it stays while any of them needs it.

    Servers: an address of the node as external IP, with the number of another Service's node port.
    """
    match key:
        case RuleKey() | AddressKey() | VirtualServerKey() | RealServerKey():
            return True
        case MemberKey(name):
            return name in _SHARED_SETS
        case _:
            return False
