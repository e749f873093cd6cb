"""What every sort of service gets in ipvs mode (reference: section 4.2)."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kproxy import routing
from kproxy.dataplane.base import diff
from kproxy.dataplane.ipvs.entries import (
    MH_PORT,
    PERSISTENT,
    AddressKey,
    Member,
    MemberKey,
    RealServer,
    RealServerKey,
    RuleKey,
    SetKey,
    VirtualServer,
    VirtualServerKey,
    is_shared,
)
from kproxy.dataplane.ipvs.names import set_name
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.sets import SETS
from kproxy.model import Endpoint, Family, FrontendKind, LocalDetector, Protocol
from tests.iptables.samples import LOCAL, REMOTE, routed, service_port
from tests.ipvs.samples import FACTS, FULL, bound, chains, cluster, everything, rendered, servers, sets

V4 = Family.IPv4
VIP = "10.96.0.30"
STOCK = Options(stock_local_fallback=True)

ALL_RULES = r"""
nat KUBE-SERVICES
  -s 127.0.0.0/8 -j RETURN
  -m comment --comment "Kubernetes service lb portal" -m set --match-set KUBE-LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
  ! -s 10.180.0.0/16 -m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
  -m comment --comment "Kubernetes service external ip + port for masquerade and filter purpose" -m set --match-set KUBE-EXTERNAL-IP dst,dst -j KUBE-MARK-MASQ
  -m comment --comment "Kubernetes service external ip + port for masquerade and filter purpose" -m set --match-set KUBE-EXTERNAL-IP dst,dst -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT
  -m comment --comment "Kubernetes service external ip + port for masquerade and filter purpose" -m set --match-set KUBE-EXTERNAL-IP dst,dst -m addrtype --dst-type LOCAL -j ACCEPT
  -m comment --comment "Kubernetes service external ip + port with externalTrafficPolicy=local" -m set --match-set KUBE-EXTERNAL-IP-LOCAL dst,dst -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT
  -m comment --comment "Kubernetes service external ip + port with externalTrafficPolicy=local" -m set --match-set KUBE-EXTERNAL-IP-LOCAL dst,dst -m addrtype --dst-type LOCAL -j ACCEPT
  -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
  -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
  -m set --match-set KUBE-LOAD-BALANCER dst,dst -j ACCEPT
nat KUBE-POSTROUTING
  -m comment --comment "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose" -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE
  -m mark ! --mark 0x4000/0x4000 -j RETURN
  -j MARK --set-xmark 0x4000/0x0
  -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
nat KUBE-NODE-PORT
  -p tcp -m comment --comment "Kubernetes nodeport TCP port with externalTrafficPolicy=local" -m set --match-set KUBE-NODE-PORT-LOCAL-TCP dst -j RETURN
  -p tcp -m comment --comment "Kubernetes nodeport TCP port for masquerade purpose" -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
  -p udp -m comment --comment "Kubernetes nodeport UDP port with externalTrafficPolicy=local" -m set --match-set KUBE-NODE-PORT-LOCAL-UDP dst -j RETURN
  -p udp -m comment --comment "Kubernetes nodeport UDP port for masquerade purpose" -m set --match-set KUBE-NODE-PORT-UDP dst -j KUBE-MARK-MASQ
  -p sctp -m comment --comment "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type \'hash ip:port\'" -m set --match-set KUBE-NODE-PORT-LOCAL-SCTP-HASH dst,dst -j RETURN
  -p sctp -m comment --comment "Kubernetes nodeport SCTP port for masquerade purpose with type \'hash ip:port\'" -m set --match-set KUBE-NODE-PORT-SCTP-HASH dst,dst -j KUBE-MARK-MASQ
nat KUBE-LOAD-BALANCER
  -m comment --comment "Kubernetes service load balancer ip + port with externalTrafficPolicy=local" -m set --match-set KUBE-LOAD-BALANCER-LOCAL dst,dst -j RETURN
  -j KUBE-MARK-MASQ
