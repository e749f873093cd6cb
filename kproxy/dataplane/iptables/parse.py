"""Reads rules as iptables-save prints them, and as they are given to iptables-restore.

Options of a rule may come in any order, as iptables has it; the order of matches is kept. What the structure cannot
express exactly is kept as text, so nothing is lost and nothing is taken for what it is not.
"""

from __future__ import annotations

import re
from ipaddress import ip_network

from kproxy.dataplane.iptables.rule import (
    ALL_BITS,
    PROBABILITY_ONE,
    PROTOCOL_NUMBERS,
    AddressType,
    AnyRule,
    Comment,
    Conntrack,
    Dnat,
    Interface,
    Jump,
    MarkMatch,
    Masquerade,
    Match,
    Network,
    Nfacct,
    NotBridged,
    OpaqueRule,
    Recent,
    Reject,
    Rule,
    SetMark,
    SetMatch,
    Statistic,
    Target,
    Transport,
    VirtualServerMatch,
)
from kproxy.model import Family

HOST_MASK = {Family.IPv4: "255.255.255.255", Family.IPv6: ":".join(["ffff"] * 8)}
REJECT_REPLY = {Family.IPv4: "icmp-port-unreachable", Family.IPv6: "icmp6-port-unreachable"}
TRANSPORTS = {name: name for name in PROTOCOL_NUMBERS} | {str(n): name for name, n in PROTOCOL_NUMBERS.items()}

_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_ESCAPE = re.compile(r"\\(.)")
_PLAIN_TARGET = re.compile(r"KUBE-[A-Z0-9-]+|ACCEPT|DROP|RETURN")

# The match that an option belongs to. (--dport is the transport protocol's.)
_OPTIONS: dict[str, str] = {
    "--comment": "comment",
    "--ctstate": "conntrack",
    "--src-type": "addrtype",
    "--dst-type": "addrtype",
    "--mark": "mark",
    "--mode": "statistic",
    "--probability": "statistic",
    "--set": "recent",
    "--rcheck": "recent",
    "--seconds": "recent",
    "--reap": "recent",
    "--name": "recent",
    "--mask": "recent",
    "--rsource": "recent",
    "--nfacct-name": "nfacct",
    "--match-set": "set",
    "--physdev-is-in": "physdev",
    "--vproto": "ipvs",
    "--vaddr": "ipvs",
    "--vport": "ipvs",
}
_TARGET_OPTIONS = {"--to-destination", "--set-xmark", "--or-mark", "--xor-mark", "--random-fully", "--reject-with"}
_FLAGS = {"--set", "--rcheck", "--reap", "--rsource", "--random-fully", "--physdev-is-in"}
_PAIRS = {"--match-set"}  # these take two words

_Options = dict[str, str]


class _UnknownError(Exception):
    """The rule has something that the structure has not."""


def parse_rule(text: str, family: Family) -> AnyRule:
    """The rule whose text follows `-A CHAIN `."""
    try:
        return _Parser(text, family).rule()
    except (_UnknownError, ValueError, KeyError, IndexError):
        return OpaqueRule(text)


