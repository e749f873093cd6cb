"""What a configuration means for a mode and a machine."""

import pytest

from kproxy.config.defaults import ModeSettings, advice, defaulted, mode_settings, with_mode
from kproxy.config.duration import Duration
from kproxy.config.errors import ConfigError
from kproxy.config.local_detectors import local_detectors
from kproxy.config.v1alpha1 import IPVS, Configuration, DetectLocal, IPTables, NFTables, ProxyMode
from kproxy.model import DetectLocalMode, Family, LocalDetector

BOTH = (Family.IPv4, Family.IPv6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (ProxyMode.IPTABLES, ModeSettings(Duration(10), Duration(1), True, 3)),
        (ProxyMode.IPVS, ModeSettings(Duration(20), Duration(2), True, 3)),
        (ProxyMode.NFTABLES, ModeSettings(Duration(30), Duration(3), False, 4)),
    ],
)
def test_the_active_modes_part_counts_and_ipvs_masquerades_like_iptables(mode, expected):
    config = Configuration(
        iptables=IPTables(sync_period=Duration(10), min_sync_period=Duration(1), masquerade_all=True, masquerade_bit=3),
        ipvs=IPVS(sync_period=Duration(20), min_sync_period=Duration(2)),
        nftables=NFTables(
            sync_period=Duration(30), min_sync_period=Duration(3), masquerade_all=False, masquerade_bit=4
        ),
    )

    assert mode_settings(config, mode) == expected


def test_node_ports_are_on_primary_addresses_in_nftables_mode_unless_it_is_said_otherwise():
    def addresses(mode, *given):
        return with_mode(Configuration(node_port_addresses=given), mode).node_port_addresses

    assert addresses(ProxyMode.NFTABLES) == ("primary",)
    assert addresses(ProxyMode.IPTABLES) == ()
    assert addresses(ProxyMode.IPVS) == ()
    assert addresses(ProxyMode.NFTABLES, "10.0.0.0/8") == ("10.0.0.0/8",)


def test_the_mode_that_was_chosen_is_in_the_configuration():
    assert with_mode(Configuration(), ProxyMode.IPTABLES).mode is ProxyMode.IPTABLES


def test_advice_is_given_where_node_ports_are_open_everywhere_or_masquerading_cannot_work():
    bare = defaulted(Configuration())
    cluster = defaulted(Configuration(cluster_cidr="10.0.0.0/8", node_port_addresses=("primary",)))

    assert ["nodePortAddresses" in line for line in advice(bare, ProxyMode.IPTABLES)] == [True, False]
    assert ["clusterCIDR" in line for line in advice(bare, ProxyMode.NFTABLES)] == [True]
    assert advice(cluster, ProxyMode.IPVS) == []
    assert advice(Configuration(detect_local_mode=DetectLocalMode.NODE_CIDR), ProxyMode.NFTABLES) == []


@pytest.mark.parametrize(
    ("gates", "allowed"),
    [({}, True), ({"AllowServiceExternalIPs": True}, True), ({"AllowServiceExternalIPs": False}, False)],
)
def test_external_ips_can_be_switched_off_by_their_feature_gate(gates, allowed):
    assert Configuration(feature_gates=gates).allow_external_ips is allowed


def test_a_whole_stage_of_feature_gates_can_be_switched_and_single_ones_excepted():
    all_alpha = Configuration(feature_gates={"AllAlpha": True, "ComponentStatusz": False})

    assert not Configuration().enabled("ComponentFlagz")
    assert all_alpha.enabled("ComponentFlagz")
    assert not all_alpha.enabled("ComponentStatusz")
    assert not Configuration(feature_gates={"AllBeta": False}).enabled("WatchListClient")


CLUSTER_V4 = Configuration(cluster_cidr="10.244.3.0/16")
CLUSTER_BOTH = Configuration(cluster_cidr="fd00:10::/56, 10.244.0.0/16")
NODE = Configuration(detect_local_mode=DetectLocalMode.NODE_CIDR)
BRIDGE = Configuration(
    detect_local_mode=DetectLocalMode.BRIDGE_INTERFACE, detect_local=DetectLocal(bridge_interface="cbr0")
)
PREFIX = Configuration(
    detect_local_mode=DetectLocalMode.INTERFACE_NAME_PREFIX, detect_local=DetectLocal(interface_name_prefix="veth")
)
POD_CIDRS = ("10.244.1.0/24", "10.9.0.0/24", "fd00:10:0:1::/64")


@pytest.mark.parametrize(
    ("config", "pod_cidrs", "families", "expected"),
    [
        (Configuration(), (), BOTH, {}),
        (CLUSTER_V4, POD_CIDRS, BOTH, {Family.IPv4: LocalDetector(cidr="10.244.0.0/16")}),
        (
            CLUSTER_BOTH,
            (),
            BOTH,
            {Family.IPv4: LocalDetector(cidr="10.244.0.0/16"), Family.IPv6: LocalDetector(cidr="fd00:10::/56")},
        ),
        (CLUSTER_BOTH, (), (Family.IPv6,), {Family.IPv6: LocalDetector(cidr="fd00:10::/56")}),
        (
            NODE,
            POD_CIDRS,
            BOTH,
            {Family.IPv4: LocalDetector(cidr="10.244.1.0/24"), Family.IPv6: LocalDetector(cidr="fd00:10:0:1::/64")},
        ),
        (NODE, POD_CIDRS[:1], BOTH, {Family.IPv4: LocalDetector(cidr="10.244.1.0/24")}),
        (BRIDGE, (), BOTH, dict.fromkeys(BOTH, LocalDetector(interface="cbr0"))),
        (PREFIX, (), (Family.IPv4,), {Family.IPv4: LocalDetector(interface_prefix="veth")}),
    ],
)
def test_local_pods_are_recognised_as_the_detect_mode_says(config, pod_cidrs, families, expected):
    assert local_detectors(config, pod_cidrs, families) == expected


@pytest.mark.parametrize(
    ("config", "pod_cidrs", "families", "problem"),
    [
        (
            CLUSTER_V4,
            (),
            (Family.IPv6,),
            "clusterCIDR: 10.244.0.0/16: none is IPv6, the only family that this node serves",
        ),
        (
            NODE,
            ("fd00:10:0:1::/64",),
            (Family.IPv4,),
            "spec.podCIDRs of the Node: fd00:10:0:1::/64: none is IPv4, the only family that this node serves",
        ),
        (NODE, (), BOTH, "detectLocalMode: NodeCIDR needs spec.podCIDRs of the Node, and the Node has none"),
    ],
)
def test_a_detect_mode_that_cannot_work_on_this_node_is_refused(config, pod_cidrs, families, problem):
    with pytest.raises(ConfigError) as error:
        local_detectors(config, pod_cidrs, families)

    assert error.value.problems == (problem,)
