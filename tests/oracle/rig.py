"""The proxy's parts round one kernel, with a handle on each: what is planned, what is written, what is explained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from kproxy.api.events import Changed, Deleted, Listed
from kproxy.api.objects import KINDS
from kproxy.cluster import ClusterState
from kproxy.config.decode import decode
from kproxy.config.defaults import defaulted, with_mode
from kproxy.config.v1alpha1 import Configuration, ProxyMode
from kproxy.dataplane.base import Change, Dataplane, Entries, Key
from kproxy.dataplane.nftables.containers import CONTAINERS
from kproxy.dataplane.nftables.dataplane import NftablesDataplane
from kproxy.dataplane.nftables.features import Features
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.explain import Explanation, Node, Packet, explain
from kproxy.facts import Facts
from kproxy.model import Family, NodeFacts, Route
from kproxy.node_addresses import local_addresses
from kproxy.reconcile import Difference, Reconciler, SyncReport
from tests.lab.namespaces import Namespace

WITHOUT_OWNER = Features(owner=False, destroy=True)  # as kernels before 6.9 are: others may change the tables

Item = Mapping[str, Any]
Wrap = Callable[[Dataplane], Dataplane]


class Rig:
    """A proxy in nftables mode, driven step by step in the namespace of a node.

    `shared_tables`: others may change its tables. `wrap` goes round its dataplane.
    """

    def __init__(
        self, netns: Namespace, config: Item, *, shared_tables: bool = False, wrap: Wrap | None = None
    ) -> None:
        read, problems = decode(Configuration, config)
        if any(problems):
            raise ValueError(f"configuration: {problems}")
        mode = ProxyMode.NFTABLES
        self._netns = netns
        self.state = ClusterState(read.hostname_override, note=_ignore)
        for kind in KINDS:
            self.state.apply(Listed(kind, frozenset()))
        self._facts = Facts(with_mode(defaulted(read), mode), mode, tuple(Family), self.state, local_addresses, print)
        features = WITHOUT_OWNER if shared_tables else None
        self.kernel = netns.run(NftablesKernel, tuple(Family), features)
        nftables = NftablesDataplane(self.kernel)
        self._dataplane: Dataplane = wrap(nftables) if wrap else nftables
        self._reconciler: Reconciler | None = None
        self._node = Node(NodeFacts())

    @property
    def reconciler(self) -> Reconciler:
        """The reconciler; there since the first sync."""
        assert self._reconciler is not None
        return self._reconciler

    def apply(self, items: Iterable[Item]) -> None:
        """Objects were created or replaced."""
        for item in items:
            self.state.apply(Changed(item["kind"], msgspec.convert(item, KINDS[item["kind"]])))

    def delete(self, items: Iterable[Item]) -> None:
        """Objects were deleted."""
        for item in items:
            self.state.apply(Deleted(item["kind"], msgspec.convert(item, KINDS[item["kind"]])))

    def sync(self) -> SyncReport:
        """Bring the kernel up to date. Raises what a sync raises."""
        return self._netns.run(self._sync)

    def _sync(self) -> SyncReport:
        facts = self._known_facts()
        self._node = Node(facts, local_addresses())
        if self._reconciler is None:
            self._reconciler = Reconciler(self.state, self._dataplane, facts)
        self._reconciler.set_facts(facts)
        return self._reconciler.sync()

    def _known_facts(self) -> NodeFacts:
        facts = self._facts()
        if facts is None:
            raise ValueError("the node's facts are not known yet: is there a Node object?")
        return facts

    def plan(self) -> list[Difference]:
        """What a sync would change."""
        return self._netns.run(self.reconciler.plan)

    def routes(self) -> list[Route]:
        """All routes."""
        return [route for service in self.state.services() for route in self.state.routes(service)]

    def explainer(self) -> Callable[[Packet], Explanation]:
        """Explains packets as of now."""
        routes, node = self.routes(), self._node
        return lambda packet: explain(packet, routes, node)

    def misplaced(self) -> list[str]:
        """Where what the kernel holds differs from what is rendered anew, apart from the order of endpoints."""
        wanted = dict(self._dataplane.render_base(self._node.facts))
        for route in self.routes():
            wanted |= self._dataplane.render_route(route, self._node.facts, {})
        there, wanted = _without_order(self._netns.run(self._dataplane.read)), _without_order(wanted)
        return [
            f"{key}: the kernel has {there.get(key)}, wanted is {wanted.get(key)}"
            for key in there.keys() | wanted.keys()
            if there.get(key) != wanted.get(key)
        ]

    def forget_clients(self) -> None:
        """Take what session affinity has learned out of the kernel."""
        learned = [Change(key, value, None) for family in Family for key, value in self.kernel.affinity(family).items()]
        if learned:
            self.kernel.apply(learned)

    def remove_tables(self) -> None:
        """Take all that is ours out of the kernel."""
        self.kernel.apply([Change(key, value, None) for key, value in self.kernel.tables().items()])

    def close(self) -> None:
        """End the proxy; what it wrote stays."""
        self.kernel.close()


def _ignore(_: str) -> None:
    """Notes on inputs are not looked at here."""


def _without_order(entries: Entries) -> dict[Key, object]:
    """Entries with the endpoints of each frontend as a sorted list."""
    found: dict[Key, object] = {}
    balanced: dict[Key, list[bytes]] = {}
    for key, value in entries.items():
        if isinstance(key, bytes) and isinstance(value, bytes) and CONTAINERS[key[0]].name.endswith("endpoints"):
            balanced.setdefault(key[:-4], []).append(value)
        else:
            found[key] = value
    return found | {key: sorted(values) for key, values in balanced.items()}
