"""The judge of flows must find fault: each expectation is held against rules that do something else."""

from __future__ import annotations

import pytest

from kproxy.model import Protocol
from tests.lab.expectations import Action, Expectation, complaints
from tests.lab.flows import Flow, Origin
from tests.lab.packets import Lab

ENDPOINTS = frozenset({("10.0.1.1", 8080), ("10.0.1.2", 8080)})
BALANCED = "tcp dport 80 dnat to numgen random mod 2 map { 0 : 10.0.1.1, 1 : 10.0.1.2 }:8080"
UNEVEN = "tcp dport 80 dnat to numgen random mod 4 map { 0 : 10.0.1.1, 1 : 10.0.1.2, 2 : 10.0.1.2, 3 : 10.0.1.2 }:8080"
THREE = "tcp dport 80 dnat to numgen random mod 3 map { 0 : 10.0.1.1, 1 : 10.0.1.2, 2 : 10.0.1.3 }:8080"
MASQUERADE = "chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }"


@pytest.fixture
def service(lab: Lab):
    """Puts a rule for packets to 172.30.0.1 into the node; says what a pod's connections to it are told about."""

    def judged(rule: str, expected: Expectation, more: str = "") -> list[str]:
        chain = "filter" if rule in ("drop", "reject", "accept") else "nat"
        hook = "forward" if chain == "filter" else "prerouting"
        base = f"type {chain} hook {hook} priority 0; ip daddr 172.30.0.1 {rule};"
        lab.netns.command("nft", "-f", "-", stdin=f"table ip judge {{ chain it {{ {base} }}\n{more}\n}}")
        return complaints(lab, Flow(Origin.POD, "10.0.0.2", "172.30.0.1", 80, Protocol.TCP), expected)

    return judged


@pytest.mark.parametrize(
    ("rule", "expected", "more"),
    [
        ("drop", Expectation(Action.DROP), ""),
        ("reject", Expectation(Action.REJECT), ""),
        ("accept", Expectation(Action.PASS), ""),
        (BALANCED, Expectation(Action.DNAT, ENDPOINTS, masquerade=False), ""),
        (BALANCED, Expectation(Action.DNAT, ENDPOINTS, masquerade=True), MASQUERADE),
    ],
)
def test_what_is_right_is_accepted(service, rule: str, expected: Expectation, more: str) -> None:
    assert service(rule, expected, more) == []


@pytest.mark.parametrize(
    ("rule", "expected", "more", "complaint"),
    [
        ("drop", Expectation(Action.REJECT), "", "expected reject, but 3 of 3 were dropped"),
        ("reject", Expectation(Action.DROP), "", "expected drop, but 3 of 3 were rejected"),
        ("accept", Expectation(Action.DROP), "", "forwarded as 10.0.0.2 → 172.30.0.1:80 through eth0"),
        ("reject", Expectation(Action.PASS), "", "expected pass, but 3 of 3 were rejected"),
        (BALANCED, Expectation(Action.PASS), "", "expected pass, but"),
        (BALANCED, Expectation(Action.DNAT, ENDPOINTS, masquerade=True), "", "with the node's address as source"),
        (BALANCED, Expectation(Action.DNAT, ENDPOINTS, masquerade=False), MASQUERADE, "with its own source"),
        (THREE, Expectation(Action.DNAT, ENDPOINTS), "", "10.0.1.3:8080"),
        (BALANCED, Expectation(Action.DNAT, ENDPOINTS | {("10.0.1.3", 8080)}), "", "10.0.1.3:8080 was not reached"),
        (UNEVEN, Expectation(Action.DNAT, ENDPOINTS), "", "not equally likely"),
    ],
)
def test_what_is_wrong_is_told(service, rule: str, expected: Expectation, more: str, complaint: str) -> None:
    found = service(rule, expected, more)

    assert found
    assert complaint in "\n".join(found)
