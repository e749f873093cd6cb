"""The command line: every flag, its Go syntax, what counts beside --config, and what is said about bad ones."""

from pathlib import Path

import pytest

from kproxy.cli.flags import FLAGS, Color, Output, defaults_by_flags
from kproxy.cli.help import help_text
from kproxy.cli.invocation import Action, UsageError, parse, version_text
from kproxy.config.duration import Duration
from kproxy.config.v1alpha1 import KproxyConfiguration, LogFormat, ProxyMode, VModuleItem, replaced
from kproxy.model import DetectLocalMode


def problems_of(*argv):
    with pytest.raises(UsageError) as error:
        parse(argv)
    return list(error.value.problems)


def configured(fields):
    config = defaults_by_flags()
    for field, value in fields.items():
        config = replaced(config, field, value)
    return config


def seconds(number):
    return Duration(number * 10**9)


VMODULE = (VModuleItem(file_pattern="a", verbosity=1), VModuleItem(file_pattern="b*", verbosity=2))

# flags that set fields of the configuration, and the fields with their values
CONFIGURING = [
    ("--feature-gates=AllAlpha=true,AllBeta=false", {"featureGates": {"AllAlpha": True, "AllBeta": False}}),
    ("--kubeconfig=/etc/k", {"clientConnection.kubeconfig": "/etc/k"}),
    ("--kube-api-qps=0.5", {"clientConnection.qps": 0.5}),
    ("--kube-api-burst=20", {"clientConnection.burst": 20}),
    ("--kube-api-content-type=application/json", {"clientConnection.contentType": "application/json"}),
    ("--config-sync-period=1h", {"configSyncPeriod": seconds(3600)}),
    ("--hostname-override= Node-A", {"hostnameOverride": "node-a"}),
    ("--bind-address=192.0.2.1", {"bindAddress": "192.0.2.1"}),
    (
        "--bind-address=2001:db8::1",
        {
            "bindAddress": "2001:db8::1",
            "healthzBindAddress": "[::]:10256",
            "metricsBindAddress": "[::1]:10249",
        },
    ),
    ("--bind-address=", {}),
    ("--oom-score-adj=-998", {"oomScoreAdj": -998}),
    ("--healthz-bind-address=192.0.2.1:80", {"healthzBindAddress": "192.0.2.1:80"}),
    ("--healthz-bind-address=::1", {"healthzBindAddress": "[::1]:10256"}),
    ("--healthz-bind-address=", {"healthzBindAddress": ""}),
    ("--metrics-bind-address=0.0.0.0", {"metricsBindAddress": "0.0.0.0:10249"}),
    ("--metrics-bind-address=", {"metricsBindAddress": ""}),
    ("--bind-address-hard-fail", {"bindAddressHardFail": True}),
    ("--healthz-port=0", {"healthzBindAddress": ""}),
    ("--healthz-port=99", {}),  # the default address has a port
    ("--metrics-port=0", {"metricsBindAddress": ""}),
    ("--profiling", {"enableProfiling": True}),
    ("--show-hidden-metrics-for-version=1.35", {"showHiddenMetricsForVersion": "1.35"}),
    ("--proxy-mode=iptables", {"mode": ProxyMode.IPTABLES}),
    ("--proxy-mode=ipvs", {"mode": ProxyMode.IPVS}),
    ("--proxy-mode=nftables", {"mode": ProxyMode.NFTABLES}),
    ("--proxy-mode=", {}),
    ("--masquerade-all", {"iptables.masqueradeAll": True, "nftables.masqueradeAll": True}),
    ("--iptables-masquerade-bit=0xf", {"iptables.masqueradeBit": 15}),
    ("--iptables-sync-period=1m", {"iptables.syncPeriod": seconds(60), "nftables.syncPeriod": seconds(60)}),
    ("--iptables-min-sync-period=0", {"iptables.minSyncPeriod": seconds(0), "nftables.minSyncPeriod": seconds(0)}),
    ("--iptables-localhost-nodeports=false", {"iptables.localhostNodePorts": False}),
    ("--ipvs-sync-period=1m", {"ipvs.syncPeriod": seconds(60)}),
    ("--ipvs-min-sync-period=2s", {"ipvs.minSyncPeriod": seconds(2)}),
    ("--ipvs-scheduler=wrr", {"ipvs.scheduler": "wrr"}),
    ("--ipvs-exclude-cidrs=10.0.0.0/8,fd00::/8", {"ipvs.excludeCIDRs": ("10.0.0.0/8", "fd00::/8")}),
    ("--ipvs-strict-arp", {"ipvs.strictARP": True}),
    ("--ipvs-tcp-timeout=1s", {"ipvs.tcpTimeout": seconds(1)}),
    ("--ipvs-tcpfin-timeout=2s", {"ipvs.tcpFinTimeout": seconds(2)}),
    ("--ipvs-udp-timeout=3s", {"ipvs.udpTimeout": seconds(3)}),
    ("--detect-local-mode=NodeCIDR", {"detectLocalMode": DetectLocalMode.NODE_CIDR}),
    ("--cluster-cidr=10.0.0.0/8,fd00::/48", {"clusterCIDR": "10.0.0.0/8,fd00::/48"}),
    ("--pod-bridge-interface=br0", {"detectLocal.bridgeInterface": "br0"}),
    ("--pod-interface-name-prefix=veth", {"detectLocal.interfaceNamePrefix": "veth"}),
    ("--nodeport-addresses=primary", {"nodePortAddresses": ("primary",)}),
    ("--conntrack-max-per-core=0", {"conntrack.maxPerCore": 0}),
    ("--conntrack-min=1", {"conntrack.min": 1}),
    ("--conntrack-tcp-timeout-established=0s", {"conntrack.tcpEstablishedTimeout": seconds(0)}),
    ("--conntrack-tcp-timeout-close-wait=60s", {"conntrack.tcpCloseWaitTimeout": seconds(60)}),
    ("--conntrack-tcp-be-liberal", {"conntrack.tcpBeLiberal": True}),
    ("--conntrack-udp-timeout=30s", {"conntrack.udpTimeout": seconds(30)}),
    ("--conntrack-udp-timeout-stream=3m", {"conntrack.udpStreamTimeout": seconds(180)}),
    ("--v=4", {"logging.verbosity": 4}),
    ("--logging-format=json", {"logging.format": LogFormat.JSON}),
    ("--vmodule=a=1,b*=2", {"logging.vmodule": VMODULE}),
    ("--log-flush-frequency=1s", {"logging.flushFrequency": seconds(1)}),
    ("--log-text-split-stream", {"logging.options.text.splitStream": True}),
    ("--log-text-info-buffer-size=1Ki", {"logging.options.text.infoBufferSize": "1Ki"}),
    ("--log-json-split-stream", {"logging.options.json.splitStream": True}),
    ("--log-json-info-buffer-size=1Ki", {"logging.options.json.infoBufferSize": "1Ki"}),
    ("--boot-id-file=/x", {}),
    ("--machine-id-file=/x", {}),
]

