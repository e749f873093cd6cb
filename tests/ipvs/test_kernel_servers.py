"""Virtual servers and real servers in a kernel with IPVS: what is written, what is left alone, what is refused."""

from __future__ import annotations

import select
from collections.abc import Iterator

import msgspec
import pytest

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import ApplyError, Change, UnsupportedError, diff
from kproxy.dataplane.ipvs.dataplane import IpvsDataplane
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import AddressKey, RealServer, RealServerKey, SetKey, VirtualServer, VirtualServerKey
from kproxy.dataplane.ipvs.kernel import IpvsKernel
from kproxy.dataplane.ipvs.options import Options
from kproxy.model import Family, Protocol, ServiceName
from kproxy.netlink import NetlinkSocket
from kproxy.reconcile import Reconciler
from tests.ipvs.kernel_host import (
    FACTS,
    NODE,
    V4,
    V6,
    Host,
    cluster_ip,
    elaborate,
    entries,
    everything,
    pod,
    real_server,
    route,
    virtual_server,
)
from tests.lab.cluster_objects import port, service
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually
from tests.reconcile.driven import changed
from tests.reconcile.objects import endpoints

pytestmark = pytest.mark.ipvs

NETLINK_ROUTE, RTMGRP_LINK = 0, 1


@pytest.fixture
def host(netns: Namespace) -> Iterator[Host]:
    with Host(netns) as made:
        yield made


def test_an_empty_node_reads_as_nothing_and_stays_so(host: Host) -> None:
    assert host.read() == {}
    assert host.servers() == []
    assert host.command("ipset", "list", "-n") == ""
    assert host.saved() == []
    assert "kube-ipvs0" not in host.command("ip", "link")


def test_what_was_written_is_read_back(host: Host) -> None:
    wanted = everything()
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
    host.restart()
    assert diff(wanted, host.read()) == []


def test_other_tools_see_the_virtual_servers(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1, 2, affinity_seconds=180), route(V6, 2, 3, affinity_seconds=90)))
    assert host.servers() == [
        "-A -t 10.96.0.1:80 -s rr -p 180",
        "-A -t [fd00:96::2]:80 -s rr -p 90",
        "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1",
        "-a -t 10.96.0.1:80 -r 10.1.0.2:8080 -m -w 1",
        "-a -t [fd00:96::2]:80 -r [fd00:1::3]:8080 -m -w 1",
    ]


def test_the_scheduler_that_looks_at_ports(host: Host) -> None:
    host.bring_to(entries(route(V4, 1, 1), options=Options(scheduler="mh")))
    assert "-A -t 10.96.0.1:80 -s mh -b mh-port" in host.servers()


def test_one_endpoint_instead_of_another_leaves_the_rest_alone(host: Host) -> None:
    others = [route(V4, number, 1, 2) for number in range(2, 5)]
    before, after = entries(route(V4, 1, 1, 2), *others), entries(route(V4, 1, 2, 3), *others)
    host.bring_to(before)
    was = host.servers()
    host.netns.run(host.kernel.apply, diff(after, before))
    assert diff(after, host.read()) == []
    assert set(host.servers()) ^ set(was) == {
        "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1",
        "-a -t 10.96.0.1:80 -r 10.1.0.3:8080 -m -w 1",
    }


@pytest.mark.parametrize("family", list(Family))
def test_a_virtual_server_that_changes_keeps_its_connections(host: Host, family: Family) -> None:
    host.bring_to(entries(route(family, 1, 1)))
    with host.listening(pod(family, 1)) as server, host.connect(cluster_ip(family, 1)) as client:
        peer, _ = server.accept()
        with peer:
            host.bring_to(entries(route(family, 1, 1, affinity_seconds=60), options=Options(scheduler="sh")))
            client.sendall(b"still here?")
            assert peer.recv(64) == b"still here?"
    assert any("-s sh -p 60" in line for line in host.servers())


