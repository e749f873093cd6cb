"""Every flag: kube-proxy's under their names (Kubernetes 1.36; reference: section 8.1), and kproxy's own."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, TypeVar

from kproxy.cli.pflag import (
    BOOL,
    DURATION,
    FLUSH_FREQUENCY,
    GATES,
    INT,
    LEVEL,
    LIST,
    NUMBER,
    TEXT,
    VMODULE,
    Flag,
    Kind,
    boolean,
)
from kproxy.config.defaults import defaulted
from kproxy.config.duration import Duration
from kproxy.config.v1alpha1 import IPVS, Configuration, LogFormat, ProxyMode
from kproxy.model import DetectLocalMode


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


class Color(StrEnum):
    """When printed results are coloured."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


EnumT = TypeVar("EnumT", bound=StrEnum)


def _one_of(choices: type[EnumT], empty: EnumT | None) -> Kind:
    def parse(text: str) -> EnumT | None:
        if not text:
            return empty
        try:
            return choices(text)
        except ValueError as error:
            raise ValueError(f'"{text}" is not one of {", ".join(choices)}') from error

    return Kind("|".join(choices), parse)


def _version(text: str) -> bool:
    return True if text == "raw" else boolean(text)


class Group(NamedTuple):
    """Flags under one heading of the help."""

    heading: str
    flags: tuple[Flag, ...]


_PERIOD_HELP = "longest delay before a failed sync is tried again; twice this without a sync is unhealthy"
_NOT_REPORTED = "kproxy does not report machine identifiers"

