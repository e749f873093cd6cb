"""Which virtual servers are ours, and which are somebody else's that must not be touched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network

from kproxy.dataplane.base import Entries
from kproxy.dataplane.ipvs import names
from kproxy.dataplane.ipvs.entries import AddressKey, Member, MemberKey, VirtualServerKey
from kproxy.model import Family, Protocol
from kproxy.node_addresses import matching

_WITH_ADDRESS = (
    names.CLUSTER_IP_SET,
    names.EXTERNAL_IP_SET,
    names.EXTERNAL_IP_LOCAL_SET,
    names.LOAD_BALANCER_SET,
    names.NODE_PORT_SET[Protocol.SCTP],
)
_PORTS = (Protocol.TCP, Protocol.UDP)


class Ownership:
    """Decides by what is noted in the kernel itself, so that a new process knows what an earlier one left.

    Ours is a virtual server
    - that this process has written;
    - whose address and port are a member of one of our sets of such;
    - whose port is a member of our set of node ports, and whose address is one of the node's: the cluster gives this
      port out, on every address of the node; in an excluded CIDR only where node ports are meant to be;
    - on any other port of an address on kube-ipvs0, which only Services' addresses are, unless it is in an excluded
      CIDR.

    So a stranger's in an excluded CIDR is never touched, unless a Service has the same address and port. Members are
    added before the servers that they stand for, and removed after them, so none is forgotten; but on an address that
    the node lost meanwhile, a new process cannot tell a TCP or UDP node port's from a stranger's, and leaves it.
    """

    def __init__(self, excluded: Iterable[str], node_ports: Mapping[Family, Sequence[str] | None]) -> None:
        """`node_ports`: CIDRs of the addresses that are to have node ports; None, or no entry: all of the node's."""
        self._excluded = tuple(ip_network(cidr) for cidr in excluded)
        self._node_ports = node_ports
        self._written: set[VirtualServerKey] = set()

    def __contains__(self, key: object) -> bool:
        """Whether this process has written a virtual server."""
        return key in self._written

    def wrote(self, keys: Iterable[VirtualServerKey]) -> None:
        """These are from this process."""
        self._written.update(keys)

    def removed(self, keys: Iterable[VirtualServerKey]) -> None:
        """These are gone."""
        self._written.difference_update(keys)

    def ours(
        self, servers: Sequence[VirtualServerKey], entries: Entries, local: Collection[str]
    ) -> list[VirtualServerKey]:
        """Those of all virtual servers that are ours.

        `entries`: the addresses and the members of sets that were read. `local`: where node ports can be.
        """
        return [key for key in servers if key in self._written or self._is_noted(key, entries, local)]

    def _is_noted(self, key: VirtualServerKey, entries: Entries, local: Collection[str]) -> bool:
        family, address, protocol, port = key
        exact = [_key(name, family, Member(address, protocol, port)) for name in _WITH_ADDRESS]
        if protocol in _PORTS and address in local and (self._is_chosen(address) or not self._is_excluded(address)):
            exact.append(_key(names.NODE_PORT_SET[protocol], family, Member(port=port)))
        if any(key in entries for key in exact):
            return True
        return AddressKey(family, address) in entries and not self._is_excluded(address)

    def _is_chosen(self, address: str) -> bool:
        family = Family.of(address)
        return bool(matching([address], family, self._node_ports.get(family)))

    def _is_excluded(self, address: str) -> bool:
        return any(ip_address(address) in network for network in self._excluded)


def _key(name: str, family: Family, member: Member) -> MemberKey:
    return MemberKey(names.set_name(name, family), member)
