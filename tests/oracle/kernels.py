"""What the oracle must know of a mode beside its dataplane: how to explain, to forget clients, to leave no trace."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import kproxy.explain.iptables
import kproxy.explain.nftables
from kproxy.cluster import ClusterState
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration
from kproxy.dataplane.base import Change, Dataplane, Entries, Key
from kproxy.dataplane.iptables import cleanup
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.localhost import ROUTE_LOCALNET
from kproxy.dataplane.ipvs import cleanup as ipvs_cleanup
from kproxy.dataplane.ipvs.entries import PERSISTENT
from kproxy.dataplane.ipvs.servers import Servers
from kproxy.dataplane.nftables.containers import CONTAINERS
from kproxy.dataplane.nftables.dataplane import NftablesDataplane
from kproxy.dataplane.nftables.features import Features
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.explain import Explanation, Node, Packet
from kproxy.model import Family, Route
from kproxy.modes.iptables import Iptables
from kproxy.modes.ipvs import Ipvs

WITHOUT_OWNER = Features(owner=False, destroy=True)  # as kernels before 6.9 are: others may change the tables
Explain = Callable[[Packet], Explanation]
_RECENT = Path("/proc/thread-self/net/xt_recent")
_IPVS_CONNECTIONS = Path("/proc/thread-self/net/ip_vs_conn")
_PATIENCE = 5.0  # seconds until IPVS has forgotten clients


class Opened(Protocol):
    """A mode in the network namespace of the thread that opened it, and that calls it."""

    dataplane: Dataplane

    def large_families(self, state: ClusterState) -> Callable[[], frozenset[Family]]:
        """See `kproxy.modes.base.Mode`."""

    def explainer(self, routes: Sequence[Route], node: Node) -> Explain:
        """Explains packets on a node where these are all the routes."""

    def without_order(self, entries: Entries) -> dict[Key, object]:
        """Entries without what may be in one order or another."""

    def forget_clients(self) -> None:
        """Take what session affinity has learned out of the kernel."""

    def remove(self) -> None:
        """Take all that is ours alone out of the kernel."""

    def close(self) -> None:
        """Let go of the kernel."""


class OpenedNftables:
    """nftables mode. `shared_tables`: others may change its tables."""

    def __init__(self, *, shared_tables: bool) -> None:
        self.kernel = NftablesKernel(tuple(Family), WITHOUT_OWNER if shared_tables else None)
        self.dataplane = NftablesDataplane(self.kernel)

    def large_families(self, _: ClusterState) -> Callable[[], frozenset[Family]]:
        return frozenset

    def explainer(self, routes: Sequence[Route], node: Node) -> Explain:
        return lambda packet: kproxy.explain.nftables.explain(packet, routes, node)

    def without_order(self, entries: Entries) -> dict[Key, object]:
        """Entries with the endpoints of each frontend as a sorted list."""
        found: dict[Key, object] = {}
        balanced: dict[Key, list[bytes]] = {}
        for key, value in entries.items():
            if isinstance(key, bytes) and isinstance(value, bytes) and CONTAINERS[key[0]].name.endswith("endpoints"):
                balanced.setdefault(key[:-4], []).append(value)
            else:
                found[key] = value
        return found | {key: sorted(values) for key, values in balanced.items()}

    def forget_clients(self) -> None:
        learned = [Change(key, value, None) for family in Family for key, value in self.kernel.affinity(family).items()]
        if learned:
            self.kernel.apply(learned)

    def remove(self) -> None:
        self.kernel.apply([Change(key, value, None) for key, value in self.kernel.tables().items()])

    def close(self) -> None:
        self.kernel.close()


class OpenedIptables:
    """iptables mode, in the variant that is hinted at."""

    def __init__(self, configuration: Configuration) -> None:
        self._mode = Iptables(configuration, tuple(Family), writes=True)
        self.kernel = self._mode.kernel
        self.dataplane = self._mode.dataplane
        self.large_families = self._mode.large_families

    def explainer(self, routes: Sequence[Route], node: Node) -> Explain:
        is_open = ROUTE_LOCALNET in self.dataplane.render_base(node.facts)
        return lambda packet: kproxy.explain.iptables.explain(packet, routes, node, localhost_node_ports=is_open)

    def without_order(self, entries: Entries) -> dict[Key, object]:
        return dict(entries)

    def forget_clients(self) -> None:
        """A list that is told "/" is empty (xt_recent)."""
        if _RECENT.exists():
            for clients in _RECENT.iterdir():
                clients.write_text("/")

    def remove(self) -> None:
        variant, families = self.kernel.variant, self.kernel.families
        cleanup.remove(variant, families, cleanup.leftovers(variant, families))

    def close(self) -> None:
        self._mode.close()


class OpenedIpvs:
    """ipvs mode."""

    def __init__(self, configuration: Configuration, settings: KproxyConfiguration) -> None:
        self._luck = random.Random(0)
        self._mode = Ipvs(configuration, settings, tuple(Family))
        self._mode.prepare()
        self.kernel = self._mode.kernel
        self.dataplane = self._mode.dataplane
        self.large_families = self._mode.large_families

    def explainer(self, routes: Sequence[Route], node: Node) -> Explain:
        return lambda packet: self._mode.explain(packet, routes, node)

    def without_order(self, entries: Entries) -> dict[Key, object]:
        return dict(entries)

    def forget_clients(self) -> None:
        forget_clients_of_ipvs(self._luck)

    def remove(self) -> None:
        families = self.kernel.families
        for variant in Variant:
            ipvs_cleanup.write_rules(variant, ipvs_cleanup.rules_left(variant, families))
        ipvs_cleanup.remove_servers(ipvs_cleanup.servers_left(families))

    def close(self) -> None:
        self._mode.close()


def forget_clients_of_ipvs(luck: random.Random) -> None:
    """Real servers take their connections along, and these what clients stick by (sysctl expire_nodest_conn).

    They come back in another order, for IPVS begins with the first again.
    """
    with Servers() as servers:
        sticky = [found.key for found in servers.virtual_servers() if found.value.flags & PERSISTENT]
        if not sticky or not _has_sticking_clients():
            return
        there = [(real.key, real.value) for key in sticky for real in servers.real_servers(key)]
        servers.remove([key for key, _ in there])
        deadline = time.monotonic() + _PATIENCE
        while _has_sticking_clients():
            if time.monotonic() > deadline:
                raise TimeoutError(f"IPVS has not forgotten its clients after {_PATIENCE} s")
            time.sleep(0.001)
        luck.shuffle(there)
        servers.put(dict(there))


def _has_sticking_clients() -> bool:
    """What a client sticks by is listed as a connection from its port 0."""
    _, *connections = _IPVS_CONNECTIONS.read_text().splitlines()
    return any(line.split()[2] == "0000" for line in connections)