# flags that decide what is done, and what they do
DIRECTING = [
    ("--once", {"action": Action.ONCE}),
    ("--once=false", {"action": Action.RUN}),
    ("--dry-run", {"action": Action.DRY_RUN}),
    ("--cleanup", {"action": Action.CLEANUP}),
    ("--init-only", {"action": Action.INIT_ONLY}),
    ("--write-config-to=/tmp/c", {"action": Action.WRITE_CONFIG, "write_config_to": Path("/tmp/c")}),
    ("--version", {"action": Action.VERSION}),
    ("--version=raw", {"action": Action.VERSION}),
    ("--version=false", {"action": Action.RUN}),
    ("--help", {"action": Action.HELP}),
    ("--master=http://127.0.0.1:8080", {"action": Action.RUN, "master": "http://127.0.0.1:8080"}),
    ("--manifests=/etc/m", {"action": Action.RUN, "manifests": Path("/etc/m")}),
    ("--output=json", {"output": Output.JSON}),
    ("--color=never", {"color": Color.NEVER}),
    ("--config=", {"config_file": None}),
    (
        "--service-metrics=false",
        {"settings": replaced(KproxyConfiguration(), "serviceMetrics.enabled", False)},
    ),
    (
        "--service-metrics-limit=5",
        {"settings": replaced(KproxyConfiguration(), "serviceMetrics.limit", 5)},
    ),
    (
        "--ipvs-drain-timeout=1m",
        {"settings": replaced(KproxyConfiguration(), "ipvs.drainTimeout", seconds(60))},
    ),
    (
        "--ipvs-stock-local-fallback",
        {"settings": replaced(KproxyConfiguration(), "ipvs.stockLocalFallback", True)},
    ),
]


