"""ipvs mode: render, read and apply together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kproxy.dataplane.base import Change, Entries, Key, Value
from kproxy.dataplane.ipvs import describe, entries, fixed, render
from kproxy.dataplane.ipvs.kernel import IpvsKernel
from kproxy.dataplane.ipvs.options import Options
from kproxy.model import NodeFacts, Route, ServiceName


class IpvsDataplane:
    """The ipvs mode in the network namespace in which `kernel` was made."""

    def __init__(self, kernel: IpvsKernel, options: Options) -> None:
        self._kernel = kernel
        self._options = options

    def render_base(self, facts: NodeFacts) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return fixed.render_base(facts, self._options)

    def render_route(self, route: Route, facts: NodeFacts, present: Mapping[Key, Value]) -> Entries:  # noqa: ARG002
        """See `kproxy.dataplane.base.Dataplane`. Real servers have no order."""
        return render.render_route(route, facts, self._options)

    def rerenders(self, before: NodeFacts, after: NodeFacts) -> bool:
        """See `kproxy.dataplane.base.Dataplane`. Node ports and external IPs go by the node's addresses."""
        return (
            before.ips != after.ips
            or before.addresses != after.addresses
            or before.node_port_addresses != after.node_port_addresses
        )

    def is_shared(self, key: Key) -> bool:
        """See `kproxy.dataplane.base.Dataplane`."""
        return entries.is_shared(key)

    def read(self) -> Entries:
        """See `kproxy.dataplane.base.Dataplane`."""
        return self._kernel.read()

    def apply(self, changes: Iterable[Change]) -> None:
        """See `kproxy.dataplane.base.Dataplane`."""
        self._kernel.apply(changes)

    def describe(self, key: Key, value: Value) -> str:
        """See `kproxy.dataplane.base.Dataplane`."""
        return describe.describe(key, value)

    def labels(self, entries: Mapping[Key, Value]) -> Mapping[Key, ServiceName]:  # noqa: ARG002
        """See `kproxy.dataplane.base.Dataplane`. The kernel notes nowhere which Service a virtual server is for."""
        return {}