nat KUBE-MARK-MASQ
  -j MARK --set-xmark 0x4000/0x4000
filter KUBE-FORWARD
  -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
  -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter KUBE-NODE-PORT
  -m comment --comment "Kubernetes health check node port" -m set --match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j ACCEPT
filter KUBE-PROXY-FIREWALL
  -m comment --comment "Kubernetes service load balancer ip + port for load balancer with sourceRange" -m set --match-set KUBE-LOAD-BALANCER-FW dst,dst -j KUBE-SOURCE-RANGES-FIREWALL
filter KUBE-SOURCE-RANGES-FIREWALL
  -m comment --comment "Kubernetes service load balancer ip + port + source cidr for packet filter purpose" -m set --match-set KUBE-LOAD-BALANCER-SOURCE-CIDR dst,dst,src -j RETURN
  -m comment --comment "Kubernetes service load balancer ip + port + source IP for packet filter purpose" -m set --match-set KUBE-LOAD-BALANCER-SOURCE-IP dst,dst,src -j RETURN
  -j DROP
filter KUBE-IPVS-FILTER
  -m set --match-set KUBE-LOAD-BALANCER dst,dst -j RETURN
  -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
  -m set --match-set KUBE-EXTERNAL-IP dst,dst -j RETURN
  -m set --match-set KUBE-EXTERNAL-IP-LOCAL dst,dst -j RETURN
  -m set --match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j RETURN
  -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT --reject-with icmp-port-unreachable
filter KUBE-IPVS-OUT-FILTER
  -s 198.51.100.20/32 -m ipvs --vproto 6 --vaddr 198.51.100.20 --vport 80 -j DROP
  -s 198.51.100.21/32 -m ipvs --vproto 6 --vaddr 198.51.100.21 --vport 80 -j DROP