def test_the_tables_of_flags_are_complete():
    tested = {word.removeprefix("--").partition("=")[0] for word, _ in [*CONFIGURING, *DIRECTING]}

    assert tested == {flag.name for flag in FLAGS}


@pytest.mark.parametrize(("word", "fields"), CONFIGURING, ids=[word for word, _ in CONFIGURING])
def test_a_flag_sets_its_fields_and_nothing_else(word, fields):
    invocation = parse([word])

    assert invocation.configuration == configured(fields)
    assert invocation.action is Action.RUN
    assert invocation.settings == KproxyConfiguration()


@pytest.mark.parametrize(("word", "expected"), DIRECTING, ids=[word for word, _ in DIRECTING])
def test_a_flag_decides_what_is_done(word, expected):
    invocation = parse([word])

    assert {name: getattr(invocation, name) for name in expected} == expected
    assert invocation.configuration == configured({})


def test_without_flags_the_proxy_runs_with_its_defaults():
    invocation = parse([])

    assert invocation.action is Action.RUN
    assert invocation.kubeconfig == ""
    assert invocation.manifests is None
    assert invocation.warnings == ()
    assert invocation.configuration == configured({"ipvs.minSyncPeriod": seconds(1)})


@pytest.mark.parametrize(
    "argv",
    [
        ["--v=4"],
        ["--v", "4"],
        ["-v=4"],
        ["-v", "4"],
        ["-v4"],
        ["-v", "1", "-v", "4"],
    ],
)
def test_a_value_can_be_written_in_every_way_that_go_programs_take(argv):
    assert parse(argv).configuration.logging.verbosity == 4


@pytest.mark.parametrize(
    ("text", "value"), [("=true", True), ("=T", True), ("=1", True), ("", True), ("=FALSE", False), ("=0", False)]
)
def test_a_boolean_takes_its_value_only_after_an_equals_sign(text, value):
    assert parse([f"--masquerade-all{text}"]).configuration.iptables.masquerade_all is value
    assert problems_of("--masquerade-all", "true") == ['unexpected argument "true"']


def test_underscores_stand_for_hyphens():
    assert parse(["--proxy_mode", "ipvs"]).configuration.mode is ProxyMode.IPVS


def test_repeated_lists_and_maps_are_joined():
    argv = ["--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses", "11.0.0.0/8,fd00::/8"]
    argv += ["--feature-gates=AllAlpha=true", "--feature-gates= AllBeta = false ,AllAlpha=false"]

    config = parse(argv).configuration

    assert config.node_port_addresses == ("10.0.0.0/8", "11.0.0.0/8", "fd00::/8")
    assert config.feature_gates == {"AllAlpha": False, "AllBeta": False}


