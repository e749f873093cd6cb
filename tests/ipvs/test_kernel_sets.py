"""Sets, addresses and rules of ipvs mode in a kernel, and the formats of messages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from pyroute2 import IPVS, IPVSDest, IPVSService

from kproxy.dataplane.base import ApplyError, diff
from kproxy.dataplane.iptables.entries import EXISTS
from kproxy.dataplane.iptables.xtables_lock import lock_path, xtables_lock
from kproxy.dataplane.ipvs.entries import (
    PERSISTENT,
    AddressKey,
    Member,
    MemberKey,
    RealServer,
    RealServerKey,
    SetKey,
    VirtualServer,
)
from kproxy.dataplane.ipvs.fixed import render_base
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.render import render_route
from kproxy.dataplane.ipvs.servers import Servers
from kproxy.model import Family, Protocol
from tests.ipvs.kernel_host import (
    FACTS,
    V4,
    V6,
    Host,
    cluster_ip,
    elaborate,
    entries,
    pod,
    real_server,
    route,
    virtual_server,
)
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually

pytestmark = pytest.mark.ipvs


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


def members(host: Host, name: str) -> list[str]:
    _, _, listed = host.command("ipset", "list", "-s", name).partition("Members:\n")
    return listed.splitlines()


def test_other_tools_see_the_members(host: Host) -> None:
    host.bring_to(entries(elaborate(V4, 1), elaborate(V4, 2, Protocol.SCTP), elaborate(V6, 3, Protocol.UDP)))
    assert members(host, "KUBE-CLUSTER-IP") == ["10.96.0.1,tcp:80", "10.96.0.2,sctp:80"]
    assert members(host, "KUBE-LOOP-BACK") == ["10.1.0.1,tcp:8080,10.1.0.1", "10.1.0.1,sctp:8080,10.1.0.1"]
    assert members(host, "KUBE-LOAD-BALANCER-SOURCE-CIDR") == [
        "192.0.2.101,tcp:80,198.51.100.7",
        "192.0.2.101,tcp:80,203.0.113.0/24",
        "192.0.2.102,sctp:80,198.51.100.7",
        "192.0.2.102,sctp:80,203.0.113.0/24",
    ]
    assert members(host, "KUBE-NODE-PORT-TCP") == ["30001"]
    assert members(host, "KUBE-NODE-PORT-SCTP-HASH") == ["192.168.0.10,sctp:30002"]
    assert members(host, "KUBE-IPVS-IPS") == [
        "10.96.0.1",
        "10.96.0.2",
        "192.0.2.1",
        "192.0.2.2",
        "192.0.2.101",
        "192.0.2.102",
    ]
    assert members(host, "KUBE-6-LOAD-BALANCER-SOURCE-CID") == [
        "2001:db8::103,udp:80,2001:db8:1::/48",
        "2001:db8::103,udp:80,2001:db8:2::7",
    ]
    assert members(host, "KUBE-6-NODE-PORT-UDP") == ["30003"]


def test_a_member_that_cannot_be_is_named_and_nothing_of_it_all_is_there(host: Host) -> None:
    name = "KUBE-CLUSTER-IP"
    many = {MemberKey(name, Member(f"10.97.0.{n}", Protocol.TCP, 80)): EXISTS for n in range(1, 250)}
    wrong = MemberKey(name, Member("2001:db8::1", Protocol.TCP, 80))
    host.bring_to(entries() | dict(list(many.items())[:50]))
    with pytest.raises(ApplyError, match="KUBE-CLUSTER-IP: member 2001:db8::1,tcp:80") as caught:
        host.bring_to(entries() | dict(list(many.items())[50:100]) | {wrong: EXISTS} | many)
    assert caught.value.culprits == (wrong,)
    assert len(members(host, name)) == 50
    host.bring_to(entries() | many)
    assert len(members(host, name)) == len(many)


def test_a_set_of_another_type_in_the_place_of_ours_goes(host: Host) -> None:
    host.command("ipset", "create", "KUBE-CLUSTER-IP", "hash:net")
    host.command("ipset", "add", "KUBE-CLUSTER-IP", "192.0.2.0/24")
    host.command("ipset", "create", "KUBE-6-CLUSTER-IP", "hash:ip,port", "family", "inet")
    wanted = entries(route(V4, 1, 1))
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []


def test_a_set_of_another_type_that_a_rule_names(host: Host) -> None:
    host.command("ipset", "create", "KUBE-CLUSTER-IP", "hash:net")
    rule = ("INPUT", "-m", "set", "--match-set", "KUBE-CLUSTER-IP", "dst", "-j", "ACCEPT")
    host.command("iptables-legacy", "-A", *rule)
    with pytest.raises(ApplyError, match=r"ipset KUBE-CLUSTER-IP.*in use by a rule") as caught:
        host.bring_to(entries(route(V4, 1, 1)))
    assert SetKey("KUBE-CLUSTER-IP") in caught.value.culprits
    assert host.read() == {}


def test_members_that_others_added_or_took_away(host: Host) -> None:
    wanted = entries(elaborate(V4, 1))
    host.bring_to(wanted)
    host.command("ipset", "add", "KUBE-NODE-PORT-TCP", "9999")
    host.command("ipset", "del", "KUBE-CLUSTER-IP", "10.96.0.1,tcp:80")
    host.command("ipset", "add", "KUBE-LOAD-BALANCER-SOURCE-CIDR", "192.0.2.101,tcp:80,192.0.2.0/24")
    assert len(diff(wanted, host.read())) == 3
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []


def test_sets_of_others_are_left_alone(host: Host) -> None:
    host.command("ipset", "create", "KUBE-ROUTER", "hash:ip")
    host.command("ipset", "add", "KUBE-ROUTER", "192.0.2.1")
    host.bring_to(entries(route(V4, 1, 1)))
    host.bring_to({})
    assert host.command("ipset", "list", "-n").split() == ["KUBE-ROUTER"]
    assert members(host, "KUBE-ROUTER") == ["192.0.2.1"]


def test_the_device_is_down_and_its_addresses_answer(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1), route(V6, 2, 1)))
    (link,) = host.command("ip", "-o", "link", "show", "kube-ipvs0").splitlines()
    assert "NOARP" in link
    assert ",UP" not in link
    for number, family in ((1, V4), (2, V6)):
        address = cluster_ip(family, number)
        assert f"local {address}" in host.command("ip", "route", "get", address)


def test_addresses_that_others_put_on_the_device(host: Host) -> None:
    wanted = entries(route(V4, 1, 1), route(V6, 1, 1))
    host.bring_to(wanted)
    host.command("ip", "address", "add", "192.0.2.77/32", "dev", "kube-ipvs0")
    host.command("ip", "-6", "address", "add", "2001:db8::77/128", "dev", "kube-ipvs0")
    host.command("ip", "link", "set", "kube-ipvs0", "up")  # it gives itself a link-local address now
    assert {change.key for change in diff(wanted, host.read())} == {
        AddressKey(V4, "192.0.2.77"),
        AddressKey(V6, "2001:db8::77"),
    }
    host.bring_to(wanted)
    shown = host.command("ip", "address", "show", "kube-ipvs0")
    assert "192.0.2.77" not in shown
    assert "2001:db8::77" not in shown


@pytest.mark.parametrize("family", list(Family))
def test_rules_of_others_stay_where_they_are(host: Host, family: Family) -> None:
    program = "iptables" if family is V4 else "ip6tables"
    host.command(f"{program}-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
    host.command(f"{program}-legacy", "-t", "nat", "-N", "DOCKER")
    host.command(
        f"{program}-legacy", "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER"
    )
    before = host.saved(family)
    host.bring_to(entries(elaborate(family, 1)))
    assert set(before) <= set(host.saved(family))
    (ours, theirs) = (line for line in host.saved(family) if line.startswith("-A PREROUTING"))
    assert ours.endswith("-j KUBE-SERVICES")
    assert theirs.endswith("-j DOCKER")
    host.bring_to({})
    assert sorted(host.saved(family)) == sorted(before)


def test_rules_that_others_changed_come_back(host: Host) -> None:
    wanted = entries(elaborate(V4, 1), route(V4, 2, 1))
    host.bring_to(wanted)
    before = host.saved()
    host.command("iptables-legacy", "-t", "nat", "-D", "OUTPUT", "1")
    host.command("iptables-legacy", "-t", "nat", "-F", "KUBE-POSTROUTING")
    host.command("iptables-legacy", "-t", "nat", "-I", "KUBE-SERVICES", "-d", "10.96.0.1", "-j", "RETURN")
    host.command("iptables-legacy", "-A", "KUBE-FORWARD", "-j", "DROP")
    host.command("iptables-legacy", "-D", "KUBE-IPVS-FILTER", "1")
    host.bring_to(wanted)
    assert host.saved() == before


def test_rules_come_and_go_with_the_members_of_their_set(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1)))
    before = host.saved()
    assert not [line for line in before if "KUBE-NODE-PORT-TCP" in line]
    host.bring_to(entries(route(V4, 1, 1, node_port=30001)))
    assert len([line for line in host.saved() if "KUBE-NODE-PORT-TCP" in line]) == 1
    host.bring_to(entries(route(V4, 1, 1)))
    assert host.saved() == before


# --- what pyroute2 0.9.7 does otherwise than one would think, and what is done instead ---


@pytest.mark.parametrize("family", list(Family))
def test_our_real_servers_are_those_of_pyroute2(host: Host, family: Family) -> None:
    virtual, real = virtual_server(1, family=family), real_server(1, 1, family=family)
    with host.netns.run(Servers) as servers:
        servers.put({virtual: VirtualServer("rr"), real: RealServer(3)})
    ours = host.servers()

    def with_pyroute2() -> None:
        with IPVS() as library:
            service = IPVSService(addr=virtual.address, port=80, protocol=socket.IPPROTO_TCP)
            dest = IPVSDest(addr=real.endpoint_address, port=8080, fwd_method=0, weight=3)
            library.dest("del", service, dest)
            library.dest("add", service, dest)

    host.netns.run(with_pyroute2)
    assert host.servers() == ours


def test_a_server_that_is_there_is_changed_and_not_deleted(host: Host) -> None:
    virtual, real = virtual_server(1), real_server(1, 1)
    with host.netns.run(Servers) as servers:
        servers.put({virtual: VirtualServer("rr"), real: RealServer(1)})
        servers.put({virtual: VirtualServer("sh", PERSISTENT, 60), real: RealServer(2)})
        servers.put({virtual: VirtualServer("wrr")})
    assert host.servers() == ["-A -t 10.96.0.1:80 -s wrr", "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 2"]


@pytest.mark.parametrize("family", list(Family))
def test_a_client_that_stays_is_one_address(host: Host, family: Family) -> None:
    with host.netns.run(Servers) as servers:
        servers.put({virtual_server(1, family=family): VirtualServer("rr", PERSISTENT, 60)})
        (found,) = servers.virtual_servers()
    assert found.value == VirtualServer("rr", PERSISTENT, 60)
    (line,) = host.servers()
    assert line.endswith("-s rr -p 60")  # without -M, which stands there for any other mask


def test_a_real_server_of_no_virtual_server_is_refused(host: Host) -> None:
    lonely = RealServerKey(*virtual_server(1), pod(V4, 1), 8080)
    with host.netns.run(Servers) as servers:
        assert list(servers.put({lonely: RealServer(1)})) == [lonely]
        assert servers.real_servers(virtual_server(1)) == []
        assert servers.remove([lonely, virtual_server(1)]) == {}
        assert servers.quiesce([lonely]) == {}
    assert host.servers() == []


def test_an_address_does_not_outlive_its_virtual_server(host: Host) -> None:
    """Else what listens on the node would answer there, for as long as another program keeps the lock of iptables."""
    host.bring_to(entries(elaborate(V4, 1)))
    servers = host.netns.run(Servers)
    client = host.netns.run(socket.socket, socket.AF_INET, socket.SOCK_STREAM)
    listening = host.netns.run(socket.create_server, ("", 80))
    with servers, client, listening, ThreadPoolExecutor(1) as another, xtables_lock(lock_path()):
        client.settimeout(1)
        change = another.submit(host.bring_to, entries())
        eventually(lambda: not servers.virtual_servers(), "the virtual servers have gone")
        with pytest.raises(TimeoutError):
            client.connect((cluster_ip(V4, 1), 80))
        assert not change.done()


def test_no_address_comes_before_what_guards_it(host: Host) -> None:
    facts = msgspec.structs.replace(FACTS, families=(V4,))
    wanted = render_base(facts, Options()) | render_route(route(V4, 1, 1), facts, Options())
    with xtables_lock(lock_path()), pytest.raises(ApplyError, match="lock"):
        host.bring_to(wanted)
    assert "kube-ipvs0" not in host.command("ip", "link")
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
