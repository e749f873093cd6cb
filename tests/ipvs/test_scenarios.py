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
# How objects are read is the same in every mode, and programs start slowly in User-Mode Linux; those of its scenarios
# that concern addresses, which ipvs mode gives to the node, are told.
OF_INPUTS = ("external", "becomes", "gone after its start", "cluster address")
ROUNDS_UNDER_TRAFFIC = 2  # each round is a hundred times as slow as in the other modes


def stories(family: Family, *, last: bool = False) -> Iterator[Any]:
    """The scenarios of each file, or the last of each."""
    for path in sorted(FOLDER.glob("*.yaml")):
        told = [one for one in scenarios.read(path, family) if "ipvs" in one.modes]
        if path.stem == "inputs":
            told = [one for one in told if any(word in one.name for word in OF_INPUTS)]
        for one in told[-1:] if last else told:
            yield pytest.param(one, family, id=f"{path.stem}: {one.name} ({family.name})")


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