GROUPS = (
    Group(
        "kproxy's own flags",
        (
            Flag(
                "manifests",
                TEXT,
                "file or directory of Services, EndpointSlices and Nodes that takes the place of the API server",
                own_field="manifests",
                with_config=True,
            ),
            Flag(
                "once",
                BOOL,
                "program the kernel once and exit",
                with_config=True,
            ),
            Flag(
                "dry-run",
                BOOL,
                "print what would change in the kernel and exit (0: nothing, 1: something, 2: error)",
                with_config=True,
            ),
            Flag("output", _one_of(Output, Output.TEXT), "form of what is printed", shorthand="o", with_config=True),
            Flag("color", _one_of(Color, Color.AUTO), "colours in what is printed", with_config=True),
            Flag(
                "service-metrics",
                BOOL,
                "count new connections for each service port and endpoint",
                own_field="serviceMetrics.enabled",
                with_config=True,
            ),
            Flag(
                "service-metrics-limit",
                INT,
                "time series of each such metric; what is beyond is counted in one",
                own_field="serviceMetrics.limit",
                with_config=True,
            ),
        ),
    ),
    Group(
        "What to do, and the configuration file",
        (
            Flag("config", TEXT, "configuration file; it replaces every flag not marked [+]", with_config=True),
            Flag("write-config-to", TEXT, "write the configuration in effect to this file and exit", with_config=True),
            Flag("cleanup", BOOL, "remove the rules of all modes and exit", with_config=True),
            Flag("init-only", BOOL, "do what needs full privileges (kernel settings) and exit", with_config=True),
            Flag("version", Kind("bool", _version, "true"), "print the version and exit", with_config=True),
            Flag("help", BOOL, "print this and exit", shorthand="h", with_config=True),
            Flag("feature-gates", GATES, "switch features on or off", ("featureGates",)),
        ),
    ),
    Group(
        "API server and node",
        (
            Flag("kubeconfig", TEXT, "kubeconfig file; without it, in-cluster", ("clientConnection.kubeconfig",)),
            Flag("master", TEXT, "URL of the API server; overrides the kubeconfig's", with_config=True),
            Flag("kube-api-qps", NUMBER, "requests a second to the API server", ("clientConnection.qps",)),
            Flag("kube-api-burst", INT, "requests at once to the API server", ("clientConnection.burst",)),
            Flag("kube-api-content-type", TEXT, "content type of requests", ("clientConnection.contentType",)),
            Flag("config-sync-period", DURATION, "how often all is listed again and compared", ("configSyncPeriod",)),
            Flag(
                "hostname-override",
                TEXT,
                "name of this Node; without it, the host name",
                ("hostnameOverride",),
                with_config=True,
            ),
            Flag("bind-address", TEXT, "primary IP of this node; nothing listens on it", ("bindAddress",)),
            Flag("oom-score-adj", INT, "oom_score_adj of this process, -1000 to 1000", ("oomScoreAdj",)),
        ),
    ),
    Group(
        "Health and metrics servers",
        (
            Flag("healthz-bind-address", TEXT, "IP[:port] of /healthz and /livez; empty: off", ("healthzBindAddress",)),
            Flag("metrics-bind-address", TEXT, "IP[:port] of /metrics; empty: off", ("metricsBindAddress",)),
            Flag("bind-address-hard-fail", BOOL, "exit if one of them cannot listen", ("bindAddressHardFail",)),
            Flag("healthz-port", INT, "deprecated: port if --healthz-bind-address has none (10256); 0: off"),
            Flag("metrics-port", INT, "deprecated: port if --metrics-bind-address has none (10249); 0: off"),
            Flag("profiling", BOOL, "serve /debug/pprof on the metrics server", ("enableProfiling",)),
            Flag(
                "show-hidden-metrics-for-version",
                TEXT,
                "show metrics that were hidden since this version",
                ("showHiddenMetricsForVersion",),
            ),
        ),
    ),
    Group(
        "Mode and masquerading",
        (
            Flag(
                "proxy-mode", _one_of(ProxyMode, None), "empty: nftables where the kernel can, else iptables", ("mode",)
            ),
            Flag(
                "masquerade-all",
                BOOL,
                "masquerade all traffic to ClusterIPs",
                ("iptables.masqueradeAll", "nftables.masqueradeAll"),
            ),
            Flag(
                "iptables-masquerade-bit",
                INT,
                "bit of the mark that asks for masquerading, 0 to 31 (iptables, ipvs)",
                ("iptables.masqueradeBit",),
            ),
            Flag(
                "iptables-sync-period",
                DURATION,
                f"{_PERIOD_HELP} (iptables, nftables)",
                ("iptables.syncPeriod", "nftables.syncPeriod"),
            ),
            Flag(
                "iptables-min-sync-period",
                DURATION,
                "least time between two syncs (iptables, nftables)",
                ("iptables.minSyncPeriod", "nftables.minSyncPeriod"),
            ),
            Flag(
                "iptables-localhost-nodeports",
                BOOL,
                "node ports on 127.0.0.1 too (iptables, IPv4)",
                ("iptables.localhostNodePorts",),
            ),
            Flag("ipvs-sync-period", DURATION, f"{_PERIOD_HELP} (ipvs)", ("ipvs.syncPeriod",)),
            Flag("ipvs-min-sync-period", DURATION, "least time between two syncs (ipvs)", ("ipvs.minSyncPeriod",)),
            Flag("ipvs-scheduler", TEXT, "scheduler of virtual servers; empty: rr", ("ipvs.scheduler",)),
            Flag("ipvs-exclude-cidrs", LIST, "CIDRs of virtual servers to leave alone", ("ipvs.excludeCIDRs",)),
            Flag("ipvs-strict-arp", BOOL, "set arp_ignore to 1 and arp_announce to 2", ("ipvs.strictARP",)),
            Flag("ipvs-tcp-timeout", DURATION, "timeout of idle TCP connections; 0: as it is", ("ipvs.tcpTimeout",)),
            Flag(
                "ipvs-tcpfin-timeout",
                DURATION,
                "timeout of TCP connections after a FIN; 0: as it is",
                ("ipvs.tcpFinTimeout",),
            ),
            Flag("ipvs-udp-timeout", DURATION, "timeout of UDP; 0: as it is", ("ipvs.udpTimeout",)),
            Flag(
                "ipvs-drain-timeout",
                DURATION,
                "how long an endpoint that left may keep its TCP connections",
                own_field="ipvs.drainTimeout",
                with_config=True,
            ),
            Flag(
                "ipvs-stock-local-fallback",
                BOOL,
                "as kube-proxy: policy Local without a local endpoint sends traffic to other nodes",
                own_field="ipvs.stockLocalFallback",
                with_config=True,
            ),
        ),
    ),
    Group(
        "Pods and node ports",
        (
            Flag(
                "detect-local-mode",
                _one_of(DetectLocalMode, DetectLocalMode.CLUSTER_CIDR),
                "how traffic of local pods is recognised",
                ("detectLocalMode",),
            ),
            Flag("cluster-cidr", TEXT, "CIDR of the pods, or a pair of both families", ("clusterCIDR",)),
            Flag("pod-bridge-interface", TEXT, "for BridgeInterface", ("detectLocal.bridgeInterface",)),
            Flag("pod-interface-name-prefix", TEXT, "for InterfaceNamePrefix", ("detectLocal.interfaceNamePrefix",)),
            Flag(
                "nodeport-addresses",
                LIST,
                'CIDRs of addresses with node ports, or "primary"; empty: primary (nftables), all (iptables, ipvs)',
                ("nodePortAddresses",),
            ),
        ),
    ),
    Group(
        "Connection tracking",
        (
            Flag("conntrack-max-per-core", INT, "tracked connections a CPU; 0: as it is", ("conntrack.maxPerCore",)),
            Flag("conntrack-min", INT, "tracked connections at least", ("conntrack.min",)),
            Flag(
                "conntrack-tcp-timeout-established",
                DURATION,
                "timeout of idle established TCP connections; 0: as it is",
                ("conntrack.tcpEstablishedTimeout",),
            ),
            Flag(
                "conntrack-tcp-timeout-close-wait",
                DURATION,
                "timeout of TCP connections in CLOSE_WAIT; 0: as it is",
                ("conntrack.tcpCloseWaitTimeout",),
            ),
            Flag(
                "conntrack-tcp-be-liberal",
                BOOL,
                "do not mark out-of-window packets invalid",
                ("conntrack.tcpBeLiberal",),
            ),
            Flag("conntrack-udp-timeout", DURATION, "timeout of unreplied UDP; 0: as it is", ("conntrack.udpTimeout",)),
            Flag(
                "conntrack-udp-timeout-stream",
                DURATION,
                "timeout of replied UDP; 0: as it is",
                ("conntrack.udpStreamTimeout",),
            ),
        ),
    ),
    Group(
        "Logging",
        (
            Flag("v", LEVEL, "verbosity, 0 to 10", ("logging.verbosity",), shorthand="v", with_config=True),
            Flag(
                "logging-format",
                _one_of(LogFormat, None),
                "empty: text on a terminal, else json",
                ("logging.format",),
                with_config=True,
            ),
            Flag("vmodule", VMODULE, "verbosity by source file", ("logging.vmodule",), with_config=True),
            Flag(
                "log-flush-frequency",
                FLUSH_FREQUENCY,
                "between log flushes",
                ("logging.flushFrequency",),
                with_config=True,
            ),
            *(
                Flag(
                    f"log-{form}-{name}",
                    kind,
                    f"{text} ({form})",
                    (f"logging.options.{form}.{field}",),
                    with_config=True,
                )
                for form in ("text", "json")
                for name, kind, text, field in (
                    ("split-stream", BOOL, "errors to stderr, the rest to stdout", "splitStream"),
                    ("info-buffer-size", TEXT, "buffer of the second stream", "infoBufferSize"),
                )
            ),
            Flag("boot-id-file", TEXT, "files to look for the boot id", no_effect=_NOT_REPORTED),
            Flag("machine-id-file", TEXT, "files to look for the machine id", no_effect=_NOT_REPORTED),
        ),
    ),
)

FLAGS = tuple(flag for group in GROUPS for flag in group.flags)


def defaults_by_flags(bind_address: str = "0.0.0.0") -> Configuration:
    """The configuration without a file. In ipvs mode the least time between syncs is then 1s; in a file 0s."""
    return defaulted(Configuration(bind_address=bind_address, ipvs=IPVS(min_sync_period=Duration.parse("1s"))))
