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
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration, ProxyMode
from kproxy.dataplane.base import Dataplane
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.explain import Node
from kproxy.facts import Facts
from kproxy.model import Family, NodeFacts, Route
from kproxy.node_addresses import local_addresses
from kproxy.reconcile import Difference, Reconciler, SyncReport
from tests.lab.namespaces import Namespace
from tests.oracle.kernels import Explain, Opened, OpenedIptables, OpenedIpvs, OpenedNftables

Item = Mapping[str, Any]
Wrap = Callable[[Dataplane], Dataplane]


class Rig:
    """A proxy in the mode of its configuration, driven step by step in the namespace of a node.

    `shared_tables`: others may change what is its own. `settings` are kproxy's own. `wrap` goes round its dataplane.
    """

    def __init__(
        self,
        netns: Namespace,
        config: Item,
        *,
        shared_tables: bool = False,
        settings: KproxyConfiguration | None = None,
        wrap: Wrap | None = None,
    ) -> None:
        read, problems = decode(Configuration, config)
        if any(problems):
            raise ValueError(f"configuration: {problems}")
        mode = read.mode or ProxyMode.NFTABLES
        configuration = with_mode(defaulted(read), mode)
        self._netns = netns
        self.state = ClusterState(read.hostname_override, note=_ignore)
        for kind in KINDS:
            self.state.apply(Listed(kind, frozenset()))
        self.opened: Opened = netns.run(_open, configuration, shared_tables, settings or KproxyConfiguration())
        large = self.opened.large_families(self.state)
        self._facts = Facts(configuration, mode, tuple(Family), self.state, _own_addresses, _ignore, large)
        self._dataplane: Dataplane = wrap(self.opened.dataplane) if wrap else self.opened.dataplane
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

    def explainer(self) -> Explain:
        """Explains packets as of now."""
        return self.opened.explainer(self.routes(), self._node)

    def misplaced(self) -> list[str]:
        """Where what the kernel holds differs from what is rendered anew, apart from the order of endpoints."""
        wanted = dict(self._dataplane.render_base(self._node.facts))
        for route in self.routes():
            wanted |= self._dataplane.render_route(route, self._node.facts, {})
        there, wanted = map(self.opened.without_order, (self._netns.run(self._dataplane.read), wanted))
        return [
            f"{key}: the kernel has {there.get(key)}, wanted is {wanted.get(key)}"
            for key in there.keys() | wanted.keys()
            if there.get(key) != wanted.get(key)
        ]

    def forget_clients(self) -> None:
        """Take what session affinity has learned out of the kernel."""
        self._netns.run(self.opened.forget_clients)

    def remove_tables(self) -> None:
        """Take all that is ours out of the kernel."""
        self._netns.run(self.opened.remove)

    def close(self) -> None:
        """End the proxy; what it wrote stays."""
        self._netns.run(self.opened.close)


def _open(configuration: Configuration, shared_tables: bool, settings: KproxyConfiguration) -> Opened:
    match configuration.mode:
        case ProxyMode.NFTABLES:
            return OpenedNftables(shared_tables=shared_tables)
        case ProxyMode.IPTABLES:
            return OpenedIptables(configuration)
        case ProxyMode.IPVS:
            return OpenedIpvs(configuration, settings)
        case mode:
            raise ValueError(f"{mode} is no mode of a proxy on Linux")


def _own_addresses() -> frozenset[str]:
    return local_addresses(exclude=DEVICE)


def _ignore(_: str) -> None:
    """Notes on inputs are not looked at here."""