def test_servers_of_others_are_neither_read_nor_touched(host: Host) -> None:
    host.netns.command("ip", "address", "add", "192.168.0.11/24", "dev", "eth0")
    strangers = [
        "-A -f 7 -s wlc",
        "-A -t 192.168.0.10:443 -s rr",
        "-A -t 192.168.0.11:31999 -s rr",
        "-A -t 198.51.100.1:30001 -s rr",  # the number of a node port, on an address that is not the node's
        "-A -u 192.168.0.10:30001 -s rr",  # the same number, another protocol
        "-A -t [2001:db8::1]:80 -s wrr",
        "-a -t 192.168.0.10:443 -r 10.9.0.1:443 -m -w 7",
        "-a -t 198.51.100.1:30001 -r 10.9.0.1:443 -g -w 1",
    ]
    host.command("ipvsadm", "-R", stdin="".join(f"{line}\n" for line in strangers))
    before = host.servers()
    wanted = entries(route(V4, 1, 1, node_port=30001))
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
    host.restart()
    assert diff(wanted, host.read()) == []
    host.bring_to({})
    assert host.servers() == before


def test_what_others_put_on_our_addresses_goes(host: Host) -> None:
    wanted = entries(route(V4, 1, 1, 2))
    same_port = RealServerKey(*virtual_server(1), pod(V4, 3), 80)
    wanted[same_port] = RealServer(1)
    host.bring_to(wanted)
    before = host.servers()
    ours = f"{cluster_ip(V4, 1)}:80"
    host.command("ipvsadm", "-A", "-t", f"{cluster_ip(V4, 1)}:81", "-s", "rr")
    host.command("ipvsadm", "-a", "-t", ours, "-r", "10.9.9.9:80", "-m")
    host.command("ipvsadm", "-e", "-t", ours, "-r", f"{pod(V4, 1)}:8080", "-m", "-w", "5")
    host.command("ipvsadm", "-d", "-t", ours, "-r", f"{pod(V4, 2)}:8080")
    host.command("ipvsadm", "-e", "-t", ours, "-r", f"{pod(V4, 3)}:80", "-g")
    host.bring_to(wanted)
    assert host.servers() == before


def test_what_others_set_of_real_servers_is_told_and_put_right(host: Host) -> None:
    wanted = entries(route(V4, 1, 1))
    same_port = RealServerKey(*virtual_server(1), pod(V4, 2), 80)  # others than masqueraded ones have no other
    wanted[same_port] = RealServer(1)
    host.bring_to(wanted)
    before = host.servers()
    ours = f"{cluster_ip(V4, 1)}:80"
    host.command("ipvsadm", "-e", "-t", ours, "-r", f"{pod(V4, 1)}:8080", "-m", "-w", "1", "-x", "5", "-y", "2")
    host.command("ipvsadm", "-e", "-t", ours, "-r", f"{pod(V4, 2)}:80", "-g", "-w", "3")
    host.command("ipvsadm", "-a", "-t", ours, "-r", "[fd00:9::1]:80", "-i", "-w", "1")  # of the other family
    found = host.read()
    assert [describe(change.key, change.old) for change in diff(wanted, found)] == [
        "virtual server 10.96.0.1:80/TCP to 10.1.0.1:8080: weight 1, thresholds 2 and 5",
        "virtual server 10.96.0.1:80/TCP to 10.1.0.2:80: weight 3, direct routing",
        "virtual server 10.96.0.1:80/TCP to [fd00:9::1]:80: weight 1, tunnel",
    ]
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
    assert host.servers() == before


def test_in_excluded_addresses_what_services_have_is_ours_and_the_rest_is_not_touched(host: Host) -> None:
    excluded = ["10.96.0.128/25", "192.168.0.0/24"]
    others = route(V4, 1, 1)
    wanted = entries(route(V4, 130, 1, node_port=30001), others)
    strangers = [
        "-A -t 10.96.0.130:81 -s rr",
        "-A -t 192.168.0.10:443 -s wlc",
        "-A -u 192.168.0.10:30001 -s rr",  # the number of the node port, another protocol
        "-a -t 10.96.0.130:81 -r 10.9.0.1:81 -g -w 3",
    ]
    host.command("ipvsadm", "-R", stdin="".join(f"{line}\n" for line in strangers))
    host.restart(excluded=excluded)
    host.bring_to(wanted)
    host.command("ipvsadm", "-A", "-t", "10.96.0.1:81", "-s", "rr")  # not in the excluded range

    host.restart(excluded=excluded)
    assert [str(change.key) for change in diff(wanted, host.read())] == ["10.96.0.1:81/TCP"]
    host.bring_to(entries(route(V4, 130, 2, node_port=30001), others))
    assert [line for line in host.servers() if line.startswith("-a") and line not in strangers] == [
        "-a -t 10.96.0.130:80 -r 10.1.0.2:8080 -m -w 1",
        "-a -t 10.96.0.1:80 -r 10.1.0.1:8080 -m -w 1",
        "-a -t 192.168.0.10:30001 -r 10.1.0.2:8080 -m -w 1",
    ]

    host.restart(excluded=excluded)
    host.bring_to(entries())
    assert host.servers() == strangers


