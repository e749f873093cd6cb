"""A rule of iptables or ip6tables as one structured value, and how iptables-save prints it (reference: section 4.1.4).

Every value has the canonical form in which the kernel gives it back: networks with their length, marks with their
mask, probabilities as 31-bit fractions. So rules that do the same compare as equal, whoever wrote them.
`kproxy.dataplane.iptables.parse` is the way back.
"""

from __future__ import annotations

import re
from typing import ClassVar

import msgspec

from kproxy.model import Protocol

_UNQUOTED = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPED = re.compile(r"""(["'\\])""")
PROBABILITY_ONE = 1 << 31
ALL_BITS = 0xFFFFFFFF
PROTOCOL_NUMBERS = {protocol.lower(): protocol.number for protocol in Protocol}


class Network(msgspec.Struct, frozen=True, gc=False):
    """`-s` or `-d`."""

    cidr: str  # canonical, with its length: 10.0.0.1/32
    inverted: bool = False


class Interface(msgspec.Struct, frozen=True, gc=False):
    """`-i`."""

    name: str  # ends in "+" if it is a prefix
    inverted: bool = False


class Comment(msgspec.Struct, frozen=True, gc=False):
    """`-m comment`."""

    text: str

    def __str__(self) -> str:
        return f"-m comment --comment {_quoted(self.text)}"


class Conntrack(msgspec.Struct, frozen=True, gc=False):
    """`-m conntrack`: the state of the packet's connection is, or is not, one of these."""

    states: str  # such as RELATED,ESTABLISHED, in iptables' order
    inverted: bool = False

    def __str__(self) -> str:
        return f"-m conntrack {'! ' if self.inverted else ''}--ctstate {self.states}"


class AddressType(msgspec.Struct, frozen=True, gc=False):
    """`-m addrtype`: what routing makes of the source or the destination, such as LOCAL."""

    source: str = ""
    destination: str = ""
    source_inverted: bool = False

    def __str__(self) -> str:
        source = f"{' !' if self.source_inverted else ''} --src-type {self.source}" if self.source else ""
        destination = f" --dst-type {self.destination}" if self.destination else ""
        return f"-m addrtype{source}{destination}"


class MarkMatch(msgspec.Struct, frozen=True, gc=False):
    """`-m mark`: the packet's mark, masked, has this value."""

    value: int
    mask: int
    inverted: bool = False

    def __str__(self) -> str:
        mask = "" if self.mask == ALL_BITS else f"/{self.mask:#x}"
        return f"-m mark {'! ' if self.inverted else ''}--mark {self.value:#x}{mask}"


class Statistic(msgspec.Struct, frozen=True, gc=False):
    """`-m statistic --mode random`."""

    probability: int  # in 2**-31, as the kernel has it

    def __str__(self) -> str:
        return f"-m statistic --mode random --probability {self.probability / PROBABILITY_ONE:.11f}"


class Recent(msgspec.Struct, frozen=True, gc=False):
    """`-m recent` by source: notes the client in a list, or asks whether it was noted in the last `seconds`.

    Asking also drops what is older from the list.
    """

    name: str
    mask: str  # of the address: 255.255.255.255
    seconds: int = 0  # 0: notes

    def __str__(self) -> str:
        what = f"--rcheck --seconds {self.seconds} --reap" if self.seconds else "--set"
        return f"-m recent {what} --name {self.name} --mask {self.mask} --rsource"


class Nfacct(msgspec.Struct, frozen=True, gc=False):
    """`-m nfacct`: counts packets in an object that exists outside the rule."""

    name: str

    def __str__(self) -> str:
        return f"-m nfacct --nfacct-name  {self.name}"  # iptables-save has two blanks here


class Transport(msgspec.Struct, frozen=True, gc=False):
    """`-m tcp`, `-m udp` or `-m sctp`."""

    protocol: str
    destination_port: int = 0  # 0: any

    def __str__(self) -> str:
        return f"-m {self.protocol} --dport {self.destination_port}" if self.destination_port else f"-m {self.protocol}"


class SetMatch(msgspec.Struct, frozen=True, gc=False):
    """`-m set`: these parts of the packet together are a member of an ipset."""

    name: str
    parts: str  # src or dst for each dimension of the set: dst,dst

    def __str__(self) -> str:
        return f"-m set --match-set {self.name} {self.parts}"


