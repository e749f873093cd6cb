"""A history as it goes on: the node, the proxy, and what must be true after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kproxy.config.v1alpha1 import KproxyConfiguration
from kproxy.dataplane.base import ApplyError
from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.lab import scenario as scenarios
from tests.lab.node import POD_GATEWAYS
from tests.lab.packets import Lab
from tests.lab.proxy import HINT
from tests.lab.scenario import Objects
from tests.oracle import meddling, meddling_iptables
from tests.oracle.judge import complaints
from tests.oracle.probes import probes
from tests.oracle.rig import Rig
from tests.oracle.unreliable import Unreliable
from tests.oracle.worlds import History, Step

ATTEMPTS = 100  # of a sync that meets faults


class Story:
    """A history on the node of a laboratory, which is clean when it ends.

    In iptables mode if there is a `variant` of it, else in nftables mode unless a subclass says otherwise. `settings`
    are kproxy's own. `faults`: how many transactions fail.
    """

    def __init__(
        self,
        lab: Lab,
        history: History,
        *,
        variant: Variant | None = None,
        faults: float = 0.0,
        settings: KproxyConfiguration | None = None,
    ) -> None:
        self.lab = lab
        self._history = history
        self._now = history.given
        self._variant = variant
        self._faults = faults
        self._settings = settings
        self._shared_tables = any(step.drift for step in history.steps)
        self._starts = 0
        if variant:
            lab.netns.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
        self._begin()

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.remove_tables()
        self.rig.close()

    def go_on(self, step: Step) -> None:
        """Something happens, and the proxy hears of it."""
        if step.drift:
            self._meddle(step.drift)
            self.rig.reconciler.doubt()
        changes = step.changes
        self._now = changes.over(self._now)
        if step.restart:
            self.rig.close()
            self._begin()
            return
        self._set_addresses()
        if changes.node or changes.service_cidrs is not None:
            self._apply_surroundings()
        self.rig.apply(_items(changes, present=True))
        self.rig.delete(_items(changes, present=False))
        self._sync()

    def complaints(self) -> list[str]:
        """What is not as it should be now."""
        return self.flaws_of_the_kernel() or self.flaws_of_packets()

    def flaws_of_the_kernel(self) -> list[str]:
        """Whether the kernel holds what is rendered anew, and is left alone where nothing has changed."""
        self._dataplane.rate = 0.0
        found = [str(difference) for difference in self.rig.plan()] + self.rig.misplaced()
        found += [f"{service} is quarantined: {why}" for service, why in self.rig.reconciler.quarantine.items()]
        written = self._dataplane.written
        self.rig.sync()
        self.rig.reconciler.doubt()
        drift = self.rig.sync().drift
        if self._dataplane.written != written or drift:
            found.append(f"a sync without a change wrote to the kernel; drift: {drift}")
        self._dataplane.rate = self._faults
        return found

    def flaws_of_packets(self) -> list[str]:
        """Where packets fare otherwise than explained."""
        self.lab.flush_conntrack()
        flows = probes(self.rig.state, self.lab.node.addresses - set(POD_GATEWAYS), self._history.luck)
        return complaints(self.lab, flows, self.rig.explainer(), self.rig.forget_clients)

    @property
    def _mode(self) -> str:
        """The proxy's."""
        return "iptables" if self._variant else "nftables"

    def _meddle(self, how: int) -> None:
        """Change something of the proxy's as a stranger does."""
        if self._variant:
            meddling_iptables.meddle(self.lab.netns, self._variant, how)
        else:
            meddling.meddle(self.lab.netns, how)

    def _begin(self) -> None:
        """A new proxy finds what the last one left."""
        self._starts += 1
        config = {"mode": self._mode, "hostnameOverride": scenarios.NODE_NAME, **self._now.config}

        def wrapped(real: Any) -> Unreliable:
            self._dataplane = Unreliable(real, self._faults, seed=self._history.luck + self._starts)
            return self._dataplane

        self.rig = Rig(self.lab.netns, config, shared_tables=self._shared_tables, settings=self._settings, wrap=wrapped)
        self._set_addresses()
        self._apply_surroundings()
        self.rig.apply(_items(self._now, present=True))
        self._sync()

    def _apply_surroundings(self) -> None:
        self.rig.apply(scenarios.surroundings(self._now))
        if not self._now.service_cidrs:
            self.rig.delete([{"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}}])

    def _set_addresses(self) -> None:
        node, wanted = self.lab.node, set(self._now.node["addresses"])
        for address in sorted(wanted - node.addresses):
            node.add_address(address)
        for address in sorted(node.addresses - wanted - set(POD_GATEWAYS)):
            bits = Family.of(address).bits
            self.lab.netns.command("ip", "addr", "del", f"{address}/{bits}", "dev", node.outside)
            node.addresses.discard(address)

    def _sync(self) -> None:
        """As the proxy does: again after a failure, and refused Services again after a while."""
        for _ in range(ATTEMPTS):
            try:
                self.rig.sync()
            except ApplyError:
                if not self._faults:
                    raise
                continue
            if not self.rig.reconciler.quarantine or not self._faults:
                return
            self.rig.reconciler.retry_quarantined()
        raise AssertionError(f"{ATTEMPTS} attempts did not suffice for a sync")


def _items(objects: Objects, *, present: bool) -> list[Mapping[str, Any]]:
    """The objects that are there, or those that have gone, as the API has them."""
    chosen = Objects(
        services={name: given for name, given in objects.services.items() if (given is not None) is present},
        slices={name: given for name, given in objects.slices.items() if (given is not None) is present},
    )
    return list(scenarios.items(chosen, Family.IPv4))
