"""What iptables mode depends on beside the node's facts."""

from __future__ import annotations

import msgspec

from kproxy.model import Family

INVALID_DROPPED = "ct_state_invalid_dropped_pkts"
LOCALHOST_ACCEPTED = "localhost_nps_accepted_pkts"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Chosen at start, by configuration and machine; `large_clusters` follows the node's facts."""

    random_fully: bool = True  # the MASQUERADE target knows --random-fully (iptables 1.6.2)
    drop_invalid: bool = True  # net.netfilter.nf_conntrack_tcp_be_liberal is 0
    localhost_node_ports: bool = False  # IPv4 node ports answer on 127.0.0.0/8; takes net.ipv4.conf.all.route_localnet
    counters: frozenset[str] = frozenset()  # nfacct objects that exist, of those named above
    large_clusters: frozenset[Family] = frozenset()  # families in which rules about endpoints have no comments

    def guards_localhost(self, family: Family) -> bool:
        """Whether addresses of 127.0.0.0/8 are routed, so that outsiders must be kept from them."""
        return self.localhost_node_ports and family is Family.IPv4