class _Parser:
    def __init__(self, text: str, family: Family) -> None:
        self.family = family
        if '"' in text:
            self.words = [plain or _ESCAPE.sub(r"\1", quoted) for quoted, plain in _TOKEN.findall(text)]
        else:
            self.words = text.split()

    def rule(self) -> Rule:
        networks: dict[str, Network] = {}
        interface: Interface | None = None
        protocol = target = ""
        matches: list[tuple[str, _Options]] = []
        latest: dict[str, _Options] = {}
        target_options: _Options = {}
        inverted = False
        words = iter(self.words)
        for word in words:
            if word == "!":
                if inverted:
                    raise _UnknownError
                inverted = True
                continue
            value = "" if word in _FLAGS else next(words, None)
            if value is None:
                raise _UnknownError
            if word in _PAIRS:
                value = f"{value} {next(words, '')}"
            if word in ("-s", "-d") and word not in networks:
                networks[word] = self._network(value, inverted)
            elif word == "-i" and interface is None:
                interface = Interface(value, inverted)
            elif word in ("-p", "-j", "-m") and inverted:
                raise _UnknownError
            elif word == "-p" and not protocol:
                protocol = TRANSPORTS[value]
            elif word == "-m":
                latest[value] = {}
                matches.append((value, latest[value]))
            elif word == "-j" and not target:
                target = value
            elif word in _TARGET_OPTIONS and word not in target_options and not inverted:
                target_options[word] = value
            else:
                option = f"! {word}" if inverted else word
                owner = (protocol or matches[-1][0]) if word == "--dport" else _OPTIONS[word]
                if option in latest[owner]:
                    raise _UnknownError
                latest[owner][option] = value
            inverted = False
        if inverted:
            raise _UnknownError
        rule = Rule(
            tuple([self._match(name, options, protocol) for name, options in matches]),
            self._target(target, target_options),
            protocol,
            networks.get("-s"),
            networks.get("-d"),
            interface,
        )
        if target_options or any(options for _, options in matches):
            raise _UnknownError
        return rule

    def _network(self, text: str, inverted: bool) -> Network:
        address, _, prefix = text.partition("/")
        bits = self.family.bits
        length = int(prefix or bits)
        # The C library writes some IPv6 addresses with dots.
        if length != bits or (bits == Family.IPv6.bits and "." in address):
            return Network(str(ip_network(f"{address}/{length}")), inverted)
        return Network(f"{address}/{bits}", inverted)

    def _host(self, text: str) -> str:
        address, _, length = self._network(text, inverted=False).cidr.partition("/")
        if int(length) != self.family.bits:
            raise _UnknownError
        return address

    def _match(self, name: str, options: _Options, protocol: str) -> Match:
        """The match; takes the options that it has from `options`."""
        match name:
            case "comment":
                return Comment(options.pop("--comment"))
            case "tcp" | "udp" | "sctp" if name == protocol:
                return Transport(name, _positive(options.pop("--dport")) if "--dport" in options else 0)
            case "statistic" if options.pop("--mode") == "random":
                return Statistic(round(float(options.pop("--probability")) * PROBABILITY_ONE))
            case "recent":
                return self._recent(options)
            case "conntrack":
                inverted = "! --ctstate" in options
                return Conntrack(options.pop("! --ctstate" if inverted else "--ctstate"), inverted)
            case "addrtype":
                inverted = "! --src-type" in options
                source = options.pop("! --src-type" if inverted else "--src-type", "")
                return AddressType(source, options.pop("--dst-type", ""), inverted)
            case "mark":
                inverted = "! --mark" in options
                value, mask = _value_and_mask(options.pop("! --mark" if inverted else "--mark"))
                return MarkMatch(value, mask, inverted)
            case "nfacct":
                return Nfacct(options.pop("--nfacct-name"))
            case "set":
                set_name, parts = options.pop("--match-set").split(" ")
                if not set(parts.split(",")) <= {"src", "dst"}:
                    raise _UnknownError
                return SetMatch(set_name, parts)
            case "physdev":
                options.pop("! --physdev-is-in")
                return NotBridged()
            case "ipvs":
                protocol = TRANSPORTS[options.pop("--vproto")]
                return VirtualServerMatch(
                    protocol, self._host(options.pop("--vaddr")), _positive(options.pop("--vport"))
                )
            case _:
                raise _UnknownError

    def _recent(self, options: _Options) -> Recent:
        options.pop("--rsource", None)
        name, mask = options.pop("--name"), options.pop("--mask", HOST_MASK[self.family])
        if "--set" in options:
            options.pop("--set")
            return Recent(name, mask)
        options.pop("--rcheck")
        options.pop("--reap")
        return Recent(name, mask, _positive(options.pop("--seconds")))

    def _target(self, name: str, options: _Options) -> Target | None:
        """The target; takes the options that it has from `options`."""
        match name:
            case "":
                return None
            case "DNAT":
                return Dnat(options.pop("--to-destination"))
            case "MARK" if "--or-mark" in options:
                bits = int(options.pop("--or-mark"), 0)
                return SetMark(bits, bits)
            case "MARK" if "--xor-mark" in options:
                return SetMark(int(options.pop("--xor-mark"), 0), 0)
            case "MARK":
                return SetMark(*_value_and_mask(options.pop("--set-xmark")))
            case "MASQUERADE":
                return Masquerade(options.pop("--random-fully", None) is not None)
            case "REJECT":
                return Reject(options.pop("--reject-with", REJECT_REPLY[self.family]))
            case _ if _PLAIN_TARGET.fullmatch(name):
                return Jump(name)
            case _:
                raise _UnknownError


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise _UnknownError
    return number


def _value_and_mask(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if slash else ALL_BITS
