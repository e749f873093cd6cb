"""What the node is to the dataplane, from the configuration, the Node object and the node's own addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kproxy.cluster import ClusterState
from kproxy.config.defaults import mode_settings
from kproxy.config.errors import ConfigError
from kproxy.config.local_detectors import local_detectors
from kproxy.config.v1alpha1 import Configuration, ProxyMode
from kproxy.dataplane.ipvs.addresses import usable
from kproxy.model import DetectLocalMode, Family, NodeFacts
from kproxy.node_addresses import is_loopback, matching, node_port_cidrs, node_port_warning, primary_node_ips


class Facts:
    """Computes the facts as of now. The configuration is valid and complete, its mode chosen.

    In NodeCIDR mode the Node's pod CIDRs are part of every rule: without them there are no facts, and once they are
    known they must stay (reference: section 1.6). `warn` hears what an administrator may not expect of node ports.
    """

    def __init__(
        self,
        configuration: Configuration,
        mode: ProxyMode,
        families: Sequence[Family],
        state: ClusterState,
        local_addresses: Callable[[], frozenset[str]],
        warn: Callable[[str], None],
        large_families: Callable[[], frozenset[Family]] = frozenset,
    ) -> None:
        self._configuration = configuration
        self._mode = mode
        self._settings = mode_settings(configuration, mode)
        self._families = tuple(families)
        self._state = state
        self._local_addresses = local_addresses
        self._warn = warn
        self._large_families = large_families
        self._warned = ""
        self._pod_cidrs: tuple[str, ...] = ()

    def __call__(self) -> NodeFacts | None:
        """The facts; None while what they depend on is not known. Raises ConfigError where they cannot be."""
        node = self._state.node
        pod_cidrs: tuple[str, ...] = ()
        if self._configuration.detect_local_mode is DetectLocalMode.NODE_CIDR:
            if node:
                pod_cidrs = tuple(node.spec.pod_cidrs or filter(None, [node.spec.pod_cidr]))
            if self._pod_cidrs and pod_cidrs != self._pod_cidrs:
                raise ConfigError([f"the Node's pod CIDRs changed from {self._pod_cidrs} to {pod_cidrs}; start again"])
            if not pod_cidrs:
                return None
            self._pod_cidrs = pod_cidrs
        reported = [(a.type, a.address) for a in node.status.addresses or ()] if node else []
        ips = primary_node_ips(reported, self._configuration.bind_address).ips
        addresses = self._local_addresses()
        chosen = node_port_cidrs(self._configuration.node_port_addresses, ips)
        if self._state.surroundings_listed:
            self._warn_once(node_port_warning(self._configuration.node_port_addresses, ips, self._families))
        return NodeFacts(
            name=self._state.node_name,
            zone=self._state.zone,
            families=self._families,
            ips={family: ip for family, ip in ips.items() if not is_loopback(ip)},
            detectors=local_detectors(self._configuration, pod_cidrs, self._families),
            node_port_addresses={
                family: None if cidrs is None else matching(addresses, family, cidrs)
                for family, cidrs in chosen.items()
            },
            service_cidrs={family: self._state.service_cidrs(family) for family in self._families},
            addresses=self._addresses_of(addresses),
            large_families=self._large_families(),
            masquerade_all=self._settings.masquerade_all,
            masquerade_bit=self._settings.masquerade_bit,
        )

    def _addresses_of(self, addresses: frozenset[str]) -> dict[Family, tuple[str, ...]]:
        """Only ipvs mode needs to know them all."""
        if self._mode is not ProxyMode.IPVS:
            return {}
        return {family: usable(addresses, family) for family in self._families}

    def _warn_once(self, text: str) -> None:
        if text and text != self._warned:
            self._warn(text)
        self._warned = text