def test_a_deprecated_port_is_used_where_the_address_has_none():
    invocation = parse(["--healthz-bind-address=192.0.2.1", "--healthz-port=99", "--metrics-port=98"])

    assert invocation.configuration.healthz_bind_address == "192.0.2.1:99"
    assert invocation.configuration.metrics_bind_address == "127.0.0.1:10249"
    assert invocation.warnings == (
        "--healthz-port is deprecated; use --healthz-bind-address",
        "--metrics-port is deprecated; use --metrics-bind-address, and --metrics-bind-address has a port already",
    )


def test_flags_without_effect_are_named_with_the_reason():
    assert parse(
        ["--kube-api-content-type=json", "--boot-id-file=/x", "--feature-gates=NativeHistograms=true"]
    ).warnings == (
        "--kube-api-content-type has no effect in kproxy: kproxy reads the API as JSON",
        "--boot-id-file has no effect in kproxy: kproxy does not report machine identifiers",
        "feature gate NativeHistograms has no effect in kproxy",
    )


def test_explain_takes_operands_and_flags_in_any_order():
    invocation = parse(["explain", "--cluster-cidr=10.0.0.0/8", "10.0.0.1", "-o", "json", "10.96.0.1:443"])

    assert invocation.action is Action.EXPLAIN
    assert invocation.operands == ("10.0.0.1", "10.96.0.1:443")
    assert invocation.output is Output.JSON


def test_a_dry_run_happens_once():
    assert parse(["--dry-run", "--once"]).action is Action.DRY_RUN


def test_every_problem_of_a_command_line_is_named():
    assert problems_of(
        "--proxy-mode=userspace",
        "--proxy-mod=ipvs",
        "-x",
        "-proxy-mode=ipvs",
        "--oom-score-adj=low",
        "--conntrack-min=3000000000",
        "--kube-api-qps=fast",
        "--profiling=maybe",
        "--iptables-masquerade-bit=32",
        "--iptables-min-sync-period=60s",
        "--conntrack-udp-timeout=1d",
        "--feature-gates=NFTablesProxyMode=false",
        "--cluster-cidr=10.0.0.0/8,11.0.0.0/8",
        "--hostname-override= ",
        "--bind-address=here",
        "--service-metrics-limit=-1",
        "--cleanup",
        "--once",
        "extra",
        "--config-sync-period",
    ) == [
        "unknown flag: --proxy-mod (did you mean --proxy-mode?)",
        "unknown flag: -x",
        "unknown flag: -proxy-mode=ipvs (did you mean --proxy-mode?)",
        "--config-sync-period: needs a value (duration)",
        '--proxy-mode: "userspace" is not one of iptables, ipvs, nftables',
        '--oom-score-adj: "low" is not a whole number',
        "--conntrack-min: 3000000000 is not in the range -2147483648 to 2147483647",
        '--kube-api-qps: "fast" is not a number',
        '--profiling: "maybe" is not true or false',
        '--conntrack-udp-timeout: "1d" is not a duration such as 30s, 1h2m or 100ms',
        "--hostname-override: is blank",
        'unexpected argument "extra"',
        "--cleanup and --once cannot be combined",
        "--feature-gates: cannot set feature gate NFTablesProxyMode to false, feature is locked to true",
        '--bind-address: "here" is not an IP address',
        "--iptables-masquerade-bit: 32 is not in the range 0 to 31",
        "--iptables-min-sync-period: 1m0s is greater than syncPeriod, 30s",
        '--cluster-cidr: "10.0.0.0/8,11.0.0.0/8" has two IPv4 CIDRs; a pair must be of both families',
        "--service-metrics-limit: -1 is less than 0",
    ]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--feature-gates=A"], '--feature-gates: "A" has no value; expected NAME=VALUE[,NAME=VALUE]...'),
        (["--feature-gates=A=perhaps"], '--feature-gates: feature gate A: "perhaps" is not true or false'),
        (["--vmodule=a=x"], '--vmodule: "x" is not a whole number'),
        (["--v=-1"], "--v: -1 is not in the range 0 to 2147483647"),
        (["--iptables-sync-period=0"], "--iptables-sync-period: 0s is not greater than 0"),
        (
            ["--detect-local-mode=BridgeInterface"],
            "--pod-bridge-interface: is required when detectLocalMode is BridgeInterface",
        ),
        (["--", "--v=1"], 'unexpected argument "--v=1"'),
        (["-"], 'unexpected argument "-"'),
        (["--version=v1.2.3"], '--version: "v1.2.3" is not true or false'),
    ],
)
def test_a_single_problem_is_the_only_one_named(argv, problem):
    assert problems_of(*argv) == [problem]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.conf"
    path.write_text(
        """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: from-file
logging: {verbosity: 2, vmodule: [{filePattern: c, verbosity: 3}]}
---
apiVersion: kproxy.dev/v1alpha1
kind: KproxyConfiguration
serviceMetrics: {enabled: true, limit: 7}
"""
    )
    return path


