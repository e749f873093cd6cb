"""iptables mode: render, read and apply together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from kproxy.dataplane.base import Change, Entries, Key, Value
from kproxy.dataplane.iptables import describe, fixed, render
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.options import Options
from kproxy.model import NodeFacts, Route, ServiceName


class IptablesDataplane:
    """The iptables mode in the network namespace in which `kernel` was made."""

    def __init__(self, kernel: IptablesKernel, options: Options) -> None:
        self._kernel = kernel
        self._options = options

    def render_base(self, facts: NodeFacts) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return fixed.render_base(facts, self._options)

    def render_route(self, route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:  # noqa: ARG002
        """See `kproxy.dataplane.base.Dataplane`. Endpoints are in the order of their text, as in kube-proxy."""
        if facts.large_families != self._options.large_clusters:
            self._options = msgspec.structs.replace(self._options, large_clusters=facts.large_families)
        return render.render_route(route, facts, self._options)

    def rerenders(self, before: NodeFacts, after: NodeFacts) -> bool:
        """See `kproxy.dataplane.base.Dataplane`."""
        return before.ips != after.ips or before.large_families != after.large_families

    def is_shared(self, key: Key) -> bool:  # noqa: ARG002 - nothing is: names of chains say whose they are
        """See `kproxy.dataplane.base.Dataplane`."""
        return False

    def read(self) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return self._kernel.read()

    def apply(self, changes: Iterable[Change]) -> None:
        """See `kproxy.dataplane.base.Dataplane`."""
        self._kernel.apply(changes)

    def describe(self, key: Key, value: Value) -> str:
        """See `kproxy.dataplane.base.Dataplane`."""
        return describe.describe(key, value)

    def labels(self, entries: Mapping[Key, Value]) -> Mapping[Key, ServiceName]:
        """See `kproxy.dataplane.base.Dataplane`."""
        return describe.labels(entries)
