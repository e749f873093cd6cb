"""The rules a configuration must keep (reference: section 8.2); every broken one is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from kproxy.config.duration import Duration
from kproxy.config.errors import FieldError
from kproxy.config.feature_gates import FEATURE_GATES
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration, LogFormat, ProxyMode
from kproxy.model import DetectLocalMode, Family, canonical_address, canonical_cidr

KUBERNETES_VERSION = "v1.36.2"  # the release whose kube-proxy this is compatible with
_PREVIOUS_MINOR = "1.35"
_INTERFACE_NAME = re.compile(r"[^\s/]{1,15}")  # IFNAMSIZ, dev_valid_name


def validate(config: Configuration, unread: frozenset[str] = frozenset()) -> list[FieldError]:
    """All broken rules, in the order of the fields.

    `unread` names fields that could not be read and hold their defaults; no rule speaks of them or compares with them.
    """
    return [error for error in _broken_rules(config, unread) if error.field not in unread]


def validate_settings(settings: KproxyConfiguration, unread: frozenset[str] = frozenset()) -> list[FieldError]:
    """The same for kproxy's own settings."""
    errors = [
        *_at_least_zero("serviceMetrics.limit", settings.service_metrics.limit),
        *_at_least_zero("ipvs.drainTimeout", settings.ipvs.drain_timeout),
    ]
    return [error for error in errors if error.field not in unread]


def _broken_rules(config: Configuration, unread: frozenset[str]) -> Iterator[FieldError]:
    yield from _feature_gates(config.feature_gates)
    if not math.isfinite(config.client_connection.qps):
        yield FieldError("clientConnection.qps", f"{config.client_connection.qps} is not a finite number")
    yield from _at_least_zero("clientConnection.burst", config.client_connection.burst)
    yield from _logging(config)
    yield from _addresses(config)
    if config.show_hidden_metrics_for_version not in ("", _PREVIOUS_MINOR):
        reason = f'"{config.show_hidden_metrics_for_version}" is not the previous minor version, {_PREVIOUS_MINOR}'
        yield FieldError("showHiddenMetricsForVersion", reason)
    yield from _modes(config, unread)
    yield from _local_detection(config, unread)
    yield from _node_port_addresses(config.node_port_addresses)
    if not -1000 <= config.oom_score_adj <= 1000:
        yield FieldError("oomScoreAdj", f"{config.oom_score_adj} is not in the range -1000 to 1000")
    conntrack = config.conntrack
    yield from _at_least_zero("conntrack.maxPerCore", conntrack.max_per_core)
    yield from _at_least_zero("conntrack.min", conntrack.min)
    yield from _at_least_zero("conntrack.tcpEstablishedTimeout", conntrack.tcp_established_timeout)
    yield from _at_least_zero("conntrack.tcpCloseWaitTimeout", conntrack.tcp_close_wait_timeout)
    yield from _at_least_zero("conntrack.udpTimeout", conntrack.udp_timeout)
    yield from _at_least_zero("conntrack.udpStreamTimeout", conntrack.udp_stream_timeout)
    yield from _more_than_zero("configSyncPeriod", config.config_sync_period)


def _at_least_zero(field: str, value: int) -> Iterator[FieldError]:
    if value < 0:
        yield FieldError(field, f"{value} is less than 0")


def _more_than_zero(field: str, value: Duration) -> Iterator[FieldError]:
    if value <= 0:
        yield FieldError(field, f"{value} is not greater than 0")


def _feature_gates(chosen: Mapping[str, bool]) -> Iterator[FieldError]:
    for name, value in chosen.items():
        gate = FEATURE_GATES.get(name)
        if gate and gate.locked and value != gate.default:
            reason = f"cannot set feature gate {name} to {_go(value)}, feature is locked to {_go(gate.default)}"
            yield FieldError("featureGates", reason)


def _go(value: bool) -> str:
    return "true" if value else "false"


def _logging(config: Configuration) -> Iterator[FieldError]:
    logging = config.logging
    if logging.vmodule and logging.format is LogFormat.JSON:
        yield FieldError("logging.vmodule", "only supported for the text log format")
    for item in logging.vmodule:
        if not item.file_pattern or set(item.file_pattern) & set("=,"):
            yield FieldError("logging.vmodule", f'"{item.file_pattern}" is not a file name pattern')


def _addresses(config: Configuration) -> Iterator[FieldError]:
    try:
        canonical_address(config.bind_address)
    except ValueError:
        yield FieldError("bindAddress", f'"{config.bind_address}" is not an IP address')
    yield from _listen_address("healthzBindAddress", config.healthz_bind_address)
    yield from _listen_address("metricsBindAddress", config.metrics_bind_address)


