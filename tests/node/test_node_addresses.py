"""Node IPs, node port addresses, families, and the addresses that the kernel says are here."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from kproxy.model import Family
from kproxy.node_addresses import (
    AddressMonitor,
    NodePortAddressesError,
    accepts_ipv4_loopback,
    is_loopback,
    local_addresses,
    matching,
    node_port_cidrs,
    node_port_warning,
    primary_node_ips,
    supported_families,
)
from tests.conformance import recorded
from tests.lab.namespaces import Namespace

IPV4, IPV6 = Family.IPv4, Family.IPv6
BOTH = (IPV4, IPV6)
IPS = {IPV4: "192.168.7.1", IPV6: "fd00:7::1"}
PATIENCE = 10.0


# --- nodePortAddresses ---


def test_node_port_addresses_are_chosen_as_recorded():
    """The recording lists loopback addresses too; no mode serves node ports on them through these lists."""
    for case in recorded.read("trackers.json")["node_port_addresses"]["cases"]:
        family = Family[case["ip_family"]]
        cidrs = node_port_cidrs(case["cidrs"], {})[family]
        assert (cidrs is None) == case["expected_match_all"], case
        interfaces = case["interfaces"].values()
        addresses = [address.partition("/")[0] for addresses in interfaces for address in addresses]
        expected = {address for address in case["expected_node_ips"] if not is_loopback(address)}
        assert set(matching(addresses, family, cidrs)) == expected, case


def test_loopback_is_among_node_port_addresses_as_recorded():
    for case in recorded.read("trackers.json")["node_port_loopback"]["cases"]:
        chosen = node_port_cidrs(case["cidrs"], {})[IPV4]
        # IPv6 never: no mode serves node ports on ::1.
        assert accepts_ipv4_loopback(chosen) == case["expected_ipv4"], case


@pytest.mark.parametrize(
    ("ips", "ipv4", "ipv6"),
    [
        (IPS, ("192.168.7.1/32",), ("fd00:7::1/128",)),
        ({IPV4: "192.168.7.1", IPV6: "::1"}, ("192.168.7.1/32",), None),
        ({IPV4: "127.0.0.1", IPV6: "::1"}, None, None),
    ],
    ids=["dual stack", "one known", "none known"],
)
def test_primary_is_the_nodes_own_address(
    ips: dict[Family, str], ipv4: tuple[str, ...] | None, ipv6: tuple[str, ...] | None
):
    assert node_port_cidrs(["primary"], ips) == {IPV4: ipv4, IPV6: ipv6}


def test_a_single_family_list_leaves_the_other_open():
    assert node_port_cidrs(["10.0.0.0/8"], IPS) == {IPV4: ("10.0.0.0/8",), IPV6: None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["primary", "10.0.0.0/8"], "nodePortAddresses[0]: 'primary' must be the only entry"),
        (["10.0.0.0/8", "10.0.0.1"], "nodePortAddresses[1]: '10.0.0.1' is not a CIDR"),
        (["10.0.0.0/33"], "nodePortAddresses[0]: "),
        (["localhost"], "nodePortAddresses[0]: 'localhost' is not a CIDR"),
    ],
)
def test_what_cannot_be_used_is_refused_by_entry(values: list[str], message: str):
    with pytest.raises(NodePortAddressesError) as e:
        node_port_cidrs(values, IPS)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "ips", "families", "says"),
    [
        (["10.0.0.0/8"], IPS, BOTH, "names no IPv6 address"),
        (["fd00::/8"], IPS, BOTH, "names no IPv4 address"),
        (["primary"], {IPV4: "127.0.0.1", IPV6: "::1"}, BOTH, "names no IPv4 and IPv6 address"),
    ],
)
def test_node_ports_that_are_open_everywhere_are_worth_a_warning(
    values: list[str], ips: dict[Family, str], families: tuple[Family, ...], says: str
):
    assert says in node_port_warning(values, ips, families)


@pytest.mark.parametrize(
    ("values", "families"),
    [
        ([], BOTH),
        (["primary"], BOTH),
        (["10.0.0.0/8"], (IPV4,)),
        (["10.0.0.0/8", "fd00::/8"], BOTH),
        (["0.0.0.0/0", "::/0"], BOTH),
    ],
)
def test_node_ports_that_are_where_they_were_asked_for_are_not(values: list[str], families: tuple[Family, ...]):
    assert node_port_warning(values, IPS, families) == ""


# --- node IPs ---


@pytest.mark.parametrize(
    ("addresses", "bind", "primary", "ips"),
    [
        (
            [("Hostname", "n1"), ("ExternalIP", "203.0.113.1"), ("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")],
            "",
            IPV4,
            {IPV4: "10.0.0.1", IPV6: "::1"},
        ),
        ([("InternalIP", "fd00::1"), ("InternalIP", "10.0.0.1")], "::", IPV6, {IPV4: "10.0.0.1", IPV6: "fd00::1"}),
        (
            [("ExternalIP", "2001:db8::1"), ("InternalIP", "10.0.0.1")],
            "",
            IPV4,
            {IPV4: "10.0.0.1", IPV6: "2001:db8::1"},
        ),
        ([("InternalIP", "10.0.0.1")], "fd00::9", IPV6, {IPV4: "10.0.0.1", IPV6: "fd00::9"}),
        ([("InternalIP", "10.0.0.1")], "10.0.0.9", IPV4, {IPV4: "10.0.0.9", IPV6: "::1"}),
        ([("InternalIP", "10.0.0.1")], "0.0.0.0", IPV4, {IPV4: "10.0.0.1", IPV6: "::1"}),
        ([("InternalIP", "unknown"), ("InternalIP", "10.0.0.1")], "", IPV4, {IPV4: "10.0.0.1", IPV6: "::1"}),
        ([], "", IPV4, {IPV4: "127.0.0.1", IPV6: "::1"}),
    ],
    ids=[
        "internal before external, first of each",
        "first decides the family",
        "the other family from an external address",
        "bind address leads",
        "bind address replaces",
        "unspecified bind address",
        "an address that is none",
        "unknown",
    ],
)
def test_primary_node_ips(addresses: list[tuple[str, str]], bind: str, primary: Family, ips: dict[Family, str]):
    found = primary_node_ips(addresses, bind)
    assert (found.primary, found.ips) == (primary, ips)
    assert found.known == (found.ips[primary] not in ("127.0.0.1", "::1"))


# --- families ---


def test_families_follow_the_kernel(netns: Namespace):
    assert netns.run(supported_families) == BOTH
    netns.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    assert netns.run(supported_families) == (IPV4,)


def test_a_kernel_without_ipv6_offers_ipv4_only(tmp_path: Path):
    assert supported_families(tmp_path) == (IPV4,)


# --- addresses of this machine ---


def add(netns: Namespace, address: str, device: str = "eth0") -> None:
    netns.command("ip", "addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []))


@pytest.fixture
def netns(netns: Namespace) -> Namespace:
    netns.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "kube-ipvs0")
    for device in ("eth0", "kube-ipvs0"):
        netns.command("ip", "link", "set", device, "addrgenmode", "none", "up")
    return netns


def test_local_addresses_are_those_of_every_interface_but_the_excluded(netns: Namespace):
    add(netns, "10.1.2.3/24")
    add(netns, "fd00:1::3/64")
    add(netns, "10.96.0.1/32", "kube-ipvs0")
    here = {"127.0.0.1", "::1", "10.1.2.3", "fd00:1::3"}
    assert netns.run(local_addresses) == here | {"10.96.0.1"}
    assert netns.run(local_addresses, "kube-ipvs0") == here
    assert netns.run(local_addresses, "not-there") == here | {"10.96.0.1"}


def test_on_a_point_to_point_link_the_address_is_this_end(netns: Namespace):
    netns.command("ip", "addr", "add", "10.1.2.3", "peer", "10.1.2.4", "dev", "eth0")
    assert "10.1.2.3" in netns.run(local_addresses)
    assert "10.1.2.4" not in netns.run(local_addresses)


def test_matching_leaves_out_loopback_and_other_families():
    addresses = {"127.0.0.1", "::1", "10.1.2.3", "10.1.2.20", "192.168.7.1", "fd00::1"}
    assert matching(addresses, IPV4, None) == ("10.1.2.3", "10.1.2.20", "192.168.7.1")
    assert matching(addresses, IPV4, ("10.0.0.0/8", "127.0.0.0/8")) == ("10.1.2.3", "10.1.2.20")
    assert matching(addresses, IPV6, ("fd00::/8",)) == ("fd00::1",)
    assert matching(addresses, IPV6, ("2001:db8::/32",)) == ()


def test_an_address_that_comes_or_goes_is_announced(netns: Namespace):
    announced: queue.Queue[frozenset[str]] = queue.Queue()
    monitor = AddressMonitor(announced.put)
    known = netns.run(monitor.start)
    try:
        assert known == {"127.0.0.1", "::1"}
        add(netns, "10.1.2.3/24")
        assert announced.get(timeout=PATIENCE) == known | {"10.1.2.3"}
        add(netns, "fd00:1::3/64")
        assert announced.get(timeout=PATIENCE) == known | {"10.1.2.3", "fd00:1::3"}
        netns.command("ip", "link", "del", "eth0")
        everything = announced.get(timeout=PATIENCE)
        while everything != known:  # one family may be announced before the other
            everything = announced.get(timeout=PATIENCE)
    finally:
        monitor.stop()
    assert announced.empty()


def test_addresses_of_the_excluded_interface_are_not_announced(netns: Namespace):
    announced: queue.Queue[frozenset[str]] = queue.Queue()
    monitor = AddressMonitor(announced.put, exclude="kube-ipvs0")
    known = netns.run(monitor.start)
    try:
        add(netns, "10.96.0.1/32", "kube-ipvs0")
        add(netns, "10.1.2.3/24")  # the first announcement is this one's
        assert announced.get(timeout=PATIENCE) == known | {"10.1.2.3"}
    finally:
        monitor.stop()
    assert announced.empty()


def test_a_burst_of_changes_ends_with_the_whole_truth(netns: Namespace):
    """More than the socket's buffer holds while the callback is slow, so that notifications are lost."""
    announced: queue.Queue[frozenset[str]] = queue.Queue()
    may_go_on = threading.Event()

    def slow(addresses: frozenset[str]) -> None:
        announced.put(addresses)
        may_go_on.wait(PATIENCE)

    monitor = AddressMonitor(slow)
    known = netns.run(monitor.start)
    burst = [f"10.1.{i // 250}.{i % 250 + 1}" for i in range(3000)]
    try:
        add(netns, "192.0.2.1/32")
        announced.get(timeout=PATIENCE)
        netns.command("ip", "-batch", "-", stdin="".join(f"addr add {address}/32 dev eth0\n" for address in burst))
        may_go_on.set()
        everything = known | {"192.0.2.1", *burst}
        while announced.get(timeout=PATIENCE) != everything:
            pass
    finally:
        monitor.stop()


def test_a_monitor_that_has_stopped_is_silent_and_leaves_no_thread(netns: Namespace):
    announced: queue.Queue[frozenset[str]] = queue.Queue()
    monitor = AddressMonitor(announced.put)
    netns.run(monitor.start)
    monitor.stop()
    add(netns, "10.1.2.3/24")
    assert announced.empty()
    assert not [thread for thread in threading.enumerate() if thread.name == "addresses"]


def test_a_node_of_one_family_is_nothing_unusual():
    assert node_port_warning(["primary"], {IPV4: "192.168.7.1", IPV6: "::1"}, BOTH) == ""
