"""Removing what ipvs mode left: all of it, and nobody else's."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from kproxy.dataplane.base import ApplyError, diff
from kproxy.dataplane.iptables import fixed as iptables_fixed
from kproxy.dataplane.iptables import render as iptables_render
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.options import Options
from kproxy.dataplane.ipvs import cleanup
from kproxy.dataplane.ipvs.describe import describe
from kproxy.model import Family
from tests.ipvs.kernel_host import FACTS, V4, V6, Host, elaborate, entries, everything, route
from tests.lab.namespaces import Namespace

BOTH = (V4, V6)


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


def clean_up(host: Host) -> None:
    host.netns.run(cleanup.remove_servers, host.netns.run(cleanup.servers_left, BOTH))
    for variant in Variant:
        rules = host.netns.run(cleanup.rules_left, variant, BOTH)
        host.netns.run(cleanup.write_rules, variant, rules)
    host.netns.run(cleanup.remove_sets, host.netns.run(cleanup.sets_left, BOTH))


def test_a_machine_without_anything_of_ours(netns: Namespace) -> None:
    for variant in Variant:
        assert netns.run(cleanup.rules_left, variant, BOTH) == []
    assert netns.run(cleanup.servers_left, BOTH) == []
    assert netns.run(cleanup.sets_left, BOTH) == []


def test_looking_where_there_is_nothing_does_not_load_pyroute2(netns: Namespace) -> None:
    look = (
        "import sys; from kproxy.dataplane.ipvs import cleanup; from kproxy.model import Family;"
        "assert cleanup.servers_left(tuple(Family)) == []; print('pyroute2' in sys.modules)"
    )
    assert netns.command(sys.executable, "-c", look).stdout == "False\n"


@pytest.mark.ipvs
def test_everything_goes_but_what_is_somebody_elses(host: Host) -> None:
    host.command("ipvsadm", "-A", "-t", "192.168.0.10:443", "-s", "rr")
    host.command("ipvsadm", "-a", "-t", "192.168.0.10:443", "-r", "10.9.0.1:443", "-m")
    host.command("ipset", "create", "KUBE-ROUTER", "hash:ip")
    host.command("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    host.command("ip6tables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    links, servers = host.command("ip", "-br", "link"), host.servers()
    host.bring_to(everything())
    clean_up(host)
    assert host.servers() == servers
    assert host.command("ip", "-br", "link") == links
    assert host.command("ipset", "list", "-n").split() == ["KUBE-ROUTER"]
    for family in Family:
        assert [line for line in host.saved(family) if line[0] not in "*:C"] == ["-A INPUT -j ACCEPT"]
        assert not [line for line in host.saved(family) if "KUBE" in line]
    assert host.read() == {}


@pytest.mark.ipvs
def test_finding_out_changes_nothing_and_says_what_there_is(host: Host) -> None:
    wanted = entries(route(V4, 1, 1, node_port=30001))
    host.bring_to(wanted)
    rules = host.netns.run(cleanup.rules_left, Variant.LEGACY, BOTH)
    servers = host.netns.run(cleanup.servers_left, BOTH)
    sets = host.netns.run(cleanup.sets_left, BOTH)
    texts = [describe(change.key, change.old) for change in (*servers, *rules, *sets)]
    assert "virtual server 10.96.0.1:80/TCP: rr" in texts
    assert "virtual server 192.168.0.10:30001/TCP: rr" in texts
    assert "interface kube-ipvs0" in texts
    assert "ipset KUBE-6-CLUSTER-IP: hash:ip,port for IPv6" in texts
    assert any("KUBE-IPVS-FILTER" in text for text in texts)
    assert diff(wanted, host.read()) == []


@pytest.mark.ipvs
def test_others_virtual_servers_in_an_excluded_range_stay(host: Host) -> None:
    stranger = "-A -t 10.96.0.1:81 -s rr"
    host.bring_to(entries(route(V4, 1, 1, node_port=30001)))
    host.command("ipvsadm", "-R", stdin=f"{stranger}\n")
    left = host.netns.run(cleanup.servers_left, BOTH, ["10.96.0.0/12", "192.168.0.0/24"])
    rules = host.netns.run(cleanup.rules_left, Variant.LEGACY, BOTH)
    host.netns.run(cleanup.write_rules, Variant.LEGACY, rules)
    host.netns.run(cleanup.remove_servers, left)
    assert host.servers() == [stranger]


@pytest.mark.ipvs
def test_sets_that_a_foreign_rule_names_are_told(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1)))
    rule = ("INPUT", "-m", "set", "--match-set", "KUBE-CLUSTER-IP", "dst,dst", "-j", "ACCEPT")
    host.command("iptables-legacy", "-A", *rule)
    with pytest.raises(ApplyError, match=r"ipset KUBE-CLUSTER-IP.*in use by a rule"):
        clean_up(host)
    assert host.servers() == []
    assert host.command("ipset", "list", "-n").split() == ["KUBE-CLUSTER-IP"]


@pytest.mark.ipvs
def test_iptables_mode_that_took_over_keeps_its_chains(host: Host) -> None:
    def iptables_mode() -> IptablesKernel:
        return IptablesKernel(BOTH, Variant.LEGACY, guards_localhost=False)

    wanted = iptables_fixed.render_base(FACTS, Options())
    alone = host.netns.run(iptables_mode)
    host.netns.run(alone.apply, diff(wanted, host.netns.run(alone.read)))
    without = [host.saved(family) for family in Family]

    host.bring_to(entries(elaborate(V4, 1), elaborate(V6, 1)))
    taken_over = host.netns.run(iptables_mode)
    host.netns.run(taken_over.apply, diff(wanted, host.netns.run(taken_over.read)))
    clean_up(host)
    assert host.servers() == []
    assert host.command("ipset", "list", "-n") == ""
    for family, before in zip(Family, without, strict=True):
        assert sorted(host.saved(family)) == sorted(before)


@pytest.mark.ipvs
def test_ipvs_mode_takes_the_chains_of_iptables_mode_over(host: Host) -> None:
    kernel = host.netns.run(lambda: IptablesKernel(BOTH, Variant.LEGACY, guards_localhost=False))
    before = iptables_fixed.render_base(FACTS, Options())
    for number in range(1, 13):
        before |= iptables_render.render_route(route(V4, number, 1), FACTS, Options())
    host.netns.run(kernel.apply, diff(before, {}))

    wanted = entries(*(route(V4, number, 1) for number in range(1, 13)))
    host.bring_to(wanted)

    assert diff(wanted, host.read()) == []
    assert not [line for line in host.saved() if line.startswith("-A KUBE-SERVICES") and "KUBE-SVC-" in line]
    assert [line for line in host.saved() if line.startswith(":KUBE-SVC-")]  # unused now, and not ours to remove
