"""Configuration files: what deployments really contain, every field, and what is said about bad ones."""

import json
from pathlib import Path

import pytest
import yaml

from kproxy.cli.flags import defaults_by_flags
from kproxy.config.duration import Duration
from kproxy.config.errors import ConfigError
from kproxy.config.files import config_yaml, lost_in_a_file, read_config_file
from kproxy.config.v1alpha1 import (
    Configuration,
    Conntrack,
    IPTables,
    KproxyConfiguration,
    LogFormat,
    ProxyMode,
    VModuleItem,
    paths,
    replaced,
    to_v1alpha1,
    value_at,
)
from kproxy.model import DetectLocalMode
from tests.config.conftest import HEAD, OWN_HEAD

HERE = Path(__file__).parent
KUBEADM = (HERE / "kubeadm.conf").read_text()
KIND = (HERE / "kind.conf").read_text()


KNOWN = "expected kubeproxy.config.k8s.io/v1alpha1 KubeProxyConfiguration or kproxy.dev/v1alpha1 KproxyConfiguration"


def test_the_file_that_kubeadm_generates_means_the_defaults(read):
    config, settings, warnings = read(KUBEADM)

    assert warnings == ()
    assert settings == KproxyConfiguration()
    assert config.client_connection.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert config.cluster_cidr == "10.244.0.0/16"
    assert config == replaced(
        replaced(read(HEAD).configuration, "clusterCIDR", "10.244.0.0/16"),
        "clientConnection.kubeconfig",
        "/var/lib/kube-proxy/kubeconfig.conf",
    )


def test_the_file_that_kind_generates_keeps_its_zeros(read):
    config, _, warnings = read(KIND)

    assert warnings == ()
    assert config.mode is ProxyMode.NFTABLES
    assert config.conntrack.max_per_core == 0
    assert config.conntrack.min == 131072
    assert config.conntrack.tcp_be_liberal is True
    assert config.conntrack.tcp_established_timeout == 0
    assert config.conntrack.tcp_close_wait_timeout == 0


def test_an_empty_configuration_has_kube_proxys_defaults(read):
    assert to_v1alpha1(read(HEAD).configuration) == {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {
            "kubeconfig": "",
            "acceptContentTypes": "",
            "contentType": "application/vnd.kubernetes.protobuf",
            "qps": 5,
            "burst": 10,
        },
        "logging": {
            "format": "",
            "flushFrequency": "5s",
            "verbosity": 0,
            "options": {"text": {"infoBufferSize": "0"}, "json": {"infoBufferSize": "0"}},
        },
        "hostnameOverride": "",
        "bindAddress": "0.0.0.0",
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "bindAddressHardFail": False,
        "enableProfiling": False,
        "showHiddenMetricsForVersion": "",
        "mode": "",
        "iptables": {
            "masqueradeBit": 14,
            "masqueradeAll": False,
            "localhostNodePorts": True,
            "syncPeriod": "30s",
            "minSyncPeriod": "1s",
        },
        "ipvs": {
            "syncPeriod": "30s",
            "minSyncPeriod": "0s",
            "scheduler": "",
            "excludeCIDRs": None,
            "strictARP": False,
            "tcpTimeout": "0s",
            "tcpFinTimeout": "0s",
            "udpTimeout": "0s",
        },
        "nftables": {"masqueradeBit": 14, "masqueradeAll": False, "syncPeriod": "30s", "minSyncPeriod": "0s"},
        "winkernel": {
            "networkName": "",
            "sourceVip": "",
            "enableDSR": False,
            "rootHnsEndpointName": "",
            "forwardHealthCheckVip": False,
        },
        "detectLocalMode": "ClusterCIDR",
        "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
        "clusterCIDR": "",
        "nodePortAddresses": None,
        "oomScoreAdj": -999,
        "conntrack": {
            "maxPerCore": 32768,
            "min": 131072,
            "tcpEstablishedTimeout": "24h0m0s",
            "tcpCloseWaitTimeout": "1h0m0s",
            "tcpBeLiberal": False,
            "udpTimeout": "0s",
            "udpStreamTimeout": "0s",
        },
        "configSyncPeriod": "15m0s",
        "portRange": "",
    }


