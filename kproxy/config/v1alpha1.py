"""The configuration, typed: `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1) and kproxy's own settings.

Attributes are the API's fields in Python's spelling. A field's default is what kube-proxy 1.36 takes when the field is
absent (reference: section 8.2). Structs hold what was asked for, in range or not: `kproxy.config.validation` judges.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Annotated, Any, TypeVar

import msgspec

from kproxy.config.duration import Duration, FlushFrequency
from kproxy.config.feature_gates import feature_enabled
from kproxy.model import DetectLocalMode

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
KPROXY_API_VERSION = "kproxy.dev/v1alpha1"
KPROXY_KIND = "KproxyConfiguration"

Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
UInt32 = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]

_SECOND = 10**9
_MINUTE = 60 * _SECOND
_HOUR = 60 * _MINUTE


class ProxyMode(StrEnum):
    """How the node's kernel is programmed."""

    IPTABLES = "iptables"
    IPVS = "ipvs"
    NFTABLES = "nftables"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class Section(msgspec.Struct, rename="camel", frozen=True, kw_only=True):
    """A part of the configuration; `encode_name` of its fields is the API's spelling."""


class ClientConnection(Section, frozen=True):
    """`clientConnection`: how the API server is reached."""

    kubeconfig: str = ""  # "": in-cluster configuration
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: Int32 = 10


class VModuleItem(Section, frozen=True):
    """An entry of `logging.vmodule`."""

    file_pattern: str = ""
    verbosity: UInt32 = 0


class OutputRouting(Section, frozen=True):
    """`logging.options.text` and `logging.options.json`."""

    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LoggingOptions(Section, frozen=True):
    """`logging.options`."""

    text: OutputRouting = OutputRouting()
    json: OutputRouting = OutputRouting()


class Logging(Section, frozen=True):
    """`logging`."""

    format: LogFormat | None = None  # None: text on a terminal, else JSON
    flush_frequency: FlushFrequency = FlushFrequency(5 * _SECOND)
    verbosity: UInt32 = 0
    vmodule: tuple[VModuleItem, ...] = ()
    options: LoggingOptions = LoggingOptions()


class IPTables(Section, frozen=True):
    """`iptables`; the masquerade fields hold in ipvs mode too."""

    masquerade_bit: Int32 = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True  # IPv4 only
    sync_period: Duration = Duration(30 * _SECOND)
    min_sync_period: Duration = Duration(1 * _SECOND)


class IPVS(Section, frozen=True):
    """`ipvs`."""

    sync_period: Duration = Duration(30 * _SECOND)
    min_sync_period: Duration = Duration(0)
    scheduler: str = ""  # "": rr
    exclude_cidrs: tuple[str, ...] = msgspec.field(default=(), name="excludeCIDRs")
    strict_arp: bool = msgspec.field(default=False, name="strictARP")
    tcp_timeout: Duration = Duration(0)  # 0 in these three: the kernel's value stays
    tcp_fin_timeout: Duration = Duration(0)
    udp_timeout: Duration = Duration(0)


class NFTables(Section, frozen=True):
    """`nftables`."""

    masquerade_bit: Int32 = 14
    masquerade_all: bool = False
    sync_period: Duration = Duration(30 * _SECOND)
    min_sync_period: Duration = Duration(0)  # kube-proxy: 1s; here a sync costs only what changed


class Winkernel(Section, frozen=True):
    """`winkernel`: Windows only, kept so that a file is read and written whole."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Section, frozen=True):
    """`detectLocal`: what two of the detect modes need."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Section, frozen=True):
    """`conntrack`; a value of 0 leaves the kernel's setting as it is."""

    max_per_core: Int32 = 32 * 1024
    min: Int32 = 128 * 1024
    tcp_established_timeout: Duration = Duration(24 * _HOUR)
    tcp_close_wait_timeout: Duration = Duration(1 * _HOUR)
    tcp_be_liberal: bool = False
    udp_timeout: Duration = Duration(0)
    udp_stream_timeout: Duration = Duration(0)


