"""From one proxy or mode to another under load: no connection fails, nothing is left of the old, others keep theirs.

The order is that of a DaemonSet: the old process ends, its rules stay, the new one starts. Session affinity is no part
of this: a client may get another endpoint after a change of the mode, since no mode reads what another remembers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.model import Family
from tests.handover.connections import Traffic, Way
from tests.handover.stage import EMPTY, EMPTY_NODE_PORT, ROUTE_LOCALNET, WEB, WEB_NODE_PORT, Stage
from tests.lab.traffic import NoAnswer, try_once

IPTABLES, NFTABLES = ProxyMode.IPTABLES, ProxyMode.NFTABLES
LASTING = 50  # on each of four ways
CONNECTIONS = 200  # on each way, before and after

Before = Callable[[Stage], object]


def kproxy(mode: ProxyMode) -> Before:
    """A kproxy that has ended."""
    return lambda stage: stage.started(mode).stop()


SWITCHES = {
    "kube-proxy's iptables to iptables": (Stage.kube_proxys_iptables, None, IPTABLES),
    "kube-proxy's iptables to nftables": (Stage.kube_proxys_iptables, IPTABLES, NFTABLES),
    "kube-proxy's nftables to iptables": (Stage.kube_proxys_nftables, NFTABLES, IPTABLES),
    "kube-proxy's nftables to nftables": (Stage.kube_proxys_nftables, None, NFTABLES),
    "nftables to iptables": (kproxy(NFTABLES), NFTABLES, IPTABLES),
    "iptables to nftables": (kproxy(IPTABLES), IPTABLES, NFTABLES),
}


def ways(stage: Stage) -> list[Way]:
    """From a pod to the cluster IPs, from outside to the node ports."""
    inside = [Way(stage.visitor, address, 80) for address in WEB.values()]
    return inside + [Way(stage.client, address, WEB_NODE_PORT) for address in (stage.node.ipv4, stage.node.ipv6)]


@pytest.mark.parametrize(("before", "old", "new"), SWITCHES.values(), ids=SWITCHES)
def test_no_connection_fails_in_a_switch(stage: Stage, before: Before, old: ProxyMode | None, new: ProxyMode):
    before(stage)
    with Traffic(ways(stage), LASTING) as traffic:
        traffic.more(CONNECTIONS)
        stage.started(new)
        if old:
            stage.wait_until_gone(old)
        traffic.more(CONNECTIONS)

    assert traffic.failures == []
    assert traffic.connections > 8 * CONNECTIONS
    for stream in traffic.streams:
        assert stream.answers.keys() == {pod.name for pod in stage.pods}
    for way in (Way(stage.visitor, EMPTY[Family.IPv4], 80), Way(stage.client, stage.node.ipv4, EMPTY_NODE_PORT)):
        assert try_once(way.client, way.url) is NoAnswer.REFUSED
    assert stage.others_are_untouched()
    localnet = stage.node.exec("cat", f"/proc/sys/{ROUTE_LOCALNET}").strip()
    assert localnet == str(int(new is IPTABLES))
