"""The scenarios of tests/scenarios/ in ipvs mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kproxy.model import Family
from tests.lab import scenario as scenarios
from tests.lab.namespaces import Namespace
from tests.lab.proxy import InProcess, Item, Proxy
from tests.lab.scenario import Scenario
from tests.lab.story import Story, tell

pytestmark = pytest.mark.ipvs

FOLDER = Path(__file__).parents[1] / "scenarios"
# Programs start slowly in User-Mode Linux. So what is decided before a mode comes into play is left to the other modes,
# and of scenarios that ask the same of ipvs mode only one is told.
LEFT_OUT = {
    "addresses": ("service range", "service ranges", "do not mention"),
    "affinity": ("Affinity and external", "More clients", "the node itself", "A node port that moves"),
    "combinations": ("outside the cluster", "sticky", "ranges and affinity"),
    "dual_stack": ("A Service of one family", "The second family"),
    "endpoint_choice": ("not ready", "all endpoints are terminating", "means nothing", "published", "hint", "Hints"),
    "masquerade": ("whole name", "prefix", "Only this node's pods", "highest"),
    "source_ranges": ("Blanks", "be read", "other family", "everybody", "overlap"),
    "under_traffic": ("another slice", "The number of endpoints", "starts again"),
}
IN_IPV6 = ("changes", "conntrack", "masquerade", "protocols", "source_ranges")  # the last of each
# Of how objects are read, what ipvs mode makes addresses of the node of.
OF_INPUTS = ("external address", "becomes an inner", "gone after its start")
ROUNDS_UNDER_TRAFFIC = 2  # each round is a hundred times as slow as in the other modes


def stories(family: Family) -> Iterator[Any]:
    """The scenarios of each file."""
    for path in sorted(FOLDER.glob("*.yaml")):
        told = [one for one in scenarios.read(path, family) if "ipvs" in one.modes]
        told = [one for one in told if is_told(path.stem, one.name)]
        if family is Family.IPv6:
            told = told[-1:] if path.stem in IN_IPV6 else []
        for one in told:
            yield pytest.param(one, family, id=f"{path.stem}: {one.name} ({family.name})")


def is_told(file: str, name: str) -> bool:
    """Whether a scenario says something about ipvs mode that no other does."""
    if file == "inputs":
        return any(words in name for words in OF_INPUTS)
    return not any(words in name for words in LEFT_OUT.get(file, ()))


@pytest.mark.parametrize(("told", "family"), [*stories(Family.IPv4), *stories(Family.IPv6)])
def test_scenario(told: Scenario, family: Family, make_lab) -> None:
    def one_family(netns: Namespace, config: Item) -> Proxy:
        return InProcess(netns, config, [family])

    # What is kept as it is in every family has addresses of both.
    driver = InProcess if told.families == (Family.IPv4.name,) else one_family
    lab = make_lab(addresses=told.given.node["addresses"])
    tell(told, Story(lab, told.given, family, "ipvs", driver, rounds=ROUNDS_UNDER_TRAFFIC))
