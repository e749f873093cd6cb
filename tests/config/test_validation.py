"""Every rule of the configuration, and that all broken ones are reported together."""

import pytest

from kproxy.config.defaults import defaulted
from kproxy.config.duration import Duration
from kproxy.config.v1alpha1 import (
    Configuration,
    KproxyConfiguration,
    LogFormat,
    ProxyMode,
    VModuleItem,
    replaced,
)
from kproxy.config.validation import validate, validate_settings
from kproxy.model import DetectLocalMode


def changed(fields):
    config = defaulted(Configuration())
    for field, value in fields.items():
        config = replaced(config, field, value)
    return config


def seconds(number):
    return Duration(int(number * 10**9))


@pytest.mark.parametrize("mode", [None, *ProxyMode])
def test_the_defaults_are_valid_in_every_mode(mode):
    assert validate(changed({"mode": mode})) == []


IMPOSSIBLE = "cannot match an interface: names have 1 to 15 characters, no blank and no slash"

BROKEN = [
    (
        {"featureGates": {"NFTablesProxyMode": False, "PreferSameTrafficDistribution": True}},
        ["featureGates: cannot set feature gate NFTablesProxyMode to false, feature is locked to true"],
    ),
    ({"clientConnection.qps": float("nan")}, ["clientConnection.qps: nan is not a finite number"]),
    ({"clientConnection.burst": -1}, ["clientConnection.burst: -1 is less than 0"]),
    (
        {"logging.format": LogFormat.JSON, "logging.vmodule": (VModuleItem(file_pattern="a", verbosity=1),)},
        ["logging.vmodule: only supported for the text log format"],
    ),
    (
        {"logging.vmodule": (VModuleItem(), VModuleItem(file_pattern="a=b"))},
        ['logging.vmodule: "" is not a file name pattern', 'logging.vmodule: "a=b" is not a file name pattern'],
    ),
    ({"bindAddress": "node-1"}, ['bindAddress: "node-1" is not an IP address']),
    (
        {"healthzBindAddress": "localhost:10256"},
        ['healthzBindAddress: "localhost" in "localhost:10256" is not an IP address'],
    ),
    (
        {"metricsBindAddress": "192.0.2.1:0"},
        ['metricsBindAddress: "0" in "192.0.2.1:0" is not a port from 1 to 65535'],
    ),
    (
        {"metricsBindAddress": "[::1]:65536"},
        ['metricsBindAddress: "65536" in "[::1]:65536" is not a port from 1 to 65535'],
    ),
    (
        {"metricsBindAddress": "metrics"},
        ['metricsBindAddress: "metrics" is not of the form IP:port ([IP]:port for IPv6)'],
    ),
    (
        {"showHiddenMetricsForVersion": "1.34"},
        ['showHiddenMetricsForVersion: "1.34" is not the previous minor version, 1.35'],
    ),
    ({"iptables.masqueradeBit": 32}, ["iptables.masqueradeBit: 32 is not in the range 0 to 31"]),
    (
        {"iptables.masqueradeBit": -1, "mode": ProxyMode.NFTABLES},
        ["iptables.masqueradeBit: -1 is not in the range 0 to 31"],
    ),
    ({"nftables.masqueradeBit": 32}, ["nftables.masqueradeBit: 32 is not in the range 0 to 31"]),
    (
        {"iptables.syncPeriod": seconds(0), "iptables.minSyncPeriod": seconds(0)},
        ["iptables.syncPeriod: 0s is not greater than 0"],
    ),
    ({"iptables.minSyncPeriod": seconds(-1)}, ["iptables.minSyncPeriod: -1s is less than 0"]),
    ({"iptables.minSyncPeriod": seconds(31)}, ["iptables.minSyncPeriod: 31s is greater than syncPeriod, 30s"]),
    (
        {"nftables.syncPeriod": seconds(0.5), "nftables.minSyncPeriod": seconds(1)},
        ["nftables.minSyncPeriod: 1s is greater than syncPeriod, 500ms"],
    ),
    (
        {"ipvs.syncPeriod": seconds(-1), "mode": ProxyMode.IPVS},
        ["ipvs.syncPeriod: -1s is not greater than 0"],
    ),
    (
        {"ipvs.minSyncPeriod": seconds(60), "mode": ProxyMode.IPVS},
        ["ipvs.minSyncPeriod: 1m0s is greater than syncPeriod, 30s"],
    ),
    ({"ipvs.tcpTimeout": seconds(-1), "mode": ProxyMode.IPVS}, ["ipvs.tcpTimeout: -1s is less than 0"]),
    ({"ipvs.tcpFinTimeout": seconds(-1), "mode": ProxyMode.IPVS}, ["ipvs.tcpFinTimeout: -1s is less than 0"]),
    ({"ipvs.udpTimeout": seconds(-1), "mode": ProxyMode.IPVS}, ["ipvs.udpTimeout: -1s is less than 0"]),
    (
        {"ipvs.excludeCIDRs": ("10.0.0.0/8", "10.0.0.1"), "mode": ProxyMode.IPVS},
        ['ipvs.excludeCIDRs: "10.0.0.1" is not a CIDR'],
    ),
    ({"clusterCIDR": "10.0.0.0"}, ['clusterCIDR: "10.0.0.0" is not a CIDR']),
    (
        {"clusterCIDR": "10.0.0.0/8, fd00::/48"},
        ['clusterCIDR: " fd00::/48" has a blank beside the CIDR'],
    ),
    (
        {"clusterCIDR": "10.0.0.0/8,11.0.0.0/8"},
        ['clusterCIDR: "10.0.0.0/8,11.0.0.0/8" has two IPv4 CIDRs; a pair must be of both families'],
    ),
    (
        {"clusterCIDR": "10.0.0.0/8,fd00::/48,fd01::/48"},
        ['clusterCIDR: "10.0.0.0/8,fd00::/48,fd01::/48" has 3 CIDRs; one, or a pair of both families, is possible'],
    ),
    (
        {"detectLocalMode": DetectLocalMode.BRIDGE_INTERFACE},
        ["detectLocal.bridgeInterface: is required when detectLocalMode is BridgeInterface"],
    ),
    (
        {"detectLocalMode": DetectLocalMode.INTERFACE_NAME_PREFIX},
        ["detectLocal.interfaceNamePrefix: is required when detectLocalMode is InterfaceNamePrefix"],
    ),
    (
        {"detectLocalMode": DetectLocalMode.BRIDGE_INTERFACE, "detectLocal.bridgeInterface": 'a" drop'},
        [f'detectLocal.bridgeInterface: "a" drop" {IMPOSSIBLE}'],
    ),
    ({"nodePortAddresses": ("primary", "10.0.0.0/8")}, ['nodePortAddresses: "primary" must be the only entry']),
    (
        {"nodePortAddresses": ("10.0.0.0/8", "eth0", "10.0.0.0/33")},
        ['nodePortAddresses: "eth0" is not a CIDR', 'nodePortAddresses: "10.0.0.0/33" is not a CIDR'],
    ),
    ({"oomScoreAdj": 1001}, ["oomScoreAdj: 1001 is not in the range -1000 to 1000"]),
    ({"oomScoreAdj": -1001}, ["oomScoreAdj: -1001 is not in the range -1000 to 1000"]),
    ({"conntrack.maxPerCore": -1}, ["conntrack.maxPerCore: -1 is less than 0"]),
    ({"conntrack.min": -1}, ["conntrack.min: -1 is less than 0"]),
    ({"conntrack.tcpEstablishedTimeout": seconds(-1)}, ["conntrack.tcpEstablishedTimeout: -1s is less than 0"]),
    ({"conntrack.tcpCloseWaitTimeout": seconds(-1)}, ["conntrack.tcpCloseWaitTimeout: -1s is less than 0"]),
    ({"conntrack.udpTimeout": seconds(-1)}, ["conntrack.udpTimeout: -1s is less than 0"]),
    ({"conntrack.udpStreamTimeout": seconds(-1)}, ["conntrack.udpStreamTimeout: -1s is less than 0"]),
    ({"configSyncPeriod": seconds(0)}, ["configSyncPeriod: 0s is not greater than 0"]),
]


