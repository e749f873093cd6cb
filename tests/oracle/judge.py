"""Compares what the kernel does with packets to what `explain` says of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kproxy.explain import Action, Explanation, Packet
from kproxy.model import Endpoint, join_host_port
from tests.lab.flows import Fate, Flow, Origin, Outcome
from tests.lab.packets import Lab
from tests.oracle.kernels import Explain

# An endpoint out of eight that is allowed is missed by so many independent tries once in 10¹² times.
TRIES = 250
CONVERSATIONS = 4
REFUSALS = {Action.DROP: Fate.DROPPED, Action.REJECT: Fate.REJECTED}
INTERFACES = {Origin.OUTSIDE: "eth0", Origin.POD: "pods", Origin.NODE: ""}


def packet(flow: Flow) -> Packet:
    """A flow's first packet."""
    return Packet(flow.source, flow.destination, flow.port, flow.protocol, INTERFACES[flow.origin])


class Verdict:
    """What is known of one flow so far."""

    def __init__(self, flow: Flow, explanation: Explanation) -> None:
        self.flow = flow
        self.explanation = explanation
        self.unseen = {(e.address, e.port): e for e in explanation.endpoints}
        self.complaint = ""

    def take(self, outcome: Outcome, node_addresses: Collection[str]) -> None:
        """Judge one try."""
        if not self._is_right(outcome, node_addresses):
            self.complain(f"it was {outcome}")
        self.unseen.pop((outcome.destination, outcome.port), None)

    def complain(self, what: str) -> None:
        """Something is not as explained."""
        self.complaint = f"{self.flow}: {what}, but explained was {self._words()}"

    def _is_right(self, outcome: Outcome, node_addresses: Collection[str]) -> bool:
        went = outcome.fate in (Fate.FORWARDED, Fate.DELIVERED)
        target, flow = (outcome.destination, outcome.port), self.flow
        match self.explanation.action:
            case Action.DROP | Action.REJECT as action:
                return outcome.fate in (REFUSALS[action], REFUSALS.get(self.explanation.instead))
            case Action.PASS:
                return went and target == (flow.destination, flow.port) and outcome.source == flow.source
            case Action.DNAT:
                chosen = [e for e in self.explanation.endpoints if (e.address, e.port) == target]
                return went and bool(chosen) and self._source_is_right(outcome, chosen[0], node_addresses)

    def _source_is_right(self, outcome: Outcome, endpoint: Endpoint, node_addresses: Collection[str]) -> bool:
        # What comes in and stays on the node never passes the point at which sources are replaced.
        stays = outcome.fate is Fate.DELIVERED and self.flow.origin is not Origin.NODE
        if stays or not self.explanation.is_masqueraded(endpoint):
            return outcome.source == self.flow.source
        return outcome.source in node_addresses

    def _words(self) -> str:
        found = self.explanation
        endpoints = ", ".join(f"{e}{' masqueraded' if found.is_masqueraded(e) else ''}" for e in found.endpoints)
        return f"{found.action} {endpoints}".rstrip() + f" ({'; '.join(found.reasons)})"


def complaints(lab: Lab, flows: Sequence[Flow], explain: Explain, forget_clients: Callable[[], None]) -> list[str]:
    """Where kernel and explanation differ. Each try is that of a client that no affinity is known of."""
    verdicts = [Verdict(flow, explain(packet(flow))) for flow in flows]
    waiting = verdicts
    for _ in range(TRIES):
        forget_clients()
        for verdict, outcome in zip(waiting, lab.send_many([v.flow for v in waiting]), strict=True):
            verdict.take(outcome, lab.node.addresses)
        waiting = [v for v in waiting if v.unseen and not v.complaint]
        if not waiting:
            break
    for verdict in waiting:
        verdict.complain(f"no try reached {', '.join(join_host_port(*e) for e in verdict.unseen)}")
    found = [verdict.complaint for verdict in verdicts if verdict.complaint]
    return found or _broken_conversations(lab, verdicts, forget_clients)


def _broken_conversations(lab: Lab, verdicts: Sequence[Verdict], forget_clients: Callable[[], None]) -> list[str]:
    """Whole connections of some flows, those of pods that reach themselves first."""
    served = [v for v in verdicts if v.explanation.action is Action.DNAT]
    served.sort(key=lambda v: not v.explanation.hairpin)
    found = []
    for verdict in served[:CONVERSATIONS]:
        forget_clients()
        wanted = verdict.explanation.hairpin or verdict.explanation.endpoints
        connections = [lab.open(verdict.flow)]
        while connections[-1].outcome.destination != wanted[0].address and len(connections) < TRIES:
            forget_clients()
            connections.append(lab.open(verdict.flow))
        connection = connections[-1]
        if connection.outcome.fate is Fate.FORWARDED:
            found.append(lab.converse(connection).flaw(connection))
        for opened in connections:
            opened.close()
    return [flaw for flaw in found if flaw]