def seconds(number):
    return Duration(number * 10**9)


# field, what a file says, what it means
EVERY_FIELD = [
    ("featureGates", {"AllowServiceExternalIPs": False}, {"AllowServiceExternalIPs": False}),
    ("clientConnection.kubeconfig", "/etc/kubeconfig", "/etc/kubeconfig"),
    ("clientConnection.acceptContentTypes", "application/json", "application/json"),
    ("clientConnection.contentType", "application/json", "application/json"),
    ("clientConnection.qps", 2.5, 2.5),
    ("clientConnection.burst", 7, 7),
    ("logging.format", "json", LogFormat.JSON),
    ("logging.flushFrequency", 3_000_000_000, seconds(3)),
    ("logging.verbosity", 4, 4),
    (
        "logging.vmodule",
        [{"filePattern": "proxy*", "verbosity": 5}],
        (VModuleItem(file_pattern="proxy*", verbosity=5),),
    ),
    ("logging.options.text.splitStream", True, True),
    ("logging.options.text.infoBufferSize", "64Ki", "64Ki"),
    ("logging.options.json.splitStream", True, True),
    ("logging.options.json.infoBufferSize", 4096, 4096),
    ("hostnameOverride", " Node-A ", "node-a"),
    ("bindAddress", "192.0.2.1", "192.0.2.1"),
    ("healthzBindAddress", "192.0.2.1:1234", "192.0.2.1:1234"),
    ("metricsBindAddress", "[2001:db8::1]:1235", "[2001:db8::1]:1235"),
    ("bindAddressHardFail", True, True),
    ("enableProfiling", True, True),
    ("showHiddenMetricsForVersion", "1.35", "1.35"),
    ("mode", "ipvs", ProxyMode.IPVS),
    ("iptables.masqueradeBit", 0, 0),
    ("iptables.masqueradeAll", True, True),
    ("iptables.localhostNodePorts", False, False),
    ("iptables.syncPeriod", "1m", seconds(60)),
    ("iptables.minSyncPeriod", "2s", seconds(2)),
    ("ipvs.syncPeriod", "1m30s", seconds(90)),
    ("ipvs.minSyncPeriod", "3s", seconds(3)),
    ("ipvs.scheduler", "mh", "mh"),
    ("ipvs.excludeCIDRs", ["192.0.2.0/24"], ("192.0.2.0/24",)),
    ("ipvs.strictARP", True, True),
    ("ipvs.tcpTimeout", "15m", seconds(900)),
    ("ipvs.tcpFinTimeout", "2m", seconds(120)),
    ("ipvs.udpTimeout", "5m", seconds(300)),
    ("nftables.masqueradeBit", 31, 31),
    ("nftables.masqueradeAll", True, True),
    ("nftables.syncPeriod", "10s", seconds(10)),
    ("nftables.minSyncPeriod", "5s", seconds(5)),
    ("winkernel.networkName", "a", "a"),
    ("winkernel.sourceVip", "192.0.2.9", "192.0.2.9"),
    ("winkernel.enableDSR", True, True),
    ("winkernel.rootHnsEndpointName", "b", "b"),
    ("winkernel.forwardHealthCheckVip", True, True),
    ("detectLocalMode", "NodeCIDR", DetectLocalMode.NODE_CIDR),
    ("detectLocal.bridgeInterface", "br0", "br0"),
    ("detectLocal.interfaceNamePrefix", "veth", "veth"),
    ("clusterCIDR", "10.0.0.0/8,fd00::/48", "10.0.0.0/8,fd00::/48"),
    ("nodePortAddresses", ["primary"], ("primary",)),
    ("oomScoreAdj", 0, 0),
    ("conntrack.maxPerCore", 0, 0),
    ("conntrack.min", 0, 0),
    ("conntrack.tcpEstablishedTimeout", "0s", seconds(0)),
    ("conntrack.tcpCloseWaitTimeout", "60s", seconds(60)),
    ("conntrack.tcpBeLiberal", True, True),
    ("conntrack.udpTimeout", "30s", seconds(30)),
    ("conntrack.udpStreamTimeout", "3m", seconds(180)),
    ("configSyncPeriod", "1h", seconds(3600)),
    ("portRange", "1-2", "1-2"),
    ("windowsRunAsService", True, True),
]


