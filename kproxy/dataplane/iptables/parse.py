"""Reads rules as iptables-save prints them, and as they are given to iptables-restore.

Options of a rule may come in any order, as iptables has it; the order of matches is kept. What the structure cannot
express exactly is kept as text, so nothing is lost and nothing is taken for what it is not.
"""

from __future__ import annotations

import re
from ipaddress import ip_network

from kproxy.dataplane.iptables.rule import (
    PROBABILITY_ONE,
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
    OpaqueRule,
    Recent,
    Reject,
    Rule,
    SetMark,
    Statistic,
    Target,
    Transport,
)
from kproxy.model import Family

HOST_MASK = {Family.IPv4: "255.255.255.255", Family.IPv6: ":".join(["ffff"] * 8)}
REJECT_REPLY = {Family.IPv4: "icmp-port-unreachable", Family.IPv6: "icmp6-port-unreachable"}
TRANSPORTS = {"tcp": "tcp", "udp": "udp", "sctp": "sctp", "6": "tcp", "17": "udp", "132": "sctp"}
ALL_BITS = 0xFFFFFFFF

_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_ESCAPE = re.compile(r"\\(.)")
_PLAIN_CHAIN = re.compile(r"KUBE-[A-Z0-9-]+|ACCEPT|DROP|RETURN")

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
}
_TARGET_OPTIONS = {
    "--to-destination",
    "--set-xmark",
    "--or-mark",
    "--xor-mark",
    "--random-fully",
    "--reject-with",
}
_FLAGS = {"--set", "--rcheck", "--reap", "--rsource", "--random-fully"}

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
            elif word in _TARGET_OPTIONS and not inverted:
                target_options[word] = value
            else:
                option = f"! {word}" if inverted else word
                owner = protocol or matches[-1][0] if word == "--dport" else _OPTIONS[word]
                if option in latest[owner]:
                    raise _UnknownError
                latest[owner][option] = value
            inverted = False
        if inverted:
            raise _UnknownError
        return Rule(
            tuple(self._match(name, options, protocol) for name, options in matches),
            self._target(target, target_options),
            protocol,
            networks.get("-s"),
            networks.get("-d"),
            interface,
        )

    def _network(self, text: str, inverted: bool) -> Network:
        address, _, length = text.partition("/")
        if "/" not in text:
            text = f"{address}/{self.family.bits}"
        elif int(length) != self.family.bits:
            text = str(ip_network(text))
        return Network(text, inverted)

    def _match(self, name: str, options: _Options, protocol: str) -> Match:
        match name, *options.items():
            case "comment", ("--comment", text):
                return Comment(text)
            case "conntrack", ("--ctstate" | "! --ctstate" as option, states):
                return Conntrack(states, option.startswith("!"))
            case "addrtype", ("--src-type", kind):
                return AddressType(source=kind)
            case "addrtype", ("--dst-type", kind):
                return AddressType(destination=kind)
            case "mark", ("--mark" | "! --mark" as option, mark):
                return MarkMatch(*_value_and_mask(mark), option.startswith("!"))
            case "statistic", ("--mode", "random"), ("--probability", probability):
                return Statistic(round(float(probability) * PROBABILITY_ONE))
            case "recent", *_:
                return self._recent(options)
            case "nfacct", ("--nfacct-name", counter):
                return Nfacct(counter)
            case _ if name == protocol and not options.keys() - {"--dport"}:
                return Transport(name, int(options.get("--dport", 0)))
        raise _UnknownError

    def _recent(self, options: _Options) -> Recent:
        name, mask = options.pop("--name"), options.pop("--mask", HOST_MASK[self.family])
        options.pop("--rsource", None)
        if options.keys() == {"--set"}:
            return Recent(name, mask)
        if options.keys() == {"--rcheck", "--seconds", "--reap"} and int(options["--seconds"]) > 0:
            return Recent(name, mask, int(options["--seconds"]))
        raise _UnknownError

    def _target(self, name: str, options: _Options) -> Target | None:
        match name, *options.items():
            case ("",):
                return None
            case "DNAT", ("--to-destination", destination):
                return Dnat(destination)
            case "MARK", ("--set-xmark", mark):
                return SetMark(*_value_and_mask(mark))
            case "MARK", ("--or-mark", mark):
                return SetMark(int(mark, 0), int(mark, 0))
            case "MARK", ("--xor-mark", mark):
                return SetMark(int(mark, 0), 0)
            case ("MASQUERADE",):
                return Masquerade()
            case "MASQUERADE", ("--random-fully", _):
                return Masquerade(random_fully=True)
            case ("REJECT",):
                return Reject(REJECT_REPLY[self.family])
            case "REJECT", ("--reject-with", reply):
                return Reject(reply)
            case _ if not options and _PLAIN_CHAIN.fullmatch(name):
                return Jump(name)
        raise _UnknownError


def _value_and_mask(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if slash else ALL_BITS
