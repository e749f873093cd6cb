"""Kubernetes' own proxy tests with real packets: the recorded objects in, the recorded flows through the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import pytest

from kproxy.dataplane.iptables.commands import Variant
from tests.conformance.flows import World, start_proxy, step_complaints, through_all_steps
from tests.conformance.recorded import read
from tests.lab.packets import Lab
from tests.lab.proxy import CommandLine

FLOWS = {mode: read(f"flows-{mode}.json") for mode in ("nftables", "iptables")}


def scenarios() -> list[Any]:
    """Each scenario of the modes, with the variant of iptables it is to run in."""
    variants: dict[str, list[Variant | None]] = {"nftables": [None], "iptables": list(Variant)}
    return [
        pytest.param(s | {"variant": variant}, id=f"{variant or mode}-{s['id'].partition('/')[2]}")
        for mode, recorded in FLOWS.items()
        for variant in variants[mode]
        for s in recorded["scenarios"]
    ]


@pytest.mark.parametrize("scenario", scenarios())
def test_one_proxy_through_all_steps(scenario: dict[str, Any], make_lab) -> None:
    world = World(scenario["config"], scenario["variant"])
    lab = start_lab(scenario, world, make_lab)

    assert through_all_steps(lab, world, scenario["steps"]) == []


@pytest.mark.parametrize("scenario", scenarios())
def test_a_proxy_that_is_restarted_before_each_step(scenario: dict[str, Any], make_lab) -> None:
    world = World(scenario["config"], scenario["variant"])
    lab = start_lab(scenario, world, make_lab)

    for step in scenario["steps"]:
        world.advance(step)
        with closing(start_proxy(lab, world)) as proxy:
            proxy.apply(*world.objects)
            assert step_complaints(lab, proxy, world, step) == []


@pytest.mark.parametrize("scenario", scenarios())
def test_a_fresh_proxy_for_each_step(scenario: dict[str, Any], make_lab) -> None:
    world = World(scenario["config"], scenario["variant"])

    for step in scenario["steps"]:
        world.advance(step)
        lab = start_lab(scenario, world, make_lab)
        with closing(start_proxy(lab, world)) as proxy:
            proxy.apply(*world.objects)
            assert step_complaints(lab, proxy, world, step) == []


@pytest.mark.parametrize("scenario", [s for s in scenarios() if s.id.startswith("nftables")][-1:])
def test_the_command_line_does_the_same(scenario: dict[str, Any], make_lab) -> None:
    world = World(scenario["config"], scenario["variant"])
    lab = start_lab(scenario, world, make_lab)

    for step in scenario["steps"]:
        world.advance(step)
        with closing(CommandLine(lab.netns, world.configuration())) as proxy:
            proxy.apply(*world.objects)
            assert step_complaints(lab, proxy, world, step) == []


def start_lab(scenario: Mapping[str, Any], world: World, make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(**world.lab_arguments())
    if scenario["config"].get("conntrack_tcp_be_liberal"):
        lab.netns.sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", 1)
    if "initial_kernel_state" in scenario:
        lab.netns.command("nft", "-f", "-", stdin=scenario["initial_kernel_state"])
    return lab