def document_with(field, value):
    *sections, last = field.split(".")
    document = {last: value}
    for section in reversed(sections):
        document = {section: document}
    return HEAD + yaml.safe_dump(document)


def test_the_table_of_fields_is_complete():
    assert [field for field, _, _ in EVERY_FIELD] == paths(Configuration())


@pytest.mark.parametrize(("field", "written", "meant"), EVERY_FIELD, ids=[field for field, _, _ in EVERY_FIELD])
def test_a_field_of_the_file_is_read_and_nothing_else_changes(read, field, written, meant):
    config = read(document_with(field, written)).configuration

    assert value_at(config, field) == meant
    assert replaced(config, field, value_at(read(HEAD).configuration, field)) == read(HEAD).configuration


@pytest.mark.parametrize(("field", "written", "meant"), EVERY_FIELD, ids=[field for field, _, _ in EVERY_FIELD])
def test_what_is_written_back_means_the_same(read, field, written, meant):
    config, settings, _ = read(document_with(field, written))

    again = read(config_yaml(config, settings))

    assert (again.configuration, again.settings) == (config, settings)


def test_zeros_that_a_file_cannot_keep_are_known():
    asked = Configuration(iptables=IPTables(min_sync_period=seconds(0)), conntrack=Conntrack(min=0))  # no servers

    assert lost_in_a_file(asked) == ["healthzBindAddress", "metricsBindAddress", "iptables.minSyncPeriod"]
    assert lost_in_a_file(defaults_by_flags()) == []


def test_a_file_may_be_json(read):
    document = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "ipvs"}

    assert read(json.dumps(document, indent="\t")).configuration.mode is ProxyMode.IPVS


def test_a_yaml_file_may_begin_with_a_brace(read):
    text = "{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: KubeProxyConfiguration, mode: ipvs}"

    assert read(text).configuration.mode is ProxyMode.IPVS


def test_kproxys_own_settings_are_a_second_document(read):
    config, settings, warnings = read(
        HEAD + "mode: nftables\n" + OWN_HEAD + "serviceMetrics: {enabled: false, limit: 0}\nmanifests: /etc/services\n"
    )

    assert warnings == ()
    assert config.mode is ProxyMode.NFTABLES
    assert (settings.service_metrics.enabled, settings.service_metrics.limit) == (False, 0)
    assert settings.manifests == "/etc/services"
    assert read(config_yaml(config, settings)).settings == settings


def test_the_addresses_of_the_servers_follow_an_ipv6_bind_address_and_get_their_ports(read):
    ipv6 = read(HEAD + "bindAddress: '::'\n").configuration
    bare = read(HEAD + "healthzBindAddress: 192.0.2.1\nmetricsBindAddress: 2001:db8::1\n").configuration

    assert (ipv6.healthz_bind_address, ipv6.metrics_bind_address) == ("[::]:10256", "[::1]:10249")
    assert (bare.healthz_bind_address, bare.metrics_bind_address) == ("192.0.2.1:10256", "[2001:db8::1]:10249")


def test_unknown_and_repeated_fields_are_ignored_with_a_warning(read, tmp_path):
    config, _, warnings = read(
        HEAD + "mode: iptables\nmode: ipvs\niptables: {snat: true, masqueradeBit: 3}\nbindaddress: 192.0.2.1\n"
    )

    assert config.mode is ProxyMode.IPVS
    assert config.iptables.masquerade_bit == 3
    assert config.bind_address == "0.0.0.0"
    path = tmp_path / "config.conf"
    assert warnings == (
        f"{path}: mode: set twice; the last one, in line 4, counts",
        f"{path}: iptables.snat: unknown field; ignored",
        f"{path}: bindaddress: unknown field; ignored",
    )


def test_a_field_twice_in_json_is_noticed_too(read):
    head = '"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"'

    config, _, warnings = read(f'{{{head}, "mode": "ipvs", "mode": "nftables"}}')

    assert config.mode is ProxyMode.NFTABLES
    assert [warning.partition(": ")[2] for warning in warnings] == ["mode: set twice; the last one counts"]