def _listen_address(field: str, text: str) -> Iterator[FieldError]:
    """Empty is a server that is switched off."""
    if not text:
        return
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or bracketed != (":" in host):
        yield FieldError(field, f'"{text}" is not of the form IP:port ([IP]:port for IPv6)')
        return
    try:
        canonical_address(host[1:-1] if bracketed else host)
    except ValueError:
        yield FieldError(field, f'"{host}" in "{text}" is not an IP address')
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        yield FieldError(field, f'"{port}" in "{text}" is not a port from 1 to 65535')


def _modes(config: Configuration, unread: frozenset[str]) -> Iterator[FieldError]:
    """The iptables part always counts for its bit; the others only where their mode is, or may be, chosen."""
    mode = config.mode
    yield from _masquerade_bit("iptables.masqueradeBit", config.iptables.masquerade_bit)
    if mode in (ProxyMode.IPTABLES, None):
        yield from _periods("iptables", config.iptables.sync_period, config.iptables.min_sync_period, unread)
    if mode in (ProxyMode.NFTABLES, None):
        yield from _masquerade_bit("nftables.masqueradeBit", config.nftables.masquerade_bit)
        yield from _periods("nftables", config.nftables.sync_period, config.nftables.min_sync_period, unread)
    if mode is ProxyMode.IPVS:
        ipvs = config.ipvs
        yield from _periods("ipvs", ipvs.sync_period, ipvs.min_sync_period, unread)
        yield from _at_least_zero("ipvs.tcpTimeout", ipvs.tcp_timeout)
        yield from _at_least_zero("ipvs.tcpFinTimeout", ipvs.tcp_fin_timeout)
        yield from _at_least_zero("ipvs.udpTimeout", ipvs.udp_timeout)
        yield from (FieldError("ipvs.excludeCIDRs", reason) for reason in _not_cidrs(ipvs.exclude_cidrs))


def _masquerade_bit(field: str, bit: int) -> Iterator[FieldError]:
    if not 0 <= bit <= 31:
        yield FieldError(field, f"{bit} is not in the range 0 to 31")


def _periods(part: str, period: Duration, minimum: Duration, unread: frozenset[str]) -> Iterator[FieldError]:
    yield from _more_than_zero(f"{part}.syncPeriod", period)
    yield from _at_least_zero(f"{part}.minSyncPeriod", minimum)
    if minimum > period > 0 and f"{part}.syncPeriod" not in unread:
        yield FieldError(f"{part}.minSyncPeriod", f"{minimum} is greater than syncPeriod, {period}")


def _local_detection(config: Configuration, unread: frozenset[str]) -> Iterator[FieldError]:
    if "detectLocalMode" in unread:
        return
    match config.detect_local_mode:
        case DetectLocalMode.CLUSTER_CIDR:
            yield from _cluster_cidr(config.cluster_cidr)
        case DetectLocalMode.BRIDGE_INTERFACE:
            yield from _interface("detectLocal.bridgeInterface", config.detect_local.bridge_interface)
        case DetectLocalMode.INTERFACE_NAME_PREFIX:
            yield from _interface("detectLocal.interfaceNamePrefix", config.detect_local.interface_name_prefix)
        case DetectLocalMode.NODE_CIDR:
            pass


def _interface(field: str, name: str) -> Iterator[FieldError]:
    if not name:
        mode = "BridgeInterface" if field.endswith("bridgeInterface") else "InterfaceNamePrefix"
        yield FieldError(field, f"is required when detectLocalMode is {mode}")
    elif not _INTERFACE_NAME.fullmatch(name):
        yield FieldError(
            field, f'"{name}" cannot match an interface: names have 1 to 15 characters, no blank and no slash'
        )


def _cluster_cidr(text: str) -> Iterator[FieldError]:
    if not text:
        return
    cidrs = text.split(",")
    reasons = list(_not_cidrs(cidrs))
    yield from (FieldError("clusterCIDR", reason) for reason in reasons)
    if len(cidrs) > 2:
        yield FieldError(
            "clusterCIDR", f'"{text}" has {len(cidrs)} CIDRs; one, or a pair of both families, is possible'
        )
    elif len(cidrs) == 2 and not reasons and Family.of(cidrs[0]) is Family.of(cidrs[1]):
        yield FieldError(
            "clusterCIDR", f'"{text}" has two {Family.of(cidrs[0]).name} CIDRs; a pair must be of both families'
        )


def _node_port_addresses(addresses: tuple[str, ...]) -> Iterator[FieldError]:
    if addresses == ("primary",):
        return
    if "primary" in addresses:
        yield FieldError("nodePortAddresses", '"primary" must be the only entry')
    cidrs = [address for address in addresses if address != "primary"]
    yield from (FieldError("nodePortAddresses", reason) for reason in _not_cidrs(cidrs))


def _not_cidrs(texts: list[str] | tuple[str, ...]) -> Iterator[str]:
    for text in texts:
        try:
            canonical_cidr(text)
        except ValueError:
            yield f'"{text}" is not a CIDR'
        else:
            if text != text.strip():  # which manifests may have
                yield f'"{text}" has a blank beside the CIDR'
