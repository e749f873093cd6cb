"""How many endpoints there are, for a rule of kube-proxy's: in a large cluster iptables rules have fewer comments."""

from __future__ import annotations

from collections import Counter

from kproxy.cluster.state import ClusterState
from kproxy.model import Family, ServiceName

LARGE = 1000  # more endpoints in a family make it large; those that are not ready count, too


class ClusterSize:
    """Counts the endpoints of a state's service ports. To be asked before the state's dirty Services are synced."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._counts: dict[ServiceName, Counter[Family]] = {}
        self._total: Counter[Family] = Counter()

    def large_families(self) -> frozenset[Family]:
        """The families with so many endpoints; none before everything was listed, when a count would mean little."""
        if self._state.complete:
            for service in self._state.dirty:
                self._total.subtract(self._counts.pop(service, Counter()))
                count: Counter[Family] = Counter()
                for port in self._state.service_ports(service):
                    count[port.family] += len(self._state.endpoints(port))
                if count:
                    self._counts[service] = count
                    self._total.update(count)
        return frozenset(family for family, count in self._total.items() if count > LARGE)
