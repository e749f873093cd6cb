"""The scenarios of tests/scenarios/ in ipvs mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kproxy.model import Family
from tests.lab import scenario as scenarios
from tests.lab.namespaces import Namespace
from tests.lab.packets import Lab
from tests.lab.proxy import CommandLine, InProcess, Item, Proxy
from tests.lab.scenario import Scenario
from tests.lab.story import Story, tell

pytestmark = pytest.mark.ipvs

FOLDER = Path(__file__).parents[1] / "scenarios"
# What is decided before a mode comes into play is tried in the other modes: programs start slowly in User-Mode Linux.
DECIDED_BEFORE = {
    "addresses": ("service range", "service ranges", "do not mention"),
    "endpoint_choice": ("not ready", "all endpoints are terminating", "means nothing", "published", "hint", "Hints"),
    "source_ranges": ("Blanks", "be read", "other family", "everybody"),
}
# Of how objects are read, what ipvs mode makes addresses of the node of.
OF_INPUTS = ("external address", "becomes an inner", "gone after its start")
ROUNDS_UNDER_TRAFFIC = 2  # each round is a hundred times as slow as in the other modes


def stories(family: Family, *, last: bool = False) -> Iterator[Any]:
    """The scenarios of each file, or the last of each."""
    for path in sorted(FOLDER.glob("*.yaml")):
        told = [one for one in scenarios.read(path, family) if "ipvs" in one.modes]
        told = [one for one in told if is_decided_here(path.stem, one.name)]
        for one in told[-1:] if last else told:
            yield pytest.param(one, family, id=f"{path.stem}: {one.name} ({family.name})")


def is_decided_here(file: str, name: str) -> bool:
    """Whether a scenario says something about ipvs mode."""
    if file == "inputs":
        return any(words in name for words in OF_INPUTS)
    return not any(words in name for words in DECIDED_BEFORE.get(file, ()))


def tell_by(driver: Any, told: Scenario, family: Family, lab: Lab) -> None:
    tell(told, Story(lab, told.given, family, "ipvs", driver, rounds=ROUNDS_UNDER_TRAFFIC))


@pytest.mark.parametrize(("told", "family"), [*stories(Family.IPv4), *stories(Family.IPv6, last=True)])
def test_scenario(told: Scenario, family: Family, make_lab) -> None:
    def one_family(netns: Namespace, config: Item) -> Proxy:
        return InProcess(netns, config, [family])

    # What is kept as it is in every family has addresses of both.
    driver = InProcess if told.families == (Family.IPv4.name,) else one_family
    tell_by(driver, told, family, make_lab(addresses=told.given.node["addresses"]))


def test_scenario_by_the_command_line(make_lab) -> None:
    [told] = [
        one for one in scenarios.read(FOLDER / "changes.yaml", Family.IPv4) if one.name.startswith("Ports are added")
    ]
    tell_by(CommandLine, told, Family.IPv4, make_lab(addresses=told.given.node["addresses"]))