def test_an_excluded_address_without_node_ports_keeps_what_others_have_at_their_numbers(host: Host) -> None:
    elsewhere = "10.20.0.1"
    host.netns.command("ip", "address", "add", f"{elsewhere}/24", "dev", "eth0")
    host.restart(excluded=["192.168.0.0/16"], node_ports={V4: [f"{elsewhere}/32"]})
    wanted = entries(
        route(V4, 1, 1, node_port=30001), facts=msgspec.structs.replace(FACTS, node_port_addresses={V4: (elsewhere,)})
    )
    stranger = f"-A -t {NODE[V4]}:30001 -s wlc"
    host.command("ipvsadm", "-R", stdin=f"{stranger}\n")
    host.bring_to(wanted)
    host.restart(excluded=["192.168.0.0/16"], node_ports={V4: [f"{elsewhere}/32"]})
    assert diff(wanted, host.read()) == []
    host.bring_to({})
    assert host.servers() == [stranger]


@pytest.mark.parametrize("family", list(Family))
def test_a_new_process_removes_node_ports_that_are_not_wanted_any_more(host: Host, family: Family) -> None:
    host.bring_to(
        entries(
            route(family, 1, 1, node_port=30001),
            route(family, 2, 1, node_port=30002, protocol=Protocol.UDP),
            route(family, 3, 1, node_port=30003, protocol=Protocol.SCTP),
            route(family, 4, 1, external_ips=(NODE[family],)),
        )
    )
    assert sum(NODE[family] in line for line in host.servers()) == 8
    host.restart()
    host.bring_to(entries())
    assert host.servers() == []


def test_a_refused_endpoint_is_named_and_nothing_of_the_changes_is_in_force(host: Host) -> None:
    before = entries(route(V4, 1, 1), route(V4, 2, 1), route(V4, 3, 1))
    host.bring_to(before)
    servers, rules = host.servers(), host.saved()
    after = entries(elaborate(V4, 1), route(V4, 2, 2, affinity_seconds=60), route(V4, 4, 1))
    refused = RealServerKey(*virtual_server(1), "224.0.0.1", 8080)
    with pytest.raises(ApplyError, match=r"10\.96\.0\.1:80.*224\.0\.0\.1:8080.*Invalid argument") as caught:
        host.bring_to({**after, refused: RealServer(1)})
    assert caught.value.culprits == (refused,)
    assert not caught.value.transient
    assert diff(before, host.read()) == []
    assert host.servers() == servers
    assert host.saved() == rules


def test_a_strangers_virtual_server_is_taken_over_only_if_nothing_is_refused(host: Host) -> None:
    strangers = [
        "-A -t 192.168.0.10:30001 -s wlc -p 60",
        "-a -t 192.168.0.10:30001 -r 10.1.0.1:8080 -m -w 3",
        "-a -t 192.168.0.10:30001 -r 10.9.0.1:30001 -i -w 7",
    ]
    host.command("ipvsadm", "-R", stdin="".join(f"{line}\n" for line in strangers))
    before = host.servers()
    wanted = entries(route(V4, 1, 1, 2, node_port=30001))
    refused = RealServerKey(*virtual_server(1), "224.0.0.1", 8080)
    with pytest.raises(ApplyError, match=r"224\.0\.0\.1"):
        host.bring_to({**wanted, refused: RealServer(1)})
    assert host.servers() == before
    assert host.read() == {}

    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
    assert [line for line in host.servers() if ":30001" in line] == [
        "-A -t 192.168.0.10:30001 -s rr",
        "-a -t 192.168.0.10:30001 -r 10.1.0.1:8080 -m -w 1",
        "-a -t 192.168.0.10:30001 -r 10.1.0.2:8080 -m -w 1",
    ]
    host.bring_to(entries())
    assert host.servers() == []