def test_settings_without_effect_are_named_with_the_reason(read):
    warnings = read(
        HEAD
        + "portRange: 1-2\nclientConnection: {contentType: application/json}\n"
        + "featureGates: {WatchListClient: false, SidecarContainers: true}\n"
    ).warnings

    assert [warning.partition(": ")[2] for warning in warnings] == [
        "clientConnection.contentType has no effect in kproxy: kproxy reads the API as JSON",
        "portRange has no effect in kproxy: kube-proxy does not use it either",
        "feature gate WatchListClient has no effect in kproxy",
        "feature gate SidecarContainers is not kube-proxy's and has no effect in kproxy",
    ]


def test_every_problem_of_a_file_is_named(problems_of):
    assert problems_of(
        HEAD
        + """
mode: userspace
iptables: {masqueradeBit: "14", masqueradeAll: 1, syncPeriod: 30, minSyncPeriod: 60s}
nftables: []
logging: {verbosity: -1, vmodule: [{filePattern: 3}]}
conntrack: {maxPerCore: -1, udpTimeout: 1d}
nodePortAddresses: 10.0.0.0/8
featureGates: {AllAlpha: true, AllBeta: "yes", NFTablesProxyMode: false}
oomScoreAdj: 5000000000
"""
        + OWN_HEAD
        + "serviceMetrics: {limit: -5}\nipvs: {drainTimeout: 15}\n"
    ) == [
        'mode: "userspace" is not one of iptables, ipvs, nftables',
        "iptables.masqueradeBit: expected int, got str",
        "iptables.masqueradeAll: expected bool, got int",
        "iptables.syncPeriod: expected a duration such as 30s, got 30",
        "nftables: expected an object, got []",
        "logging.verbosity: expected int >= 0, got -1",
        "logging.vmodule[0].filePattern: expected str, got int",
        'conntrack.udpTimeout: "1d" is not a duration such as 30s, 1h2m or 100ms',
        "nodePortAddresses: expected array, got str",
        "featureGates.AllBeta: expected bool, got str",
        "oomScoreAdj: expected int <= 2147483647, got 5000000000",
        "featureGates: cannot set feature gate NFTablesProxyMode to false, feature is locked to true",
        "conntrack.maxPerCore: -1 is less than 0",
        "KproxyConfiguration: ipvs.drainTimeout: expected a duration such as 30s, got 15",
        "KproxyConfiguration: serviceMetrics.limit: -5 is less than 0",
    ]


def test_a_field_that_cannot_be_read_does_not_make_others_look_wrong(problems_of):
    assert problems_of(
        HEAD
        + "iptables: {syncPeriod: x, minSyncPeriod: 60s}\ndetectLocalMode: Magic\nclusterCIDR: 10.0.0.0/8,11.0.0.0/8\n"
        + "nodePortAddresses: [!!int x]\n"
    ) == [
        'nodePortAddresses[0]: "x" is not a !!int',
        'iptables.syncPeriod: "x" is not a duration such as 30s, 1h2m or 100ms',
        'detectLocalMode: "Magic" is not one of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix',
    ]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["is empty; expected a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1)"]),
        ("- a\n", ["document 1: expected an object with apiVersion and kind"]),
        (
            HEAD.replace("v1alpha1", "v1") + "---\nmode: ipvs\n",
            [
                f'document 1: {KNOWN}, got "kubeproxy.config.k8s.io/v1" "KubeProxyConfiguration"',
                f'document 2: {KNOWN}, got "" ""',
            ],
        ),
        (f"{HEAD}---\n{HEAD}", ["document 2: a second KubeProxyConfiguration; one is possible"]),
    ],
)
def test_a_file_without_a_known_object_is_refused(problems_of, text, problems):
    assert problems_of(text) == problems


def test_a_file_that_is_not_yaml_is_refused_with_the_place(problems_of):
    (problem,) = problems_of(HEAD + "mode: [ipvs\n")

    assert problem.startswith("is not YAML: ")
    assert "line 4" in problem


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "binary.conf"
    binary.write_bytes(b"\xff\xfe")

    for path, reason in ((tmp_path / "missing.conf", "No such file or directory"), (binary, "not UTF-8 text")):
        with pytest.raises(ConfigError) as error:
            read_config_file(path)
        assert error.value.problems == (f"{path}: cannot be read: {reason}",)
