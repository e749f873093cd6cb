"""Names of chains and ipsets (reference: sections 4.2.4 and 4.2.5)."""

from __future__ import annotations

from kproxy.model import Family, Protocol

DEVICE = "kube-ipvs0"  # a dummy interface that holds the addresses of Services

# Chains; those that iptables mode has, too, are in kproxy.dataplane.iptables.names.
NODE_PORT = "KUBE-NODE-PORT"
LOAD_BALANCER = "KUBE-LOAD-BALANCER"
SOURCE_RANGES_FIREWALL = "KUBE-SOURCE-RANGES-FIREWALL"
IPVS_FILTER = "KUBE-IPVS-FILTER"
IPVS_OUT_FILTER = "KUBE-IPVS-OUT-FILTER"

# Sets, by their IPv4 names.
LOOP_BACK_SET = "KUBE-LOOP-BACK"
CLUSTER_IP_SET = "KUBE-CLUSTER-IP"
EXTERNAL_IP_SET = "KUBE-EXTERNAL-IP"
EXTERNAL_IP_LOCAL_SET = "KUBE-EXTERNAL-IP-LOCAL"
LOAD_BALANCER_SET = "KUBE-LOAD-BALANCER"
LOAD_BALANCER_LOCAL_SET = "KUBE-LOAD-BALANCER-LOCAL"
LOAD_BALANCER_FIREWALL_SET = "KUBE-LOAD-BALANCER-FW"
SOURCE_CIDR_SET = "KUBE-LOAD-BALANCER-SOURCE-CIDR"
SOURCE_IP_SET = "KUBE-LOAD-BALANCER-SOURCE-IP"
NODE_PORT_SET = {
    Protocol.TCP: "KUBE-NODE-PORT-TCP",
    Protocol.UDP: "KUBE-NODE-PORT-UDP",
    Protocol.SCTP: "KUBE-NODE-PORT-SCTP-HASH",
}
NODE_PORT_LOCAL_SET = {
    Protocol.TCP: "KUBE-NODE-PORT-LOCAL-TCP",
    Protocol.UDP: "KUBE-NODE-PORT-LOCAL-UDP",
    Protocol.SCTP: "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
}
HEALTH_CHECK_SET = "KUBE-HEALTH-CHECK-NODE-PORT"
ADDRESSES_SET = "KUBE-IPVS-IPS"

_LONGEST = 31  # characters of a set's name that the kernel takes


def set_name(name: str, family: Family) -> str:
    """What a set is called in a family: names are not by family in the kernel. `name` is the IPv4 one."""
    if family is Family.IPv4:
        return name
    return f"KUBE-6-{name.removeprefix('KUBE-')}"[:_LONGEST]
