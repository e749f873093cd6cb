"""What must become of a flow, tried with real packets as often as it takes to be sure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from kproxy.model import join_host_port
from tests.lab.flows import Fate, Flow, Origin, Outcome
from tests.lab.packets import Lab

TRIES_PER_ENDPOINT = 200
TRIES_PER_ENDPOINT_FROM_NODE = 40  # these are real sockets, one after the other
TURNS = 3  # of each endpoint, where they take turns

Endpoint = tuple[str, int]


class Action(StrEnum):
    """What the proxy does with a connection."""

    DNAT = "dnat"
    DROP = "drop"
    REJECT = "reject"
    PASS = "pass"  # it goes on as if there were no proxy


class Expectation(NamedTuple):
    """`endpoints`: all of them are reached, no others, equally often. `masquerade` None: not looked at.

    `in_turn`: connections go round the endpoints; otherwise chance decides.
    """

    action: Action
    endpoints: frozenset[Endpoint] = frozenset()
    masquerade: bool | None = None
    in_turn: bool = False


def complaints(
    lab: Lab, flow: Flow, expected: Expectation, *, before_each_try: Callable[[], None] | None = None
) -> list[str]:
    """What a user of the connection would complain about; empty if everything is as expected.

    `before_each_try` makes tries independent where earlier ones have consequences (session affinity); they are fewer
    then.
    """
    if before_each_try is None:
        outcomes = lab.send_many([flow] * _tries(flow, expected))
    else:
        outcomes = []
        for _ in range(20 * max(1, len(expected.endpoints)) if len(expected.endpoints) > 1 else 3):
            before_each_try()
            outcomes.append(lab.send(flow))
    wrong = Counter(filter(None, (misses(lab, flow, expected, outcome) for outcome in outcomes)))
    found = [
        f"{flow}: expected {_words(expected)}, but {count} of {len(outcomes)} were {what}"
        for what, count in wrong.items()
    ]
    if found or expected.action is not Action.DNAT:
        return found
    reached = Counter((outcome.destination, outcome.port) for outcome in outcomes)
    found = [
        f"{flow}: {join_host_port(*e)} was not reached by any of {len(outcomes)}"
        for e in expected.endpoints - reached.keys()
    ]
    if not found and expected.in_turn and len(set(reached.values())) > 1:
        found = [f"{flow}: endpoints do not take turns: {dict(reached)}"]
    if not found and _uneven(reached):
        found = [f"{flow}: endpoints are not equally likely: {dict(reached)}"]
    return found or _broken(lab, flow)


def misses(lab: Lab, flow: Flow, expected: Expectation, outcome: Outcome) -> str:
    """The outcome of one connection in words if it is not the expected one."""
    went = outcome.fate in (Fate.FORWARDED, Fate.DELIVERED)
    target, masqueraded = (outcome.destination, outcome.port), outcome.source != flow.source
    match expected.action:
        case Action.DROP:
            right = outcome.fate is Fate.DROPPED
        case Action.REJECT:
            right = outcome.fate is Fate.REJECTED
        case Action.PASS:
            right = went and target == (flow.destination, flow.port) and not masqueraded
        case Action.DNAT:
            right = went and target in expected.endpoints and _source_is_right(lab, flow, expected, outcome)
    return "" if right else str(outcome)


def _source_is_right(lab: Lab, flow: Flow, expected: Expectation, outcome: Outcome) -> bool:
    """A connection that ends on the node itself is past the point at which sources are replaced."""
    if expected.masquerade and outcome.fate is Fate.FORWARDED:
        return outcome.source != flow.source and outcome.source in lab.node.addresses
    return expected.masquerade is None or outcome.source == flow.source


def _broken(lab: Lab, flow: Flow) -> list[str]:
    """Whether a connection goes on after its first packet."""
    connection = lab.open(flow)
    try:
        if connection.outcome.fate is not Fate.FORWARDED:
            return []
        flaw = lab.converse(connection).flaw(connection)
    finally:
        connection.close()
    return [flaw] if flaw else []


def _tries(flow: Flow, expected: Expectation) -> int:
    if len(expected.endpoints) < 2:
        return 3
    if expected.in_turn:
        return TURNS * len(expected.endpoints)
    each = TRIES_PER_ENDPOINT_FROM_NODE if flow.origin is Origin.NODE else TRIES_PER_ENDPOINT
    return each * len(expected.endpoints)


def _uneven(reached: Counter[Endpoint]) -> bool:
    """Whether chance alone makes such an uneven distribution less than once in a milliard times (χ²)."""
    freedom = len(reached) - 1
    if freedom == 0:
        return False
    mean = reached.total() / len(reached)
    chi_squared = sum((count - mean) ** 2 / mean for count in reached.values())
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's approximation, six standard deviations out
    return chi_squared > freedom * (1 - spread + 6 * math.sqrt(spread)) ** 3


def _words(expected: Expectation) -> str:
    if expected.action is not Action.DNAT:
        return str(expected.action)
    where = ", ".join(join_host_port(*e) for e in sorted(expected.endpoints))
    sources: dict[bool | None, str] = {
        None: "",
        True: " with the node's address as source",
        False: " with its own source",
    }
    return f"dnat to {where}{sources[expected.masquerade]}"