class Configuration(Section, frozen=True):
    """`KubeProxyConfiguration`. Complete only after `kproxy.config.defaults.defaulted`, which fills the addresses."""

    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""  # "": the machine's host name
    bind_address: str = "0.0.0.0"  # not listened on: overrides the node's primary IP unless it is unspecified
    healthz_bind_address: str = ""  # IP:port; after defaulting "" means: no server
    metrics_bind_address: str = ""  # likewise
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: ProxyMode | None = None  # None: nftables where the kernel can, else iptables
    iptables: IPTables = IPTables()
    ipvs: IPVS = IPVS()
    nftables: NFTables = NFTables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: tuple[str, ...] = ()  # empty: the mode's default
    oom_score_adj: Int32 = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period: Duration = Duration(15 * _MINUTE)
    port_range: str = ""
    windows_run_as_service: bool = False

    def enabled(self, gate: str) -> bool:
        """Whether a known feature gate is on."""
        return feature_enabled(self.feature_gates, gate)

    @property
    def allow_external_ips(self) -> bool:
        """Whether `spec.externalIPs` of Services are followed (feature gate AllowServiceExternalIPs)."""
        return self.enabled("AllowServiceExternalIPs")


class ServiceMetrics(Section, frozen=True):
    """`serviceMetrics`: connection counters for each service port and endpoint."""

    enabled: bool = True
    limit: Int32 = 1000


class OwnIPVS(Section, frozen=True):
    """`ipvs` of kproxy's own settings."""

    drain_timeout: Duration = Duration(15 * _MINUTE)  # for the connections of an endpoint that left; 0: none
    stock_local_fallback: bool = False  # policy Local sends traffic elsewhere if no endpoint is on this node


class KproxyConfiguration(Section, frozen=True):
    """`KproxyConfiguration` (kproxy.dev/v1alpha1): what kube-proxy has no setting for."""

    service_metrics: ServiceMetrics = ServiceMetrics()
    ipvs: OwnIPVS = OwnIPVS()
    manifests: str = ""  # file or directory that takes the place of the API server; "": none


# Fields in which the API tells "absent" (null) from zero. In every other field Go's zero value means "not set".
POINTER_FIELDS = frozenset(
    {
        "iptables.masqueradeBit",
        "iptables.localhostNodePorts",
        "nftables.masqueradeBit",
        "oomScoreAdj",
        "conntrack.maxPerCore",
        "conntrack.min",
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout",
        "serviceMetrics.enabled",
        "serviceMetrics.limit",
        "ipvs.drainTimeout",
    }
)

_OMITTED_IF_EMPTY = frozenset({"featureGates", "vmodule", "splitStream", "windowsRunAsService"})

SectionT = TypeVar("SectionT", bound=Section)


def replaced(section: SectionT, path: str, value: object) -> SectionT:
    """A copy with the field at `path` (the API's spelling, such as `iptables.syncPeriod`) set to `value`."""
    name, _, rest = path.partition(".")
    attribute = next(f.name for f in msgspec.structs.fields(section) if f.encode_name == name)
    if rest:
        value = replaced(getattr(section, attribute), rest, value)
    return msgspec.structs.replace(section, **{attribute: value})


def value_at(section: Section, path: str) -> Any:
    """The value of the field at `path`."""
    name, _, rest = path.partition(".")
    attribute = next(f.name for f in msgspec.structs.fields(section) if f.encode_name == name)
    value = getattr(section, attribute)
    return value_at(value, rest) if rest else value


def paths(section: Section, prefix: str = "") -> list[str]:
    """The paths of all fields that are not sections, in the API's order."""
    found = []
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        path = prefix + field.encode_name
        found.extend(paths(value, f"{path}.") if isinstance(value, Section) else [path])
    return found


def to_v1alpha1(config: Configuration) -> dict[str, Any]:
    """The `KubeProxyConfiguration` object, for /configz and files."""
    return {"apiVersion": API_VERSION, "kind": KIND, **_plain(config)}


def to_kproxy_v1alpha1(settings: KproxyConfiguration) -> dict[str, Any]:
    """The `KproxyConfiguration` object."""
    return {"apiVersion": KPROXY_API_VERSION, "kind": KPROXY_KIND, **_plain(settings)}


def _plain(section: Section) -> dict[str, Any]:
    pairs = ((field.encode_name, getattr(section, field.name)) for field in msgspec.structs.fields(section))
    return {name: _plain_value(value) for name, value in pairs if value or name not in _OMITTED_IF_EMPTY}


def _plain_value(value: object) -> Any:
    """The value as JSON has it: lists without members are null, whole numbers have no fraction, as in Go."""
    match value:
        case Section():
            return _plain(value)
        case Duration():
            return str(value)
        case Enum():
            return value.value
        case None:
            return ""  # mode and log format: an empty string in the API
        case tuple():
            return [_plain_value(member) for member in value] or None
        case float():
            return int(value) if value.is_integer() else value
        case _:
            return value
