"""What is read while others write: while it carries out a large commit, the kernel lists chains twice, or oftener."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant, save, sections
from kproxy.dataplane.iptables.counters import RuleCounters
from kproxy.model import Family
from tests.lab.namespaces import Namespace

OTHERS = [f"OTHERS-{number}" for number in range(1000)]
RESTORE = ("iptables-nft-restore", "--noflush")
LATER = [f"LATER-{number}" for number in range(5)]
ROUNDS = 15  # without care, it goes wrong in one of fifty or less

# Prints every chain of ours twice, as often as the file beside it says.
TORN = """#!/bin/sh
read -r times <{times}
[ $times -gt 0 ] || exec {program} "$@"
echo $((times - 1)) >{times}
{program} "$@" | sed 's/^:LATER.*/&\\n&/'
"""


def with_two_rules_each(chains: Sequence[str]) -> list[str]:
    return [*(f":{chain} - [0:0]" for chain in chains), *(f"-A {chain} -j RETURN" for chain in chains for _ in "12")]


def removal(chains: Sequence[str]) -> list[str]:
    return [*(f":{chain} - [0:0]" for chain in chains), *(f"-X {chain}" for chain in chains)]


def text(commands: Sequence[str]) -> str:
    return "\n".join(["*nat", *commands, "COMMIT", ""])


def read() -> list[str]:
    """The chain of each rule."""
    return [chain for _, chain, rule in sections(save(Variant.NFT, Family.IPv4)) if rule is not None]


def count() -> list[str]:
    """The same, as the counters are read."""
    return [chain for _, chain, _ in RuleCounters(Variant.NFT)._rules(Family.IPv4, "nat")]


Look = Callable[[], list[str]]
both = pytest.mark.parametrize("look", [read, count])


@both
def test_each_rule_is_read_once_while_others_are_removed(netns: Namespace, tmp_path: Path, look: Look):
    path = tmp_path / "removal"
    path.write_text(text(removal(OTHERS)))
    reads = 0
    for _ in range(ROUNDS):
        for chains in OTHERS, LATER:
            netns.command(*RESTORE, stdin=text(with_two_rules_each(chains)))
        with netns.start([*RESTORE, str(path)]) as others:
            while others.poll() is None:
                assert [chain for chain in netns.run(look) if chain in LATER] == sorted(LATER * 2)
                reads += 1
        assert others.returncode == 0
        netns.command(*RESTORE, stdin=text(removal(LATER)))
    assert reads >= ROUNDS


@pytest.fixture
def torn(netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What holds how often `iptables-nft-save` is going to print chains twice."""
    netns.command(*RESTORE, stdin=text(with_two_rules_each(LATER)))
    times, program = tmp_path / "times", tmp_path / "iptables-nft-save"
    times.write_text("0\n")
    program.write_text(TORN.format(times=times, program=shutil.which(program.name)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return times


@both
def test_what_has_chains_twice_is_read_again(netns: Namespace, torn: Path, look: Look):
    torn.write_text("3\n")
    assert netns.run(look) == sorted(LATER * 2)
    assert torn.read_text() == "0\n"


@both
def test_who_always_prints_chains_twice_is_not_believed(
    netns: Namespace, torn: Path, look: Look, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(commands.attempts, "__defaults__", (0.2,))
    torn.write_text("1000\n")
    with pytest.raises(OSError, match=r"iptables-nft-save.* prints chains twice, again and again"):
        netns.run(look)
    assert int(torn.read_text()) < 1000 - 1


@both
def test_what_looks_like_chains_in_others_comments_is_nothing(netns: Namespace, torn: Path, look: Look):
    comment = "x\n:LATER-0 - [0:0]\n:LATER-0 - [0:0]"
    netns.command("iptables-nft", "-t", "nat", "-A", "LATER-4", "-m", "comment", "--comment", comment)
    assert netns.run(look) == [*sorted(LATER * 2), "LATER-4"]
    assert torn.read_text() == "0\n"