def test_where_something_cannot_be_removed_nothing_is_in_force(host: Host) -> None:
    before = entries(route(V4, 1, 1, external_ips=("192.0.2.1",)), route(V4, 2, 1, affinity_seconds=60))
    host.bring_to(before)
    in_use = "KUBE-LOAD-BALANCER-SOURCE-IP"
    host.command("iptables-legacy", "-A", "INPUT", "-m", "set", "--match-set", in_use, "dst,dst,src", "-j", "ACCEPT")
    servers, rules = host.servers(), host.saved()
    after = entries(route(V4, 1, 2), route(V4, 3, 1))
    del after[SetKey(in_use)]
    with pytest.raises(ApplyError, match=f"{in_use}.*in use by a rule") as caught:
        host.netns.run(host.kernel.apply, diff(after, before))
    assert not caught.value.transient
    assert diff(before, host.read()) == []
    assert host.servers() == servers
    assert sorted(host.saved()) == sorted(rules)


def test_a_refused_virtual_server_is_named_once(host: Host) -> None:
    wanted = entries(route(V4, 1, 1, 2), route(V4, 2, 1))
    wanted[virtual_server(1)] = VirtualServer("no-such")
    with pytest.raises(ApplyError) as caught:
        host.bring_to(wanted)
    assert caught.value.culprits == (virtual_server(1),)
    assert host.servers() == []


def test_a_refused_service_stays_as_it_was_and_the_others_go_in(host: Host) -> None:
    cluster = ClusterState(FACTS.name, note=lambda text: None)
    good, bad = service("good", "10.96.1.1"), service("bad", "10.96.1.2")
    for item in (good, endpoints("good", pod(V4, 1)), bad, endpoints("bad", pod(V4, 1))):
        cluster.apply(changed(item))
    reconciler = Reconciler(cluster, IpvsDataplane(host.kernel, Options()), FACTS)
    host.netns.run(reconciler.sync)
    cluster.apply(changed(endpoints("good", pod(V4, 2))))
    cluster.apply(changed(endpoints("bad", "224.0.0.1", pod(V4, 2))))

    report = host.netns.run(reconciler.sync)

    (reason,) = report.quarantined.values()
    assert "224.0.0.1:8080" in reason
    assert list(report.quarantined) == [ServiceName("default", "bad")]
    assert [line for line in host.servers() if line.startswith("-a")] == [
        "-a -t 10.96.1.1:80 -r 10.1.0.2:8080 -m -w 1",
        "-a -t 10.96.1.2:80 -r 10.1.0.1:8080 -m -w 1",
    ]
    cluster.apply(changed(endpoints("bad", pod(V4, 2))))
    assert not host.netns.run(reconciler.sync).quarantined
    assert host.netns.run(reconciler.plan) == []
    assert "-a -t 10.96.1.2:80 -r 10.1.0.2:8080 -m -w 1" in host.servers()


def test_a_virtual_server_that_two_services_share_keeps_what_the_other_needs(host: Host) -> None:
    cluster = ClusterState(FACTS.name, note=lambda text: None)
    one = service("one", "10.96.1.1", type="NodePort", ports=[port(80, node_port=30080)])
    other = service("other", "10.96.1.2", externalIPs=[NODE[V4]], ports=[port(30080)])
    for item in (one, endpoints("one", pod(V4, 1)), other, endpoints("other", pod(V4, 1), pod(V4, 2))):
        cluster.apply(changed(item))
    reconciler = Reconciler(cluster, IpvsDataplane(host.kernel, Options()), FACTS)
    host.netns.run(reconciler.sync)
    assert host.netns.run(reconciler.plan) == []

    cluster.apply(changed(endpoints("other")))
    host.netns.run(reconciler.sync)

    assert [line for line in host.servers() if f"{NODE[V4]}:30080 -r" in line] == [
        f"-a -t {NODE[V4]}:30080 -r {pod(V4, 1)}:8080 -m -w 1"
    ]


def test_what_was_flushed_is_told_and_comes_back(host: Host) -> None:
    before, after = entries(route(V4, 1, 1)), entries(route(V4, 1, 1, 2))
    host.bring_to(before)
    host.command("ipvsadm", "-C")
    host.command("ip", "link", "delete", "kube-ipvs0")
    with pytest.raises(ApplyError) as caught:
        host.netns.run(host.kernel.apply, diff(after, before))
    assert not caught.value.transient
    host.bring_to(after)
    assert diff(after, host.read()) == []


