"""Session affinity over random histories: clients stay while they can, and never go where they must not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hypothesis import given

from kproxy.explain import Action
from kproxy.model import Endpoint, Route, ServicePort
from tests.lab.flows import Flow
from tests.lab.node import POD_GATEWAYS
from tests.lab.packets import Lab
from tests.oracle.judge import packet
from tests.oracle.probes import targets, towards
from tests.oracle.profile import examples
from tests.oracle.story import Story
from tests.oracle.worlds import CLIENTS, HERE_PODS, OTHER_PODS, PRIMARY, History, sticky_histories

# No address that is the node's at times: such a client moves from one side of a Local policy to the other.
SOURCES = (HERE_PODS[0], HERE_PODS[2], OTHER_PODS[0], *CLIENTS[:2], PRIMARY)
CONNECTIONS = 3

Target = tuple[str, int]


@examples(40)
@given(history=sticky_histories(steps=6))
def test_clients_stay_while_they_can(node_lab: Lab, history: History) -> None:
    with Story(node_lab, history) as story:
        clients = Clients(node_lab, story)
        assert clients.complaints() == [], "at first"
        for number, step in enumerate(history.steps, 1):
            story.go_on(step)
            assert clients.complaints() == [], f"after step {number}"


class Stay(NamedTuple):
    """Where a client is, and what it had to choose from."""

    target: Target
    service_port: ServicePort
    choices: tuple[frozenset[Target], ...]

    def may_be_lost(self, route: Route) -> bool:
        """Whether the Service has changed, or the endpoint has left any set that some client is balanced to."""
        left = any(self.target in before - now for before, now in zip(self.choices, _choices(route), strict=True))
        return left or route.service_port != self.service_port


class Clients:
    """Clients that come again after every step."""

    def __init__(self, lab: Lab, story: Story) -> None:
        self._lab = lab
        self._story = story
        self._stays: dict[Flow, Stay] = {}

    def complaints(self) -> list[str]:
        """Let every client connect a few times: who went where it must not, or moved without need."""
        self._lab.flush_conntrack()
        used = self._used_routes()
        rounds = [self._lab.send_many(list(used)) for _ in range(CONNECTIONS)]
        found, stays = [], {}
        for (flow, (route, allowed)), outcomes in zip(used.items(), zip(*rounds, strict=True), strict=True):
            known = self._stays.get(flow)
            may_use = allowed
            if known and known.target in allowed and not known.may_be_lost(route):
                may_use = frozenset((known.target,))
            went = {(outcome.destination, outcome.port) for outcome in outcomes}
            if len(went) > 1 or not went <= may_use:
                ways = ", then ".join(map(str, outcomes))
                found.append(f"{flow}: went {ways}; may use {sorted(may_use)}; before: {known}")
            stays[flow] = Stay(went.pop(), route.service_port, _choices(route))
        self._stays = stays
        return found

    def _used_routes(self) -> dict[Flow, tuple[Route, frozenset[Target]]]:
        """The flows that reach an endpoint, with the route that they take and what it lets them choose from."""
        rig, addresses = self._story.rig, self._lab.node.addresses - set(POD_GATEWAYS)
        routes, explain = {route.service_port: route for route in rig.routes()}, rig.explainer()
        used = {}
        for target in targets(rig.state, addresses):
            for flow in towards(target, SOURCES, addresses):
                explanation = explain(packet(flow))
                if explanation.action is Action.DNAT:
                    used[flow] = routes[explanation.service_port], _targets(explanation.endpoints)
        return used


def _choices(route: Route) -> tuple[frozenset[Target], ...]:
    return _targets(route.cluster), _targets(route.local)


def _targets(endpoints: Iterable[Endpoint]) -> frozenset[Target]:
    return frozenset((e.address, e.port) for e in endpoints)
