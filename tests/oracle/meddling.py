"""What others may do to our tables where nothing keeps them from it."""

from __future__ import annotations

import random

from kproxy.dataplane.base import Change, Entries
from kproxy.dataplane.nftables.containers import CONTAINERS
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import ChainKey, SetKey
from kproxy.model import Family
from tests.lab.namespaces import Namespace
from tests.oracle.kernels import WITHOUT_OWNER

_WORDS = {Family.IPv4: "ip", Family.IPv6: "ip6"}


def meddle(netns: Namespace, how: int) -> None:
    """Change something in our tables as a stranger does; the number decides what."""
    luck = random.Random(how)
    with netns.run(NftablesKernel, tuple(Family), WITHOUT_OWNER) as stranger:
        there = netns.run(stranger.read)
        if not there:
            return
        change = luck.choice((_remove_elements, _redirect_endpoints, _by_nft, _by_nft, _by_nft))
        change(luck, netns, stranger, there)


def _remove_elements(luck: random.Random, _: Namespace, stranger: NftablesKernel, there: Entries) -> None:
    elements = sorted(key for key in there if isinstance(key, bytes))
    stranger.apply([Change(key, there[key], None) for key in luck.sample(elements, min(len(elements), 6))])


def _redirect_endpoints(luck: random.Random, _: Namespace, stranger: NftablesKernel, there: Entries) -> None:
    endpoints = sorted(k for k in there if isinstance(k, bytes) and isinstance(there[k], bytes))
    changes = []
    for key in luck.sample(endpoints, min(len(endpoints), 4)):
        old = there[key]
        assert isinstance(old, bytes)
        changes.append(Change(key, old, old[:3] + bytes([old[3] ^ 7]) + old[4:]))
    stranger.apply(changes)


def _by_nft(luck: random.Random, netns: Namespace, _: NftablesKernel, there: Entries) -> None:
    chains = sorted((_WORDS[k.family], k.name) for k in there if isinstance(k, ChainKey))
    containers = sorted((_WORDS[k.family], k.name) for k in there if isinstance(k, SetKey))
    family, chain = luck.choice(chains)
    sort, name = _sort_and_name(luck.choice(containers))
    commands: tuple[str, ...] = (
        f"flush chain {family} kproxy {chain}",
        f"insert rule {family} kproxy {chain} counter accept",
        f"add rule {family} kproxy {chain} drop",
        f"flush {sort} {name}",
        f"flush {sort} {name}",
        f"add chain {family} kproxy extra {{ type filter hook forward priority 1; policy drop; }}",
        f"add set {family} kproxy extra {{ type ipv4_addr; }}",
        "add element ip kproxy no-endpoints { 10.0.1.1 . tcp . 8080 : drop, 198.51.100.81 . tcp . 81 : drop }",
        "add element ip kproxy cluster-ips { 198.51.100.81, 10.0.1.1 }",
        f"delete table {family} kproxy",
        "flush ruleset",
        f"delete chain {family} kproxy nat-prerouting",
        "add table ip kproxy { flags dormant; }",
    )
    netns.command("nft", luck.choice(commands))


def _sort_and_name(where: tuple[str, str]) -> tuple[str, str]:
    family, name = where
    found = next(c for c in CONTAINERS.values() if c.name == name)
    return ("map" if found.data else "set"), f"{family} kproxy {name}"