def test_a_new_service_does_without_the_device_that_somebody_deleted(host: Host) -> None:
    before, after = entries(route(V4, 1, 1)), entries(route(V4, 1, 1), route(V4, 2, 1))
    host.bring_to(before)
    host.command("ip", "link", "delete", "kube-ipvs0")
    host.netns.run(host.kernel.apply, diff(after, before))
    assert cluster_ip(V4, 2) in host.command("ip", "address", "show", "dev", "kube-ipvs0")
    assert [change.key for change in diff(after, host.read())] == [AddressKey(V4, cluster_ip(V4, 1))]


def test_changes_may_be_made_twice(host: Host) -> None:
    wanted = everything()
    changes = diff(wanted, {})
    host.netns.run(host.kernel.apply, changes)
    host.netns.run(host.kernel.apply, changes)
    assert diff(wanted, host.read()) == []
    back = [Change(change.key, change.new, None) for change in changes]
    host.netns.run(host.kernel.apply, back)
    host.netns.run(host.kernel.apply, back)
    assert host.read() == {}
    assert host.servers() == []


@pytest.mark.parametrize("family", list(Family))
def test_connections_are_counted(host: Host, family: Family) -> None:
    host.bring_to(entries(route(family, 1, 1, 2)))
    with host.listening(pod(family, 1)), host.listening(pod(family, 2)):
        for _ in range(6):
            host.connect(cluster_ip(family, 1)).close()
    counts = {
        virtual_server(1, family=family): 6,
        real_server(1, 1, family=family): 3,
        real_server(1, 2, family=family): 3,
    }
    eventually(lambda: host.netns.run(host.kernel.connections) == counts, "the kernel adds up every two seconds")


def test_timeouts_that_are_not_given_stay(host: Host) -> None:
    host.netns.run(host.kernel.set_timeouts, 111, 0, 222)
    assert host.command("ipvsadm", "-L", "--timeout").strip() == "Timeout (tcp tcpfin udp): 111 120 222"
    host.netns.run(host.kernel.set_timeouts, 0, 0, 0)
    assert host.command("ipvsadm", "-L", "--timeout").strip() == "Timeout (tcp tcpfin udp): 111 120 222"


def test_the_probe_makes_nothing(host: Host) -> None:
    with host.netns.run(NetlinkSocket, NETLINK_ROUTE, RTMGRP_LINK) as links:
        assert host.netns.run(host.kernel.probe, "mh").random_fully
        assert select.select([links], [], [], 0)[0] == []  # no interface came and went
    assert host.servers() == []
    assert not [line for line in host.saved() if "KUBE" in line]


@pytest.mark.parametrize("scheduler", ["fancy", "longer-than-the-kernel-takes", "none"])
def test_a_scheduler_that_the_kernel_does_not_have(host: Host, scheduler: str) -> None:
    left_by_a_kube_proxy_that_was_killed = "-A -t 198.51.100.0:20000 -s rr"
    host.command("ipvsadm", "-R", stdin=f"{left_by_a_kube_proxy_that_was_killed}\n")
    with pytest.raises(UnsupportedError, match=rf"no scheduler '{scheduler}'.*ip_vs_{scheduler}"):
        host.netns.run(host.kernel.probe, scheduler)
    assert host.servers() == [left_by_a_kube_proxy_that_was_killed]


def test_one_family_only(netns: Namespace) -> None:
    with Host(netns) as host:
        host.bring_to(entries(route(V4, 1, 1), route(V6, 1, 1)))
        both = host.servers()
        with netns.run(lambda: IpvsKernel((V4,), host.kernel.variant)) as kernel:
            found = netns.run(kernel.read)
            assert virtual_server(1) in found
            assert VirtualServerKey(V6, cluster_ip(V6, 1), Protocol.TCP, 80) not in found
            netns.run(kernel.apply, diff({}, found))
        assert host.servers() == [line for line in both if "fd00" in line]


def test_many_services(host: Host) -> None:
    wanted = entries(*(route(V4, number, 1, 2, 3) for number in range(1, 251)))
    host.bring_to(wanted)
    assert diff(wanted, host.read()) == []
    host.bring_to(entries())
    assert host.servers() == []
