"""What others do to our chains with the iptables programs."""

from __future__ import annotations

import random
import re

from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.lab.namespaces import CommandError, Namespace

_PROGRAMS = {Family.IPv4: "iptables", Family.IPv6: "ip6tables"}
_LOCALHOST = {Family.IPv4: "127.0.0.1", Family.IPv6: "::1"}


def meddle(netns: Namespace, variant: Variant, how: int) -> None:
    """Change something in our chains as a stranger does; the number decides what."""
    luck = random.Random(how)
    family = luck.choice(list(Family))
    program = f"{_PROGRAMS[family]}-{variant}"
    saved = netns.command(f"{program}-save").stdout
    ours = [(table, chain) for table, chain in _chains(saved) if chain.startswith("KUBE-") and "HINT" not in chain]
    rules = [(table, rule) for table, rule in _rules(saved) if " KUBE-" in rule]
    if not ours or not rules:
        return
    table, chain = luck.choice(ours)
    rule_table, rule = luck.choice(rules)
    tail_table, tail = luck.choice([(t, c) for t, c in ours if c in ("KUBE-SERVICES", "KUBE-NODEPORTS")])
    commands = luck.choice(
        (
            [f"{program} -w -t {rule_table} -D {rule}"],
            [f"{program} -w -t {rule_table} -D {rule}"],
            [f"{program} -w -t {rule_table} -A {rule}"],  # once more
            [f"{program} -w -t {table} -F {chain}"],
            [f"{program} -w -t {table} -I {chain} -j RETURN"],
            [f"{program} -w -t {tail_table} -A {tail} -s {_LOCALHOST[family]} -j RETURN"],
            [f"{program} -w -t {table} -F {chain}", f"{program} -w -t {table} -X {chain}"],
            [f"{program} -w -t nat -N KUBE-SVC-STRANGER", f"{program} -w -t nat -A KUBE-SVC-STRANGER -j ACCEPT"],
            [f"{program} -w -t {table} -F"],
            [f"{program} -w -t {table} -F", f"{program} -w -t {table} -X"],
        )
    )
    try:
        for command in commands:
            netns.command("sh", "-c", command)
    except CommandError as error:
        if not re.search("CHAIN_DEL|CHAIN_USER_DEL|Too many links|Directory not empty|resource busy", str(error)):
            raise  # a chain that others jump to cannot be deleted


def _chains(saved: str) -> list[tuple[str, str]]:
    return sorted((table, line[1:].split()[0]) for table, line in _lines(saved) if line.startswith(":"))


def _rules(saved: str) -> list[tuple[str, str]]:
    return sorted((table, line.removeprefix("-A ")) for table, line in _lines(saved) if line.startswith("-A "))


def _lines(saved: str) -> list[tuple[str, str]]:
    table, lines = "", []
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        lines.append((table, line))
    return lines