"""  # noqa: E501 - rules are one line each


def as_chains(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    chain = ""
    for line in text.strip().splitlines():
        if line.startswith("  "):
            found[chain].append(line.strip())
        else:
            chain = line
            found[chain] = []
    return found


def test_all_rules_that_there_can_be() -> None:
    assert chains(everything()) == as_chains(ALL_RULES)


def test_without_services_there_are_only_the_rules_that_always_are() -> None:
    rules = chains(cluster())

    assert rules["nat KUBE-SERVICES"] == ["-s 127.0.0.0/8 -j RETURN", "-m addrtype --dst-type LOCAL -j KUBE-NODE-PORT"]
    assert rules["nat KUBE-NODE-PORT"] == []
    assert rules["nat KUBE-LOAD-BALANCER"] == ["-j KUBE-MARK-MASQ"]
    assert rules["filter KUBE-PROXY-FIREWALL"] == []
    assert rules["filter KUBE-IPVS-OUT-FILTER"] == []
    assert len(rules["filter KUBE-IPVS-FILTER"]) == 6


def test_a_plain_service() -> None:
    entries = rendered(routed(service_port(), LOCAL, REMOTE))

    assert servers(entries) == {f"{VIP}:80/TCP": ["10.180.0.1:80", "10.180.1.1:80"]}
    assert entries[VirtualServerKey(V4, VIP, Protocol.TCP, 80)] == VirtualServer("rr")
    assert entries[RealServerKey(V4, VIP, Protocol.TCP, 80, "10.180.1.1", 80)] == RealServer(1)
    assert bound(entries) == {VIP}
    assert sets(entries) == {
        "KUBE-CLUSTER-IP": {f"{VIP},tcp:80"},
        "KUBE-IPVS-IPS": {VIP},
        "KUBE-LOOP-BACK": {"10.180.0.1,tcp:80,10.180.0.1"},
    }


def test_a_service_without_endpoints_has_a_virtual_server_that_refuses() -> None:
    assert servers(rendered(routed(service_port(node_port=30080)))) == {
        f"{VIP}:80/TCP": [],
        "192.0.2.1:30080/TCP": [],
        "192.0.2.2:30080/TCP": [],
    }


class TestAddresses:
    def test_all_but_node_ports_are_on_the_device(self) -> None:
        entries = rendered(routed(service_port(**FULL), LOCAL))

        assert bound(entries) == {VIP, "198.51.100.1", "198.51.100.10"} == sets(entries)["KUBE-IPVS-IPS"]
        assert set(servers(entries)) == {
            f"{VIP}:80/TCP",
            "198.51.100.1:80/TCP",
            "198.51.100.10:80/TCP",
            "192.0.2.1:30080/TCP",
            "192.0.2.2:30080/TCP",
        }

    @pytest.mark.parametrize("field", ["external_ips", "load_balancer_ips"])
    def test_one_that_the_node_has_elsewhere_is_served_but_stays_there(self, field: str) -> None:
        entries = rendered(routed(service_port(**{field: ("192.0.2.2",)}), LOCAL))

        assert servers(entries)["192.0.2.2:80/TCP"] == ["10.180.0.1:80"]
        assert bound(entries) == {VIP} == sets(entries)["KUBE-IPVS-IPS"]

    def test_node_ports_only_where_the_configuration_wants_them(self) -> None:
        facts = replace(FACTS, node_port_addresses={V4: ("192.0.2.2",)})

        entries = rendered(routed(service_port(node_port=30080), LOCAL), facts=facts)

        assert set(servers(entries)) == {f"{VIP}:80/TCP", "192.0.2.2:30080/TCP"}

    def test_without_an_address_for_node_ports_there_is_nothing_of_them_nor_of_health_checks(self) -> None:
        facts = replace(FACTS, node_port_addresses={V4: ()})

        entries = rendered(routed(service_port(node_port=30080, health_check_node_port=30999), LOCAL), facts=facts)

        assert set(servers(entries)) == {f"{VIP}:80/TCP"}
        assert set(sets(entries)) == {"KUBE-CLUSTER-IP", "KUBE-IPVS-IPS", "KUBE-LOOP-BACK"}

    def test_those_that_belong_to_another_service_are_left_to_it(self) -> None:
        port = service_port(**FULL)
        owned = tuple(
            (kind, frontend) for kind, frontend in routing.frontends(port) if kind is FrontendKind.LOAD_BALANCER
        )

        entries = rendered(replace(routed(port, REMOTE), frontends=owned))

        assert servers(entries) == {"198.51.100.10:80/TCP": ["10.180.1.1:80"]}
        assert bound(entries) == {"198.51.100.10"}
        assert sets(entries) == {"KUBE-LOAD-BALANCER": {"198.51.100.10,tcp:80"}, "KUBE-IPVS-IPS": {"198.51.100.10"}}

    def test_one_that_is_named_twice_has_one_virtual_server_and_is_in_both_sets(self) -> None:
        port = service_port(external_ips=("198.51.100.1",), load_balancer_ips=("198.51.100.1",))

        entries = rendered(routed(port, LOCAL))

        assert servers(entries)["198.51.100.1:80/TCP"] == ["10.180.0.1:80"]
        assert sets(entries)["KUBE-EXTERNAL-IP"] == sets(entries)["KUBE-LOAD-BALANCER"] == {"198.51.100.1,tcp:80"}

    def test_the_cluster_ip_as_external_ip_keeps_to_the_internal_policy(self) -> None:
        port = service_port(external_ips=(VIP,), internal_local=True)

        assert servers(rendered(routed(port, LOCAL, REMOTE))) == {f"{VIP}:80/TCP": ["10.180.0.1:80"]}


class TestTrafficPolicyLocal:
    outside = ("198.51.100.1:80/TCP", "198.51.100.10:80/TCP", "192.0.2.1:30080/TCP", "192.0.2.2:30080/TCP")

    def test_external_with_an_endpoint_here(self) -> None:
        found = servers(rendered(routed(service_port(external_local=True, **FULL), LOCAL, REMOTE)))

        assert found[f"{VIP}:80/TCP"] == ["10.180.0.1:80", "10.180.1.1:80"]
        assert {name: found[name] for name in self.outside} == {name: ["10.180.0.1:80"] for name in self.outside}

    def test_external_without_an_endpoint_here_has_no_real_server(self) -> None:
        found = servers(rendered(routed(service_port(external_local=True, **FULL), REMOTE)))

        assert found[f"{VIP}:80/TCP"] == ["10.180.1.1:80"]
        assert {name: found[name] for name in self.outside} == {name: [] for name in self.outside}

    def test_external_without_an_endpoint_here_as_kube_proxy_does(self) -> None:
        found = servers(rendered(routed(service_port(external_local=True, **FULL), REMOTE), options=STOCK))

        assert {name: found[name] for name in self.outside} == {name: ["10.180.1.1:80"] for name in self.outside}

    def test_internal_with_an_endpoint_here(self) -> None:
        found = servers(rendered(routed(service_port(internal_local=True, node_port=30080), LOCAL, REMOTE)))

        assert found[f"{VIP}:80/TCP"] == ["10.180.0.1:80"]
        assert found["192.0.2.1:30080/TCP"] == ["10.180.0.1:80", "10.180.1.1:80"]

    @pytest.mark.parametrize("options", [Options(), STOCK], ids=["kproxy", "kube-proxy"])
    def test_internal_without_an_endpoint_here_has_no_real_server(self, options: Options) -> None:
        entries = rendered(routed(service_port(internal_local=True), REMOTE), options=options)

        assert servers(entries) == {f"{VIP}:80/TCP": []}

    def test_its_addresses_are_not_masqueraded(self) -> None:
        found = sets(rendered(routed(service_port(external_local=True, **FULL), LOCAL)))

        assert found["KUBE-EXTERNAL-IP-LOCAL"] == {"198.51.100.1,tcp:80"}
        assert "KUBE-EXTERNAL-IP" not in found
        assert found["KUBE-LOAD-BALANCER"] == found["KUBE-LOAD-BALANCER-LOCAL"] == {"198.51.100.10,tcp:80"}
        assert found["KUBE-NODE-PORT-TCP"] == found["KUBE-NODE-PORT-LOCAL-TCP"] == {"30080"}


@pytest.mark.parametrize(
    ("scheduler", "affinity", "wanted"),
    [
        ("", 0, VirtualServer("rr", 0, 0)),
        ("lc", 10800, VirtualServer("lc", PERSISTENT, 10800)),
        ("mh", 0, VirtualServer("mh", MH_PORT, 0)),
        ("mh", 60, VirtualServer("mh", MH_PORT | PERSISTENT, 60)),
    ],
)
def test_how_virtual_servers_choose(scheduler: str, affinity: int, wanted: VirtualServer) -> None:
    route = routed(service_port(affinity_seconds=affinity, **FULL), LOCAL)

    entries = rendered(route, options=Options(scheduler=scheduler))

    assert [value for key, value in entries.items() if isinstance(key, VirtualServerKey)] == [wanted] * 5


def test_who_reaches_itself_is_masqueraded_whatever_the_endpoints_condition() -> None:
    endpoints = [
        Endpoint("10.180.0.1", 80, local=True),
        Endpoint("10.180.0.2", 81, local=True, ready=False),
        Endpoint("10.180.0.3", 80, local=True, ready=False, serving=False, terminating=True),
        Endpoint("10.180.1.1", 80),
    ]

    entries = rendered(routed(service_port(protocol=Protocol.UDP), *endpoints))

    assert servers(entries) == {f"{VIP}:80/UDP": ["10.180.0.1:80", "10.180.1.1:80"]}
    assert sets(entries)["KUBE-LOOP-BACK"] == {
        "10.180.0.1,udp:80,10.180.0.1",
        "10.180.0.2,udp:81,10.180.0.2",
        "10.180.0.3,udp:80,10.180.0.3",
    }


def test_sctp_node_ports_are_kept_with_their_addresses() -> None:
    found = sets(rendered(routed(service_port(protocol=Protocol.SCTP, node_port=30080, external_local=True), LOCAL)))

    members = {"192.0.2.1,sctp:30080", "192.0.2.2,sctp:30080"}
    assert found["KUBE-NODE-PORT-SCTP-HASH"] == found["KUBE-NODE-PORT-LOCAL-SCTP-HASH"] == members


def test_health_check_ports_are_open() -> None:
    port = service_port(health_check_node_port=30999, external_local=True, **FULL)

    assert sets(rendered(routed(port)))["KUBE-HEALTH-CHECK-NODE-PORT"] == {"30999"}


class TestSourceRanges:
    def test_the_node_is_allowed_if_its_own_address_is(self) -> None:
        port = service_port(load_balancer_ips=("198.51.100.10",), source_ranges=("203.0.113.0/24", "192.0.2.1/32"))

        entries = rendered(routed(port, LOCAL))

        found = sets(entries)
        assert found["KUBE-LOAD-BALANCER-FW"] == {"198.51.100.10,tcp:80"}
        assert found["KUBE-LOAD-BALANCER-SOURCE-CIDR"] == {
            "198.51.100.10,tcp:80,203.0.113.0/24",
            "198.51.100.10,tcp:80,192.0.2.1/32",
        }
        assert found["KUBE-LOAD-BALANCER-SOURCE-IP"] == {"198.51.100.10,tcp:80,198.51.100.10"}
        assert "filter KUBE-IPVS-OUT-FILTER" not in chains(entries)

    def test_otherwise_the_node_is_barred_too(self) -> None:
        port = service_port(load_balancer_ips=("198.51.100.10",), source_ranges=("203.0.113.0/24",))

        entries = rendered(routed(port, LOCAL))

        assert "KUBE-LOAD-BALANCER-SOURCE-IP" not in sets(entries)
        assert chains(entries)["filter KUBE-IPVS-OUT-FILTER"] == [
            "-s 198.51.100.10/32 -m ipvs --vproto 6 --vaddr 198.51.100.10 --vport 80 -j DROP"
        ]

    def test_they_are_for_load_balancers_only(self) -> None:
        port = service_port(node_port=30080, external_ips=("198.51.100.1",), source_ranges=("203.0.113.0/24",))

        assert not any("SOURCE" in name or name.endswith("-FW") for name in sets(rendered(routed(port, LOCAL))))


CLUSTER_IPS = '-m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" -m set --match-set'


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"masquerade_all": True}, f"{CLUSTER_IPS} KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ"),
        ({}, f"! -s 10.180.0.0/16 {CLUSTER_IPS} KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ"),
        ({"detectors": {}}, f"{CLUSTER_IPS} KUBE-CLUSTER-IP src,dst -j KUBE-MARK-MASQ"),
        (
            {"detectors": {V4: LocalDetector(interface="cni0")}},
            f"! -i cni0 {CLUSTER_IPS} KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ",
        ),
        (
            {"detectors": {V4: LocalDetector(interface_prefix="veth")}},
            f"! -i veth+ {CLUSTER_IPS} KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ",
        ),
    ],
)
def test_who_is_masqueraded_on_the_way_to_cluster_ips(settings: dict[str, object], rule: str) -> None:
    entries = cluster(routed(service_port(), LOCAL), facts=replace(FACTS, **settings))

    assert chains(entries)["nat KUBE-SERVICES"][1] == rule


def test_another_mark_and_no_random_ports() -> None:
    rules = chains(cluster(facts=replace(FACTS, masquerade_bit=20), options=Options(random_fully=False)))

    assert rules["nat KUBE-MARK-MASQ"] == ["-j MARK --set-xmark 0x100000/0x100000"]
    assert rules["nat KUBE-POSTROUTING"] == [
        "-m mark ! --mark 0x100000/0x100000 -j RETURN",
        "-j MARK --set-xmark 0x100000/0x0",
        '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE',
    ]
    assert "0x100000/0x100000" in rules["filter KUBE-FORWARD"][0]


class TestIPv6:
    def test_sets_have_names_of_their_own(self) -> None:
        found = {set_name(name, Family.IPv6) for name in SETS}

        assert len(found) == len(SETS)
        assert found.isdisjoint(SETS)
        assert {"KUBE-6-CLUSTER-IP", "KUBE-6-LOAD-BALANCER-SOURCE-CID", "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS"} <= found
        assert max(map(len, found)) == 31
        assert {key.name for key in cluster() if isinstance(key, SetKey)} == found | set(SETS)

    def test_a_service(self) -> None:
        pod = Endpoint("fd00:10::1", 8080, local=True)
        port = service_port(
            family=Family.IPv6,
            load_balancer_ips=("2001:db8:1::10",),
            source_ranges=("2001:db8:2::/48",),
            node_port=30080,
        )

        entries = cluster(routed(port, pod))

        assert servers(entries) == {
            "[fd00:96::30]:80/TCP": ["[fd00:10::1]:8080"],
            "[2001:db8:1::10]:80/TCP": ["[fd00:10::1]:8080"],
            "[2001:db8::1]:30080/TCP": ["[fd00:10::1]:8080"],
        }
        found = sets(entries)
        assert found["KUBE-6-LOOP-BACK"] == {"fd00:10::1,tcp:8080,fd00:10::1"}
        assert found["KUBE-6-LOAD-BALANCER-SOURCE-CID"] == {"2001:db8:1::10,tcp:80,2001:db8:2::/48"}
        assert all(name.startswith("KUBE-6-") for name in found)
        rules = chains(entries, Family.IPv6)
        assert rules["nat KUBE-SERVICES"][0] == "-s ::1/128 -j RETURN"
        assert rules["filter KUBE-IPVS-FILTER"][-1].endswith(
            "--match-set KUBE-6-IPVS-IPS dst -j REJECT --reject-with icmp6-port-unreachable"
        )
        assert rules["filter KUBE-IPVS-OUT-FILTER"] == [
            "-s 2001:db8:1::10/128 -m ipvs --vproto 6 --vaddr 2001:db8:1::10 --vport 80 -j DROP"
        ]


def test_what_services_have_in_common_is_shared_and_nothing_else() -> None:
    common = {"external_ips": ("198.51.100.1",), "health_check_node_port": 30999, "external_local": True}
    one = routed(service_port("one", cluster_ip="10.96.0.1", **common), LOCAL)
    other = replace(service_port("other", cluster_ip="10.96.0.2", **common), port=81)

    first, second = rendered(one), rendered(routed(other, LOCAL))

    both = first.keys() & second.keys()
    assert {type(key) for key in both} == {AddressKey, MemberKey, RuleKey}
    assert all(is_shared(key) and first[key] == second[key] for key in both)
    assert {key for key in first.keys() - both if is_shared(key)} == {
        AddressKey(V4, "10.96.0.1"),
        MemberKey("KUBE-IPVS-IPS", Member("10.96.0.1")),
        VirtualServerKey(V4, "10.96.0.1", Protocol.TCP, 80),
        VirtualServerKey(V4, "198.51.100.1", Protocol.TCP, 80),
        *(key for key in first if isinstance(key, RealServerKey)),
    }


def test_one_endpoint_more_is_one_real_server_more() -> None:
    before = cluster(routed(service_port(**FULL, external_local=True), LOCAL))
    after = cluster(routed(service_port(**FULL, external_local=True), LOCAL, REMOTE))

    assert [change.key for change in diff(after, before)] == [
        RealServerKey(V4, VIP, Protocol.TCP, 80, "10.180.1.1", 80)
    ]