def test_with_a_file_the_other_flags_are_ignored_and_named(config_file):
    invocation = parse(
        [f"--config={config_file}", "--proxy-mode=ipvs", "--kubeconfig=/k", "--boot-id-file=/x", "--healthz-port=0"]
    )

    assert invocation.configuration.mode is ProxyMode.NFTABLES
    assert invocation.kubeconfig == ""
    assert invocation.configuration.healthz_bind_address == "0.0.0.0:10256"
    assert invocation.config_file == config_file
    assert invocation.warnings == (
        f"{config_file}: logging.vmodule has no effect in kproxy: it names kube-proxy's source files",
        "ignored because --config is given: --proxy-mode, --kubeconfig, --boot-id-file, --healthz-port",
    )


def test_with_a_file_some_flags_win(config_file, tmp_path):
    written = tmp_path / "written"

    argv = ["--config", str(config_file), "--hostname-override=Node-A", "-v=4", "--vmodule=a=1,b*=2"]
    argv += ["--master=http://m", f"--write-config-to={written}", "--service-metrics=false", "--manifests=/m"]

    invocation = parse(argv)

    assert invocation.configuration.hostname_override == "node-a"
    assert invocation.configuration.logging.verbosity == 4
    assert invocation.configuration.logging.vmodule == (*VMODULE, VModuleItem(file_pattern="c", verbosity=3))
    assert (invocation.action, invocation.write_config_to) == (Action.WRITE_CONFIG, written)
    assert invocation.master == "http://m"
    assert invocation.manifests == Path("/m")
    assert (invocation.settings.service_metrics.enabled, invocation.settings.service_metrics.limit) == (False, 7)
    assert not written.exists()


def test_an_empty_host_name_flag_leaves_the_files(config_file):
    invocation = parse([f"--config={config_file}", "--hostname-override="])

    assert invocation.configuration.hostname_override == "from-file"


def test_problems_of_the_file_and_of_the_flags_are_named_together(tmp_path, config_file):
    missing = tmp_path / "missing"

    assert problems_of(f"--config={missing}", "--foo") == [
        "unknown flag: --foo",
        f"{missing}: cannot be read: No such file or directory",
    ]
    assert problems_of(f"--config={config_file}", "--logging-format=json") == [
        "--vmodule: only supported for the text log format"
    ]


def test_help_shows_every_flag_with_its_default():
    text = help_text()
    lines = text.splitlines()

    for flag in FLAGS:
        assert any(
            line.lstrip().startswith((f"--{flag.name}", f"-{flag.shorthand}, --{flag.name}")) for line in lines
        ), flag
    assert "(default 0.0.0.0:10256)" in text
    assert "(default 24h0m0s)" in text
    assert max(map(len, lines)) <= 120


def test_help_and_version_are_answered_whatever_else_is_wrong():
    assert parse(["--foo", "-h"]).action is Action.HELP
    assert parse(["--version", "bar"]).action is Action.VERSION


def test_the_version_has_a_line_for_tools_that_ask_kube_proxy():
    assert version_text("0.1.0") == "kproxy 0.1.0\nKubernetes v1.36.2"
