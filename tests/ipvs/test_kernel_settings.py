"""Kernel settings of ipvs mode, by the kernel's version."""

from __future__ import annotations

import pytest

from kproxy import sysctl
from kproxy.dataplane.ipvs.settings import kernel_version, settings, settings_here
from tests.lab.namespaces import Namespace

ALWAYS = {
    "proc/sys/net/ipv4/vs/conntrack": 1,
    "proc/sys/net/ipv4/vs/expire_nodest_conn": 1,
    "proc/sys/net/ipv4/vs/expire_quiescent_template": 1,
    "proc/sys/net/ipv4/ip_forward": 1,
}
REUSE = {"proc/sys/net/ipv4/vs/conn_reuse_mode": 0}


@pytest.mark.parametrize(
    ("release", "extra"),
    [("3.10.0-1160.el7", {}), ("4.1.0", REUSE), ("5.8.18", REUSE), ("5.9.0-rc1", {}), ("6.1.0-18-amd64", {})],
)
def test_reuse_of_ports_is_set_where_it_would_delay(release: str, extra: dict[str, int]) -> None:
    found = settings(kernel_version(release), strict_arp=False)
    assert {setting.path: setting.value for setting in found} == ALWAYS | extra


def test_strict_arp_answers_for_the_interface_that_was_asked() -> None:
    found = settings((6, 1), strict_arp=True)
    assert {setting.path: setting.value for setting in found} == ALWAYS | {
        "proc/sys/net/ipv4/conf/all/arp_ignore": 1,
        "proc/sys/net/ipv4/conf/all/arp_announce": 2,
    }


@pytest.mark.ipvs
def test_the_kernel_takes_them(netns: Namespace) -> None:
    wanted = settings_here(strict_arp=True)
    assert netns.run(sysctl.apply, wanted)
    assert netns.run(sysctl.apply, wanted) == []


def test_a_release_that_is_none() -> None:
    with pytest.raises(ValueError, match="'next' is no release of Linux"):
        kernel_version("next")
