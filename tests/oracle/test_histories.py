"""Random clusters in the real kernel: every packet fares as `explain` says, after every step of a history."""

from __future__ import annotations

import pytest
from hypothesis import given

from kproxy.dataplane.iptables.commands import Variant
from tests.lab.packets import Lab
from tests.oracle.profile import examples
from tests.oracle.story import Story
from tests.oracle.worlds import History, histories


@examples(80)
@given(history=histories(steps=4))
def test_packets_fare_as_explained(node_lab: Lab, history: History) -> None:
    tell(node_lab, history, None)


@pytest.mark.parametrize("variant", list(Variant))
@examples(25)
@given(history=histories(steps=4))
def test_packets_fare_as_explained_in_iptables_mode(node_lab: Lab, variant: Variant, history: History) -> None:
    tell(node_lab, history, variant)


def tell(lab: Lab, history: History, variant: Variant | None) -> None:
    with Story(lab, history, variant=variant) as story:
        assert story.complaints() == [], "at first"
        for number, step in enumerate(history.steps, 1):
            story.go_on(step)
            assert story.complaints() == [], f"after step {number}"


@examples(40)
@given(history=histories(steps=5))
def test_what_is_refused_now_and_then_gets_there_all_the_same(node_lab: Lab, history: History) -> None:
    tell_with_faults(node_lab, history, None)


@pytest.mark.parametrize("variant", list(Variant))
@examples(10)
@given(history=histories(steps=5))
def test_what_is_refused_now_and_then_gets_there_in_iptables_mode(
    node_lab: Lab, variant: Variant, history: History
) -> None:
    tell_with_faults(node_lab, history, variant)


def tell_with_faults(lab: Lab, history: History, variant: Variant | None) -> None:
    with Story(lab, history, variant=variant, faults=0.1) as story:
        for step in history.steps:
            story.go_on(step)
            assert story.flaws_of_the_kernel() == []
        assert story.flaws_of_packets() == []
