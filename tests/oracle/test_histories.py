"""Random clusters in the real kernel: every packet fares as `explain` says, after every step of a history."""

from __future__ import annotations

from hypothesis import given

from tests.lab.packets import Lab
from tests.oracle.profile import examples
from tests.oracle.story import Story
from tests.oracle.worlds import History, histories


@examples(80)
@given(history=histories(steps=4))
def test_packets_fare_as_explained(node_lab: Lab, history: History) -> None:
    with Story(node_lab, history) as story:
        assert story.complaints() == [], "at first"
        for number, step in enumerate(history.steps, 1):
            story.go_on(step)
            assert story.complaints() == [], f"after step {number}"


@examples(40)
@given(history=histories(steps=5))
def test_what_is_refused_now_and_then_gets_there_all_the_same(node_lab: Lab, history: History) -> None:
    with Story(node_lab, history, faults=0.1) as story:
        for step in history.steps:
            story.go_on(step)
            assert story.flaws_of_the_kernel() == []
        assert story.flaws_of_packets() == []