class NotBridged(msgspec.Struct, frozen=True, gc=False):
    """`-m physdev ! --physdev-is-in`: the packet did not come in through a port of a bridge."""

    def __str__(self) -> str:
        return "-m physdev ! --physdev-is-in"


class VirtualServerMatch(msgspec.Struct, frozen=True, gc=False):
    """`-m ipvs`: the packet's connection goes through a virtual server of IPVS."""

    protocol: str  # tcp, udp or sctp
    address: str
    port: int

    def __str__(self) -> str:
        return f"-m ipvs --vproto {PROTOCOL_NUMBERS[self.protocol]} --vaddr {self.address} --vport {self.port}"


Match = (
    Comment
    | Conntrack
    | AddressType
    | MarkMatch
    | Statistic
    | Recent
    | Nfacct
    | Transport
    | SetMatch
    | NotBridged
    | VirtualServerMatch
)


class Jump(msgspec.Struct, frozen=True, gc=False):
    """To another chain, or one of the verdicts ACCEPT, DROP and RETURN."""

    to: str

    def __str__(self) -> str:
        return f"-j {self.to}"


class Dnat(msgspec.Struct, frozen=True, gc=False):
    """Sends the connection somewhere else."""

    destination: str  # address:port, an IPv6 address in brackets

    def __str__(self) -> str:
        return f"-j DNAT --to-destination {self.destination}"


class SetMark(msgspec.Struct, frozen=True, gc=False):
    """Clears the bits of `mask` in the packet's mark, then flips those of `value`.

    With both the same it sets bits (`--or-mark`), with an empty mask it flips them (`--xor-mark`).
    """

    value: int
    mask: int

    def __str__(self) -> str:
        return f"-j MARK --set-xmark {self.value:#x}/{self.mask:#x}"


class Masquerade(msgspec.Struct, frozen=True, gc=False):
    """Gives the connection the address of the outgoing interface as its source."""

    random_fully: bool = False

    def __str__(self) -> str:
        return "-j MASQUERADE --random-fully" if self.random_fully else "-j MASQUERADE"


class Reject(msgspec.Struct, frozen=True, gc=False):
    """Answers with an ICMP error."""

    reply: str  # icmp-port-unreachable, or icmp6-port-unreachable

    def __str__(self) -> str:
        return f"-j REJECT --reject-with {self.reply}"


Target = Jump | Dnat | SetMark | Masquerade | Reject


class Rule(msgspec.Struct, frozen=True, gc=False):
    """A rule of kinds that kube-proxy writes. The chain it stands in is not part of it."""

    matches: tuple[Match, ...] = ()
    target: Target | None = None  # None: it only counts
    protocol: str = ""  # tcp, udp or sctp; empty: any
    source: Network | None = None
    destination: Network | None = None
    in_interface: Interface | None = None

    def __str__(self) -> str:
        parts = []
        if self.source:
            parts.append(f"! -s {self.source.cidr}" if self.source.inverted else f"-s {self.source.cidr}")
        if self.destination:
            parts.append(
                f"! -d {self.destination.cidr}" if self.destination.inverted else f"-d {self.destination.cidr}"
            )
        if self.in_interface:
            name = self.in_interface.name
            parts.append(f"! -i {name}" if self.in_interface.inverted else f"-i {name}")
        if self.protocol:
            parts.append(f"-p {self.protocol}")
        parts += map(str, self.matches)
        if self.target:
            parts.append(str(self.target))
        return " ".join(parts)

    @property
    def comment(self) -> str:
        """The text of its first comment; empty if it has none."""
        return next((match.text for match in self.matches if isinstance(match, Comment)), "")


class OpaqueRule(msgspec.Struct, frozen=True, gc=False):
    """A rule of a kind that kube-proxy never writes, as iptables-save prints it."""

    text: str

    # Whoever wrote it, it belongs to no service.
    comment: ClassVar[str] = ""
    target: ClassVar[Target | None] = None
    protocol: ClassVar[str] = ""

    def __str__(self) -> str:
        return self.text


AnyRule = Rule | OpaqueRule


def probability(count: int) -> int:
    """The chance of one in `count`, in 2**-31, as it comes out when given with kube-proxy's ten digits."""
    return round(float(f"{1 / count:.10f}") * PROBABILITY_ONE)


def _quoted(text: str) -> str:
    return text if _UNQUOTED.fullmatch(text) else '"' + _ESCAPED.sub(r"\\\1", text) + '"'
