"""The scenarios of tests/scenarios/ with real packets, in both families and every mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.lab import scenario as scenarios
from tests.lab.packets import Lab
from tests.lab.proxy import HINT, CommandLine, InProcess
from tests.lab.scenario import Scenario
from tests.lab.story import Story, tell

FOLDER = Path(__file__).parent / "scenarios"
MODES: dict[str, tuple[str, Variant | None]] = {
    "nftables": ("nftables", None),
    "iptables-nft": ("iptables", Variant.NFT),
    "iptables-legacy": ("iptables", Variant.LEGACY),
}


def stories(families: Iterable[Family] = Family) -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.yaml")):
        for family in families:
            for told in scenarios.read(path, family):
                for name, (mode, variant) in MODES.items():
                    if mode in told.modes and is_told(told, family, variant):
                        words = f"{path.stem}: {told.name} ({family.name}, {name})"
                        yield pytest.param(told, family, mode, variant, id=words)


def is_told(told: Scenario, family: Family, variant: Variant | None) -> bool:
    """Both variants get the same rules, so not everything is told in all four ways.

    How legacy tables are written is tried with IPv4 and with dual stack; what takes waiting, once.
    """
    if variant and any(step.wait for step in told.steps):
        return (family, variant) == (Family.IPv4, Variant.NFT)
    return (family, variant) != (Family.IPv6, Variant.LEGACY)


@pytest.mark.parametrize(("told", "family", "mode", "variant"), list(stories()))
def test_scenario(told: Scenario, family: Family, mode: str, variant: Variant | None, make_lab) -> None:
    lab = node(told, variant, make_lab)
    tell(told, Story(lab, told.given, family, mode, InProcess))


def one_of_each_file() -> list[Any]:
    """The last quiet scenario of every file, in nftables mode and by turns in the variants of iptables mode."""
    quiet = [story for story in stories([Family.IPv4]) if not any(step.during for step in story.values[0].steps)]
    last = {(story.id.partition(":")[0], story.values[3]): story for story in quiet}
    turns = cycle(Variant)
    variants = {file: next(turns) for file in dict.fromkeys(file for file, _ in last)}
    return [story for (file, variant), story in last.items() if variant in (None, variants[file])]


@pytest.mark.parametrize(("told", "family", "mode", "variant"), one_of_each_file())
def test_scenario_by_the_command_line(
    told: Scenario, family: Family, mode: str, variant: Variant | None, make_lab
) -> None:
    lab = node(told, variant, make_lab)
    tell(told, Story(lab, told.given, family, mode, CommandLine))


def node(told: Scenario, variant: Variant | None, make_lab) -> Lab:
    """The node of a scenario, on which kubelet uses a variant of iptables."""
    lab: Lab = make_lab(addresses=told.given.node["addresses"])
    if variant:
        lab.netns.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
    return lab
