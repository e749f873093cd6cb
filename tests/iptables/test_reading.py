"""What is read while others write: while it carries out a large commit, the kernel lists chains twice, or oftener."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kproxy.dataplane.iptables.commands import Variant, save, sections
from kproxy.dataplane.iptables.counters import RuleCounters
from kproxy.model import Family
from tests.lab.namespaces import Namespace

OTHERS = [f"OTHERS-{number}" for number in range(1000)]
LATER = [f"LATER-{number}" for number in range(5)]
ROUNDS = 40  # without care, every twentieth or so is read wrongly


def with_two_rules_each(chains: Sequence[str]) -> list[str]:
    return [*(f":{chain} - [0:0]" for chain in chains), *(f"-A {chain} -j RETURN" for chain in chains for _ in "12")]


def removal(chains: Sequence[str]) -> list[str]:
    return [*(f":{chain} - [0:0]" for chain in chains), *(f"-X {chain}" for chain in chains)]


def text(commands: Sequence[str]) -> str:
    return "\n".join(["*nat", *commands, "COMMIT", ""])


def read() -> list[str]:
    """The chain of each rule."""
    return [chain for _, chain, rule in sections(save(Variant.NFT, Family.IPv4, ["nat"])) if rule is not None]


def count() -> list[str]:
    """The same, as the counters are read."""
    return [chain for _, chain, _ in RuleCounters(Variant.NFT)._rules(Family.IPv4, "nat")]


@pytest.mark.parametrize("look", [read, count])
def test_each_rule_is_read_once_while_others_are_removed(
    netns: Namespace, tmp_path: Path, look: Callable[[], list[str]]
):
    path = tmp_path / "removal"
    path.write_text(text(removal(OTHERS)))
    restore = ("iptables-nft-restore", "--noflush")
    reads = 0
    for _ in range(ROUNDS):
        for chains in OTHERS, LATER:
            netns.command(*restore, stdin=text(with_two_rules_each(chains)))
        others = netns.start([*restore, str(path)])
        while others.poll() is None:
            assert [chain for chain in netns.run(look) if chain in LATER] == sorted(LATER * 2)
            reads += 1
        assert others.wait() == 0
        netns.command(*restore, stdin=text(removal(LATER)))
    assert reads >= ROUNDS
