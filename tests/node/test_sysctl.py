"""Kernel settings: what is asked for, what is written, and what an administrator reads if it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from kproxy.sysctl import (
    ConntrackLimits,
    Setting,
    SysctlError,
    apply,
    conntrack_max,
    conntrack_settings,
    host_cpus,
    set_oom_score_adjustment,
)
from tests.conformance import recorded
from tests.lab.namespaces import Namespace

NETFILTER = "proc/sys/net/netfilter/nf_conntrack_"
HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
NOTHING = ConntrackLimits(max_per_core=0, min=0, tcp_established_timeout=0, tcp_close_wait_timeout=0)


def put(root: Path, path: str, text: str | int) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")
    return file


def test_the_size_of_the_table_is_as_recorded():
    for case in recorded.read("conntrack.json")["conntrack_max"]["cases"]:
        assert conntrack_max(case["max_per_core"], case["min"], case["cpus"]) == case["expected"], case


@pytest.mark.parametrize(
    ("per_core", "minimum", "cpus", "entries"),
    [
        (32768, 131072, 64, 1048576),
        (32768, 131072, 2, 131072),
        (32768, 2000000, 64, 1048576),
        (32768, 2000000, 2, 2000000),
        (0, 131072, 2, 0),
    ],
    ids=["capped", "minimum", "cap before minimum", "minimum above the cap", "left alone"],
)
def test_the_size_of_the_table(per_core: int, minimum: int, cpus: int, entries: int):
    assert conntrack_max(per_core, minimum, cpus) == entries


def test_settings_are_as_recorded():
    """The recording names the setter that is called; a failing setter is `test_a_setting_that_fails_…`."""
    setter = {
        "SetMax": "max",
        "SetTCPEstablishedTimeout": "tcp_timeout_established",
        "SetTCPCloseWaitTimeout": "tcp_timeout_close_wait",
        "SetTCPBeLiberal": "tcp_be_liberal",
        "SetUDPTimeout": "udp_timeout",
        "SetUDPStreamTimeout": "udp_timeout_stream",
    }
    for case in recorded.read("conntrack.json")["sysctls"]["cases"]:
        config = case["config"]
        limits = ConntrackLimits(
            max_per_core=config.get("maxPerCore", 0),
            min=config.get("min", 0),
            tcp_be_liberal=config.get("tcpBeLiberal", False),
            **{
                field: int(config.get(key, "0s").removesuffix("s"))
                for field, key in (
                    ("tcp_established_timeout", "tcpEstablishedTimeout"),
                    ("tcp_close_wait_timeout", "tcpCloseWaitTimeout"),
                    ("udp_timeout", "udpTimeout"),
                    ("udp_stream_timeout", "udpStreamTimeout"),
                )
            },
        )
        asked = [s for s in conntrack_settings(limits, cpus=4) if s.path != HASH_SIZE]
        calls = [call.rstrip(")").partition("(") for call in case["expected_calls"]]
        assert [s.path for s in asked] == [NETFILTER + setter[name] for name, _, _ in calls], case["name"]
        assert all(not value or s.value == int(value) for s, (_, _, value) in zip(asked, calls, strict=True))


def test_the_defaults_ask_for_a_table_its_buckets_and_two_timeouts():
    assert [(s.path, s.value) for s in conntrack_settings(ConntrackLimits(), cpus=8)] == [
        (NETFILTER + "max", 262144),
        (HASH_SIZE, 65536),
        (NETFILTER + "tcp_timeout_established", 86400),
        (NETFILTER + "tcp_timeout_close_wait", 3600),
    ]


def test_only_what_differs_is_written(tmp_path: Path):
    same = put(tmp_path, NETFILTER + "max", 262144)
    buckets = put(tmp_path, HASH_SIZE, 100000)
    timeout = put(tmp_path, NETFILTER + "tcp_timeout_established", 432000)
    put(tmp_path, NETFILTER + "tcp_timeout_close_wait", 3600)
    untouched = same.stat().st_mtime_ns

    written = apply(conntrack_settings(ConntrackLimits(), cpus=8), tmp_path)

    assert [s.path for s in written] == [NETFILTER + "tcp_timeout_established"]
    assert timeout.read_text() == "86400\n"
    assert same.stat().st_mtime_ns == untouched
    assert buckets.read_text() == "100000\n", "more buckets than needed are no reason to shrink"


def test_too_few_buckets_become_a_quarter_of_the_entries(tmp_path: Path):
    put(tmp_path, NETFILTER + "max", 65536)
    buckets = put(tmp_path, HASH_SIZE, 16384)
    apply(conntrack_settings(ConntrackLimits(max_per_core=32768, min=0), cpus=8)[:2], tmp_path)
    assert buckets.read_text() == "65536\n"


def test_a_file_that_is_missing_is_named_with_the_way_out(tmp_path: Path):
    settings = conntrack_settings(ConntrackLimits(), cpus=8)
    with pytest.raises(SysctlError) as e:
        apply(settings, tmp_path)
    assert str(e.value) == (
        f"cannot set {tmp_path}/{NETFILTER}max to 262144: No such file or directory; "
        "load the kernel module that provides it, or configure conntrack.maxPerCore: 0 to leave it alone"
    )


def test_where_one_setting_fails_none_is_changed(tmp_path: Path):
    first = put(tmp_path, NETFILTER + "udp_timeout", 30)
    second = put(tmp_path, NETFILTER + "udp_timeout_stream", 120)
    settings = [Setting(NETFILTER + name, 7) for name in ("udp_timeout", "udp_timeout_stream", "missing")]

    with pytest.raises(SysctlError, match="missing"):
        apply(settings, tmp_path)

    assert (first.read_text(), second.read_text()) == ("30\n", "120\n")


def test_a_file_that_holds_no_number_is_an_error(tmp_path: Path):
    put(tmp_path, NETFILTER + "max", "many")
    with pytest.raises(SysctlError, match=r"nf_conntrack_max to 5: invalid literal .*'many"):
        apply([Setting(NETFILTER + "max", 5)], tmp_path)


def test_the_kernel_takes_the_settings_of_a_network_namespace(netns: Namespace):
    limits = ConntrackLimits(
        max_per_core=0,
        tcp_established_timeout=1234,
        tcp_close_wait_timeout=0.5,
        tcp_be_liberal=True,
        udp_timeout=31,
        udp_stream_timeout=121,
    )
    settings = conntrack_settings(limits, cpus=2)
    assert netns.run(apply, settings) == settings
    assert netns.run(apply, settings) == [], "nothing differs the second time"
    assert [int(netns.run(Path("/", s.path).read_text)) for s in settings] == [1234, 1, 1, 31, 121]


def test_the_kernels_refusal_tells_a_container_what_to_configure(netns: Namespace):
    """The size of the table can be set only in the initial network namespace: this is what a kind node meets."""
    file = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    current = int(netns.run(file.read_text))
    if netns.run(file.stat).st_mode & 0o200:
        pytest.skip("this kernel has a table size for each network namespace")
    settings = conntrack_settings(ConntrackLimits(max_per_core=current + 1, min=0), cpus=1)
    with pytest.raises(SysctlError, match=r"nf_conntrack_max .*Permission denied.*conntrack\.maxPerCore: 0"):
        netns.run(apply, settings)
    assert int(netns.run(file.read_text)) == current


def test_nothing_configured_nothing_asked():
    assert conntrack_settings(NOTHING, cpus=64) == []


def test_cpus_are_those_of_the_machine(tmp_path: Path):
    put(tmp_path, "sys/devices/system/cpu/online", "0-3,8,10-11")
    assert host_cpus(tmp_path) == 7


def test_without_sysfs_cpus_are_those_python_sees(tmp_path: Path):
    assert host_cpus(tmp_path) >= 1


def test_the_oom_score_is_written(tmp_path: Path):
    file = put(tmp_path, "proc/self/oom_score_adj", 0)
    set_oom_score_adjustment(-999, tmp_path)
    assert file.read_text() == "-999\n"


def test_an_oom_score_that_cannot_be_written_is_only_worth_a_warning(tmp_path: Path):
    with structlog.testing.capture_logs() as logged:
        set_oom_score_adjustment(-999, tmp_path)
    (warning,) = logged
    assert warning["log_level"] == "warning"
    assert warning["wanted"] == -999
    assert "CAP_SYS_RESOURCE" in warning["event"]