@pytest.mark.parametrize(("fields", "problems"), BROKEN, ids=[problems[0] for _, problems in BROKEN])
def test_a_broken_rule_is_reported_with_its_field(fields, problems):
    assert [str(error) for error in validate(changed(fields))] == problems


def test_all_broken_rules_are_reported_together():
    fields, problems = {}, []
    for more, reasons in BROKEN:
        if not more.keys() & {*fields, "mode", "detectLocalMode"}:  # those two decide which rules count
            fields |= more
            problems += reasons

    assert len(problems) > 20
    assert sorted(str(error) for error in validate(changed(fields))) == sorted(problems)


@pytest.mark.parametrize(
    "fields",
    [
        {"iptables.syncPeriod": seconds(-1), "mode": ProxyMode.NFTABLES},
        {"iptables.syncPeriod": seconds(-1), "mode": ProxyMode.IPVS},
        {"nftables.masqueradeBit": 99, "nftables.syncPeriod": seconds(0), "mode": ProxyMode.IPTABLES},
        {"ipvs.excludeCIDRs": ("x",), "ipvs.syncPeriod": seconds(0), "ipvs.udpTimeout": seconds(-1)},
        {"clusterCIDR": "nonsense", "detectLocalMode": DetectLocalMode.NODE_CIDR},
        {"healthzBindAddress": "", "metricsBindAddress": ""},
        {"iptables.minSyncPeriod": seconds(30), "nftables.minSyncPeriod": seconds(0)},
        {"clusterCIDR": "fd00::/48,10.0.0.0/8"},
        {"bindAddress": "010.0.0.1"},
        {"oomScoreAdj": 1000, "iptables.masqueradeBit": 31, "nftables.masqueradeBit": 0},
        {"detectLocalMode": DetectLocalMode.INTERFACE_NAME_PREFIX, "detectLocal.interfaceNamePrefix": "cali"},
    ],
    ids=str,
)
def test_what_is_at_the_limit_or_not_in_use_is_no_error(fields):
    assert validate(changed(fields)) == []


def test_the_limit_of_series_cannot_be_negative():
    settings = replaced(KproxyConfiguration(), "serviceMetrics.limit", -1)

    assert [str(error) for error in validate_settings(settings)] == ["serviceMetrics.limit: -1 is less than 0"]
