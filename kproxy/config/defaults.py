"""What a configuration means once fields, mode and machine are put together."""

from __future__ import annotations

import msgspec

from kproxy.config.duration import Duration
from kproxy.config.v1alpha1 import IPVS, Configuration, IPTables, NFTables, ProxyMode
from kproxy.model import DetectLocalMode, Family, canonical_address, join_host_port

HEALTHZ_PORT = 10256
METRICS_PORT = 10249


class ModeSettings(msgspec.Struct, frozen=True):
    """The settings that every mode has, from the active mode's part of the configuration."""

    sync_period: Duration
    min_sync_period: Duration
    masquerade_all: bool
    masquerade_bit: int


def defaulted(config: Configuration) -> Configuration:
    """Fill in the listen addresses, by the family of `bindAddress`, and tidy the host name."""
    ipv6 = Family.of(config.bind_address) is Family.IPv6
    healthz = config.healthz_bind_address or ("::" if ipv6 else "0.0.0.0")
    metrics = config.metrics_bind_address or ("::1" if ipv6 else "127.0.0.1")
    return msgspec.structs.replace(
        config,
        hostname_override=config.hostname_override.strip().lower(),
        healthz_bind_address=with_port(healthz, HEALTHZ_PORT),
        metrics_bind_address=with_port(metrics, METRICS_PORT),
    )


def with_port(address: str, port: int) -> str:
    """`address` with `port` if it is an IP address alone; anything else as it is."""
    try:
        canonical_address(address)
    except ValueError:
        return address
    return join_host_port(address, port)


def with_mode(config: Configuration, mode: ProxyMode) -> Configuration:
    """The configuration for the mode that was chosen. In nftables mode node ports default to the primary addresses."""
    addresses = config.node_port_addresses or (("primary",) if mode is ProxyMode.NFTABLES else ())
    return msgspec.structs.replace(config, mode=mode, node_port_addresses=addresses)


def mode_settings(config: Configuration, mode: ProxyMode) -> ModeSettings:
    """The active mode's settings. ipvs masquerades as the iptables part says."""
    periods: IPTables | IPVS | NFTables
    masquerade: IPTables | NFTables
    match mode:
        case ProxyMode.IPTABLES:
            periods, masquerade = config.iptables, config.iptables
        case ProxyMode.IPVS:
            periods, masquerade = config.ipvs, config.iptables
        case ProxyMode.NFTABLES:
            periods, masquerade = config.nftables, config.nftables
    return ModeSettings(
        sync_period=periods.sync_period,
        min_sync_period=periods.min_sync_period,
        masquerade_all=masquerade.masquerade_all,
        masquerade_bit=masquerade.masquerade_bit,
    )


def advice(config: Configuration, mode: ProxyMode) -> list[str]:
    """What is allowed and probably not meant; for warnings at start."""
    found = []
    if mode is not ProxyMode.NFTABLES and not config.node_port_addresses:
        found.append(
            "nodePortAddresses is not set, so node ports are open on every address of this node; "
            'consider "primary" (--nodeport-addresses primary)'
        )
    if config.detect_local_mode is DetectLocalMode.CLUSTER_CIDR and not config.cluster_cidr:
        found.append(
            "clusterCIDR is not set, so traffic from outside the cluster to a ClusterIP is not masqueraded; "
            "set it (--cluster-cidr), or another detectLocalMode"
        )
    return found
