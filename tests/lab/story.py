"""A scenario as it is told: a proxy on the node of a packet lab, and what becomes of packets after each step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from kproxy.model import Family, join_host_port
from tests.lab import scenario as scenarios
from tests.lab.expectations import complaints, misses
from tests.lab.flows import Connection, Fate, Flow
from tests.lab.namespaces import Namespace
from tests.lab.packets import Lab
from tests.lab.proxy import Item, Proxy
from tests.lab.scenario import FlowSpec, Objects, Scenario, Step

CONNECTIONS_PER_CLIENT = 5
CONNECTIONS_AT_ONCE = 16
ROUNDS_UNDER_TRAFFIC = 10


def tell(told: Scenario, story: Story) -> None:
    """Tell all of a scenario. Raises AssertionError with what is not as it should be."""
    try:
        story.begin()
        _nothing_in(story.complaints(told.then), "at first")
        for step in told.steps:
            if step.during:
                _nothing_in(story.change_under_traffic(step), f"while {step.when}")
            else:
                story.change(step.changes, step.restart)
            # The kernel counts the timeouts of session affinity; its clock cannot be moved.
            time.sleep(step.wait)
            _nothing_in(story.complaints(step.then), f"when {step.when}")
    finally:
        story.end()


def _nothing_in(found: list[str], when: str) -> None:
    if found:
        raise AssertionError("\n".join([f"{when}:", *found]))


class Story:
    """A scenario as it goes on. `driver` makes the proxy, in the node's namespace and with a configuration.

    `rounds`: how often a change is made and taken back under traffic.
    """

    def __init__(
        self,
        lab: Lab,
        given: Objects,
        family: Family,
        mode: str,
        driver: Callable[[Namespace, Item], Proxy],
        *,
        rounds: int = ROUNDS_UNDER_TRAFFIC,
    ) -> None:
        self._rounds = rounds
        self._lab = lab
        self._now = given
        self._family = family
        self._mode = mode
        self._driver = driver
        self._proxy = self._new_proxy()
        self._kept: dict[str, Connection] = {}
        self._remembered: dict[str, Mapping[str, str]] = {}

    def begin(self) -> None:
        """Everything that is given is there."""
        self._proxy.apply(*scenarios.surroundings(self._now), *scenarios.items(self._now, self._family))
        self._proxy.sync()

    def change_under_traffic(self, step: Step) -> list[str]:
        """Make the change, and take it back, many times over while connections come. What they complain about."""
        undone = step.changes.undone(self._now)
        wanted = [
            (flow, scenarios.expectation(spec, self._mode))
            for spec in step.during
            for flow in scenarios.flows(spec, self._family)
        ] * CONNECTIONS_AT_ONCE
        flows = [flow for flow, _ in wanted]
        found: set[str] = set()

        def to_and_fro() -> None:
            for _ in range(self._rounds):
                self.change(step.changes, step.restart)
                self.change(undone, step.restart)
            self.change(step.changes, step.restart)

        with ThreadPoolExecutor(max_workers=1) as other:
            changing = other.submit(to_and_fro)
            while not changing.done():
                outcomes = self._lab.send_many(flows)
                for (flow, expected), outcome in zip(wanted, outcomes, strict=True):
                    if wrong := misses(self._lab, flow, expected, outcome):
                        found.add(f"{flow} was {wrong}")
                self._lab.flush_conntrack()
            changing.result()
        return sorted(found)

    def change(self, changes: Objects, restart: bool) -> None:
        """Something changes, and the proxy hears of it."""
        self._now = changes.over(self._now)
        for address in changes.node.get("addresses", []):
            if address not in self._lab.node.addresses:
                self._lab.node.add_address(address)
        if restart:
            self._proxy.close()
            self._proxy = self._new_proxy()
            self.begin()
            return
        changed = Objects(services=_present(changes.services), slices=_present(changes.slices))
        gone = Objects(
            services={name: None for name, given in changes.services.items() if given is None},
            slices={name: None for name, given in changes.slices.items() if given is None},
        )
        if changes.node or changes.service_cidrs:
            self._proxy.apply(*scenarios.surroundings(self._now))
        self._proxy.apply(*scenarios.items(changed, self._family))
        self._proxy.delete(*scenarios.items(gone, self._family))
        self._proxy.sync()

    def complaints(self, then: list[FlowSpec]) -> list[str]:
        """What is not as it should be."""
        return [complaint for spec in then for complaint in self._check(spec)]

    def end(self) -> None:
        """Tidy up."""
        for connection in self._kept.values():
            connection.close()
        self._proxy.close()

    def _new_proxy(self) -> Proxy:
        config = {"mode": self._mode, "hostnameOverride": scenarios.NODE_NAME, **self._now.config}
        return self._driver(self._lab.netns, config)

    def _check(self, spec: FlowSpec) -> list[str]:
        if spec.again:
            return self._check_again(spec)
        flows = scenarios.flows(spec, self._family)
        if spec.keep:
            return self._check_kept(spec, flows[0])
        if spec.affinity:
            return self._check_affinity(spec, flows)
        expected = scenarios.expectation(spec, self._mode)
        return [complaint for flow in flows for complaint in complaints(self._lab, flow, expected)]

    def _check_kept(self, spec: FlowSpec, flow: Flow) -> list[str]:
        connection = self._kept[spec.keep] = self._lab.open(flow)
        found = self._wrong_way(spec, connection)
        if not found and connection.outcome.fate is Fate.FORWARDED:
            found = [flaw for flaw in [self._lab.converse(connection).flaw(connection)] if flaw]
        return found

    def _check_again(self, spec: FlowSpec) -> list[str]:
        connection = self._kept[spec.again]
        connection.outcome = self._lab.go_on(connection)
        return self._wrong_way(spec, connection)

    def _wrong_way(self, spec: FlowSpec, connection: Connection) -> list[str]:
        expected, outcome = scenarios.expectation(spec, self._mode), connection.outcome
        went = outcome.fate in (Fate.FORWARDED, Fate.DELIVERED)
        fates = {"reject": Fate.REJECTED, "drop": Fate.DROPPED}
        if expected.endpoints:
            right = went and (outcome.destination, outcome.port) in expected.endpoints
        elif expected.action in fates:
            right = outcome.fate is fates[expected.action]
        else:
            right = went and (outcome.destination, outcome.port) == (connection.flow.destination, connection.flow.port)
        return [] if right else [f"{connection.flow}: expected {spec.expect}, but it was {outcome}"]

    def _check_affinity(self, spec: FlowSpec, flows: list[Flow]) -> list[str]:
        assert spec.affinity is not None
        expected = scenarios.expectation(spec, self._mode)
        reached: defaultdict[str, list[str]] = defaultdict(list)
        for outcome, flow in zip(
            self._lab.send_many(flows * CONNECTIONS_PER_CLIENT), flows * CONNECTIONS_PER_CLIENT, strict=True
        ):
            reached[flow.source].append(
                join_host_port(outcome.destination, outcome.port) if outcome.destination else str(outcome.fate)
            )
        found = [
            f"{client} moved: {ways}" for client, ways in reached.items() if any(a != b for a, b in pairwise(ways))
        ]
        endpoints = {join_host_port(*endpoint) for endpoint in expected.endpoints}
        used = {way for ways in reached.values() for way in ways}
        if used != endpoints:
            found.append(f"{spec.to}: {len(flows)} clients reached {sorted(used)} instead of {sorted(endpoints)}")
        now = {client: ways[0] for client, ways in reached.items()}
        wanted = spec.affinity
        if wanted.same_as and now != self._remembered[wanted.same_as]:
            found.append(f"{spec.to}: clients moved: {self._remembered[wanted.same_as]} → {now}")
        if wanted.differs_from and now == self._remembered[wanted.differs_from]:
            found.append(f"{spec.to}: no client moved")
        if wanted.remember:
            self._remembered[wanted.remember] = now
        return found


def _present(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given for name, given in named.items() if given is not None}
