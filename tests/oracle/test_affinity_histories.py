"""Session affinity over random histories: clients stay while they can, and never go where they must not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import pytest
from hypothesis import given

from kproxy.dataplane.iptables.commands import Variant
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
    tell(node_lab, history, None)


@pytest.mark.parametrize("variant", list(Variant))
@examples(15)
@given(history=sticky_histories(steps=6))
def test_clients_stay_while_they_can_in_iptables_mode(node_lab: Lab, variant: Variant, history: History) -> None:
    tell(node_lab, history, variant)


def tell(lab: Lab, history: History, variant: Variant | None) -> None:
    with Story(lab, history, variant=variant) as story:
        clients = Clients(lab, story, shares_addresses=variant is not None)
        assert clients.complaints() == [], "at first"
        for number, step in enumerate(history.steps, 1):
            story.go_on(step)
            assert clients.complaints() == [], f"after step {number}"


class Stay(NamedTuple):
    """Where a client is, and what it had to choose from."""

    targets: frozenset[Target]
    service_port: ServicePort
    choices: tuple[frozenset[Target], ...]

    def kept(self, route: Route) -> frozenset[Target]:
        """Where it must stay: unless the Service has changed, or left any set that some client is balanced to."""
        if route.service_port != self.service_port:
            return frozenset()
        return self.targets.difference(*(b - now for b, now in zip(self.choices, _choices(route), strict=True)))


class Clients:
    """Clients that come again after every step.

    `shares_addresses`: an endpoint that a client has used at one address of a service port is known at all of them.
    """

    def __init__(self, lab: Lab, story: Story, *, shares_addresses: bool) -> None:
        self._lab = lab
        self._story = story
        self._shares_addresses = shares_addresses
        self._stays: dict[Flow, Stay] = {}

    def complaints(self) -> list[str]:
        """Let every client connect a few times: who went where it must not, or moved without need."""
        self._lab.flush_conntrack()
        used = self._used_routes()
        rounds = [self._lab.send_many(list(used)) for _ in range(CONNECTIONS)]
        ways = dict(zip(used, zip(*rounds, strict=True), strict=True))
        reached = {flow: frozenset((o.destination, o.port) for o in outcomes) for flow, outcomes in ways.items()}
        siblings: defaultdict[Hashable, list[Flow]] = defaultdict(list)
        for flow, (route, _) in used.items():
            siblings[self._kinship(flow, route)].append(flow)
        found, stays = [], {}
        for flow, (route, allowed) in used.items():
            kin = siblings[self._kinship(flow, route)]
            known = [self._stays[other] for other in kin if other in self._stays]
            kept = allowed & frozenset().union(*(stay.kept(route) for stay in known))
            learned = frozenset().union(*(reached[other] for other in kin if other != flow))
            chosen = reached[flow] - learned
            if len(chosen) > 1 or not reached[flow] <= allowed or (kept and not chosen <= kept):
                how = ", then ".join(map(str, ways[flow]))
                found.append(f"{flow}: went {how}; may use {sorted(kept or allowed)}; before: {known}")
            stays[flow] = Stay(reached[flow], route.service_port, _choices(route))
        self._stays = stays
        return found

    def _kinship(self, flow: Flow, route: Route) -> Hashable:
        """What flows have in common that are known by the same entry of the kernel."""
        return (flow.source, route.service_port.name) if self._shares_addresses else flow

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
