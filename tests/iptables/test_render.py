"""The rules of every sort of service, as kube-proxy writes them (reference: sections 4.1.5, 4.1.6 and 4.1.9)."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kproxy.dataplane.base import diff
from kproxy.dataplane.iptables.accounting import ensure_counters
from kproxy.dataplane.iptables.entries import entries_of
from kproxy.dataplane.iptables.localhost import ROUTE_LOCALNET
from kproxy.dataplane.iptables.options import INVALID_DROPPED, LOCALHOST_ACCEPTED, Options
from kproxy.model import Endpoint, Family, LocalDetector, Protocol
from tests.iptables.samples import FACTS, LOCAL, REMOTE, base, cluster, routed, service_port, written
from tests.iptables.tables import laid_out, read_tables, restore_text
from tests.lab.namespaces import Namespace

NAME = "XPGD46QRK7WJZT7O"
SVC, SVL, EXT, FW = (f"nat KUBE-{kind}-{NAME}" for kind in ("SVC", "SVL", "EXT", "FW"))
SEP_LOCAL, SEP_REMOTE = "KUBE-SEP-SXIVWICOYRO3J4NJ", "KUBE-SEP-TOIS5JUHRKSSXDL7"
TAIL = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"

WORKED_EXAMPLE = f"""
*filter
-A KUBE-NODEPORTS -p tcp -m comment --comment "ns1/svc1:p80 health check node port" -m tcp --dport 30999 -j ACCEPT
-A KUBE-PROXY-FIREWALL -d 192.0.2.10/32 -p tcp -m comment --comment "ns1/svc1:p80 traffic not accepted by KUBE-FW-{NAME}" -m tcp --dport 80 -j DROP
*nat
-A KUBE-SERVICES -d 10.96.0.30/32 -p tcp -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-SVC-{NAME}
-A KUBE-SERVICES -d 192.0.2.10/32 -p tcp -m comment --comment "ns1/svc1:p80 loadbalancer IP" -m tcp --dport 80 -j KUBE-FW-{NAME}
-A KUBE-NODEPORTS -p tcp -m comment --comment "ns1/svc1:p80" -m tcp --dport 30080 -j KUBE-EXT-{NAME}
-A KUBE-FW-{NAME} -s 203.0.113.0/24 -m comment --comment "ns1/svc1:p80 loadbalancer IP" -j KUBE-EXT-{NAME}
-A KUBE-FW-{NAME} -m comment --comment "other traffic to ns1/svc1:p80 will be dropped by KUBE-PROXY-FIREWALL"
-A KUBE-EXT-{NAME} -s 10.180.0.0/16 -m comment --comment "pod traffic for ns1/svc1:p80 external destinations" -j KUBE-SVC-{NAME}
-A KUBE-EXT-{NAME} -m comment --comment "masquerade LOCAL traffic for ns1/svc1:p80 external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-{NAME} -m comment --comment "route LOCAL traffic for ns1/svc1:p80 external destinations" -m addrtype --src-type LOCAL -j KUBE-SVC-{NAME}
-A KUBE-EXT-{NAME} -j KUBE-SVL-{NAME}
-A KUBE-SVC-{NAME} ! -s 10.180.0.0/16 -d 10.96.0.30/32 -p tcp -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-{NAME} -m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-SXIVWICOYRO3J4NJ
-A KUBE-SVC-{NAME} -m comment --comment "ns1/svc1:p80 -> 10.180.1.1:80" -j KUBE-SEP-TOIS5JUHRKSSXDL7
-A KUBE-SVL-{NAME} -m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j KUBE-SEP-SXIVWICOYRO3J4NJ
-A KUBE-SEP-SXIVWICOYRO3J4NJ -s 10.180.0.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ
-A KUBE-SEP-SXIVWICOYRO3J4NJ -p tcp -m comment --comment "ns1/svc1:p80" -m tcp -j DNAT --to-destination 10.180.0.1:80
-A KUBE-SEP-TOIS5JUHRKSSXDL7 -s 10.180.1.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ
-A KUBE-SEP-TOIS5JUHRKSSXDL7 -p tcp -m comment --comment "ns1/svc1:p80" -m tcp -j DNAT --to-destination 10.180.1.1:80
"""  # noqa: E501 - rules are one line each

HOOKS = """
*filter
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
*nat
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
"""  # noqa: E501

FULL = {
    "node_port": 30080,
    "load_balancer_ips": ("192.0.2.10",),
    "external_ips": ("198.51.100.1",),
}


def as_written(text: str) -> dict[str, list[str]]:
    tables = read_tables(text.splitlines(), Family.IPv4)
    return {f"{t} {c}": list(map(str, rules)) for t, chains in tables.items() for c, rules in chains.items()}


def test_worked_example() -> None:
    port = service_port(
        node_port=30080,
        load_balancer_ips=("192.0.2.10",),
        source_ranges=("203.0.113.0/24",),
        external_local=True,
        health_check_node_port=30999,
    )

    assert written(port, LOCAL, REMOTE) == as_written(WORKED_EXAMPLE)


def test_jumps_from_the_built_in_chains_of_an_empty_host() -> None:
    rules = base()

    expected = as_written(HOOKS)
    assert {chain: rules[chain] for chain in expected} == expected


class TestFixedRules:
    def test_masquerade_and_forward(self) -> None:
        rules = base(replace(FACTS, masquerade_bit=20))

        assert rules["nat KUBE-MARK-MASQ"] == ["-j MARK --set-xmark 0x100000/0x100000"]
        assert rules["nat KUBE-POSTROUTING"] == [
            "-m mark ! --mark 0x100000/0x100000 -j RETURN",
            "-j MARK --set-xmark 0x100000/0x0",
            '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
        ]
        assert rules["filter KUBE-FORWARD"] == [
            "-m conntrack --ctstate INVALID -j DROP",
            '-m comment --comment "kubernetes forwarding rules" -m mark --mark 0x100000/0x100000 -j ACCEPT',
            (
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
            ),
        ]

    def test_old_iptables_cannot_choose_ports_at_random(self) -> None:
        assert base(options=Options(random_fully=False))["nat KUBE-POSTROUTING"][-1].endswith("-j MASQUERADE")

    def test_packets_out_of_window_are_let_through_if_conntrack_is_liberal(self) -> None:
        assert "INVALID" not in str(base(options=Options(drop_invalid=False)))

    def test_dropped_packets_are_counted_where_the_kernel_can(self) -> None:
        rules = base(options=Options(counters=frozenset({INVALID_DROPPED})))

        assert rules["filter KUBE-FORWARD"][0] == (
            f"-m conntrack --ctstate INVALID -m nfacct --nfacct-name  {INVALID_DROPPED} -j DROP"
        )

    @pytest.mark.parametrize(
        ("family", "addresses", "localhost", "expected"),
        [
            (Family.IPv4, None, True, [("", " -m addrtype --dst-type LOCAL")]),
            (Family.IPv4, None, False, [("! -d 127.0.0.0/8 ", " -m addrtype --dst-type LOCAL")]),
            (Family.IPv6, None, True, [("! -d ::1/128 ", " -m addrtype --dst-type LOCAL")]),
            (Family.IPv4, ("127.0.0.1", "192.0.2.1"), True, [("-d 127.0.0.1/32 ", ""), ("-d 192.0.2.1/32 ", "")]),
            (Family.IPv4, ("127.0.0.1", "192.0.2.1"), False, [("-d 192.0.2.1/32 ", "")]),
            (Family.IPv6, ("::1", "2001:db8::1"), True, [("-d 2001:db8::1/128 ", "")]),
            (Family.IPv4, (), False, []),
        ],
    )
    def test_addresses_with_node_ports(
        self, family: Family, addresses: tuple[str, ...] | None, localhost: bool, expected: list[tuple[str, str]]
    ) -> None:
        facts = replace(FACTS, families=(family,), node_port_addresses={family: addresses})

        rules = base(facts, Options(localhost_node_ports=localhost)).get("nat KUBE-SERVICES", [])

        assert rules == [f'{head}-m comment --comment "{TAIL}"{tail} -j KUBE-NODEPORTS' for head, tail in expected]

    def test_neighbours_are_kept_from_localhost_while_it_is_routed(self) -> None:
        both = replace(FACTS, families=(Family.IPv4, Family.IPv6))
        guard = (
            '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
            " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
        )

        assert base(both, Options(localhost_node_ports=True))["filter KUBE-FIREWALL"] == [guard]
        assert "filter KUBE-FIREWALL" not in base(both)


class TestEndpointsElsewhereOrNowhere:
    @pytest.mark.parametrize(
        ("family", "reply"), [(Family.IPv4, "icmp-port-unreachable"), (Family.IPv6, "icmp6-port-unreachable")]
    )
    def test_a_service_without_endpoints_rejects(self, family: Family, reply: str) -> None:
        vip, external = ("192.0.2.10", "198.51.100.1") if family is Family.IPv4 else ("2001:db8::10", "2001:db8:1::1")
        port = service_port(
            family=family,
            node_port=30080,
            load_balancer_ips=(vip,),
            external_ips=(external,),
            source_ranges=("203.0.113.0/24",),
        )
        end = f"-m tcp --dport 80 -j REJECT --reject-with {reply}"
        comment = '-m comment --comment "ns1/svc1:p80 has no endpoints"'

        rules = written(port)

        assert rules == {
            "filter KUBE-SERVICES": [f"-d {port.cluster_ip}/{family.bits} -p tcp {comment} {end}"],
            "filter KUBE-EXTERNAL-SERVICES": [
                f"-d {external}/{family.bits} -p tcp {comment} {end}",
                f"-d {vip}/{family.bits} -p tcp {comment} {end}",
                f"-p tcp {comment} -m addrtype --dst-type LOCAL {end.replace('80', '30080', 1)}",
            ],
        }

    def test_internal_policy_local_without_endpoints_here_drops(self) -> None:
        rules = written(service_port(internal_local=True), REMOTE)

        assert rules == {
            "filter KUBE-SERVICES": [
                (
                    '-d 10.96.0.30/32 -p tcp -m comment --comment "ns1/svc1:p80 has no local endpoints"'
                    " -m tcp --dport 80 -j DROP"
                )
            ]
        }

    def test_internal_policy_local_balances_over_endpoints_here(self) -> None:
        rules = written(service_port(internal_local=True), LOCAL, REMOTE)

        assert rules["nat KUBE-SERVICES"][0].endswith(f"-j KUBE-SVL-{NAME}")
        assert [rule.split(" -j ")[1] for rule in rules[SVL]] == ["KUBE-MARK-MASQ", SEP_LOCAL]
        assert SVC not in rules
        assert f"nat {SEP_REMOTE}" not in rules

    def test_external_policy_local_without_endpoints_here_serves_pods_and_the_node_only(self) -> None:
        rules = written(service_port(external_local=True, **FULL), REMOTE)

        assert [rule.split(" -j ")[1] for rule in rules[EXT]] == [
            f"KUBE-SVC-{NAME}",
            "KUBE-MARK-MASQ",
            f"KUBE-SVC-{NAME}",
        ]
        assert len(rules["filter KUBE-EXTERNAL-SERVICES"]) == 3
        assert all(
            r.endswith("-j DROP") and "has no local endpoints" in r for r in rules["filter KUBE-EXTERNAL-SERVICES"]
        )
        assert [rule.split(" -j ")[1] for rule in rules["nat KUBE-SERVICES"]] == [
            f"KUBE-SVC-{NAME}",
            f"KUBE-EXT-{NAME}",
            f"KUBE-EXT-{NAME}",
        ]

    def test_health_checks_are_let_in_even_then(self) -> None:
        rules = written(service_port(protocol=Protocol.UDP, external_local=True, health_check_node_port=30999, **FULL))

        assert rules["filter KUBE-NODEPORTS"] == [
            '-p tcp -m comment --comment "ns1/svc1:p80 health check node port" -m tcp --dport 30999 -j ACCEPT'
        ]

    def test_endpoints_here_that_hints_exclude_still_serve_local_traffic(self) -> None:
        hinted = [replace(LOCAL, node_hints=("other",)), replace(REMOTE, node_hints=("node",))]

        rules = written(service_port(external_local=True, **FULL), *hinted)

        assert [rule.split(" -j ")[1] for rule in rules[SVC]] == ["KUBE-MARK-MASQ", SEP_REMOTE]
        assert [rule.split(" -j ")[1] for rule in rules[SVL]] == [SEP_LOCAL]
        assert {f"nat {SEP_LOCAL}", f"nat {SEP_REMOTE}"} <= rules.keys()


class TestMasquerade:
    @pytest.mark.parametrize(
        ("detector", "match"),
        [
            (LocalDetector(cidr="10.0.0.0/8"), "-s 10.0.0.0/8"),
            (LocalDetector(interface="cni0"), "-i cni0"),
            (LocalDetector(interface_prefix="cali"), "-i cali+"),
        ],
    )
    def test_pods_are_recognised_by_source_or_interface(self, detector: LocalDetector, match: str) -> None:
        facts = replace(FACTS, detectors={Family.IPv4: detector})

        rules = written(service_port(external_local=True, **FULL), LOCAL, facts=facts)

        assert rules[SVC][0].startswith("! " + match if "-s" in match else "-d 10.96.0.30/32 ! " + match)
        assert rules[EXT][0] == (
            f'{match} -m comment --comment "pod traffic for ns1/svc1:p80 external destinations" -j KUBE-SVC-{NAME}'
        )

    def test_without_a_way_to_recognise_pods_cluster_addresses_are_not_masqueraded(self) -> None:
        rules = written(service_port(external_local=True, **FULL), LOCAL, facts=replace(FACTS, detectors={}))

        assert rules[SVC] == [f'-m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j {SEP_LOCAL}']
        assert "pod traffic" not in str(rules[EXT])

    def test_masquerade_all_is_for_everyone(self) -> None:
        rules = written(service_port(), LOCAL, facts=replace(FACTS, masquerade_all=True))

        assert rules[SVC][0] == (
            '-d 10.96.0.30/32 -p tcp -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ'
        )

    def test_external_traffic_that_may_leave_the_node(self) -> None:
        rules = written(service_port(**FULL), REMOTE)

        assert rules[EXT] == [
            '-m comment --comment "masquerade traffic for ns1/svc1:p80 external destinations" -j KUBE-MARK-MASQ',
            f"-j KUBE-SVC-{NAME}",
        ]


class TestLoadBalancer:
    def test_what_a_node_within_the_source_ranges_may_its_load_balancer_address_may_too(self) -> None:
        port = service_port(source_ranges=("203.0.113.0/24", "192.0.2.0/24"), **FULL)

        rules = written(port, LOCAL)

        comment = '-m comment --comment "ns1/svc1:p80 loadbalancer IP"'
        assert rules[FW] == [
            f"-s 203.0.113.0/24 {comment} -j KUBE-EXT-{NAME}",
            f"-s 192.0.2.0/24 {comment} -j KUBE-EXT-{NAME}",
            f"-s 192.0.2.10/32 {comment} -j KUBE-EXT-{NAME}",
            '-m comment --comment "other traffic to ns1/svc1:p80 will be dropped by KUBE-PROXY-FIREWALL"',
        ]

    def test_order_of_addresses(self) -> None:
        rules = written(service_port(**FULL), LOCAL)

        assert [rule.split()[1] for rule in rules["nat KUBE-SERVICES"]] == [
            "10.96.0.30/32",
            "198.51.100.1/32",
            "192.0.2.10/32",
        ]

    def test_an_address_that_another_service_has_is_left_to_it(self) -> None:
        route = routed(service_port(**FULL), LOCAL)
        owned = tuple((kind, frontend) for kind, frontend in route.frontends if frontend.address != "198.51.100.1")

        entries = cluster(replace(route, frontends=owned))

        assert "198.51.100.1" not in restore_text(laid_out(entries))


class TestNodePort:
    def test_node_ports_on_localhost_are_counted_where_the_kernel_can(self) -> None:
        options = Options(localhost_node_ports=True, counters=frozenset({LOCALHOST_ACCEPTED}))

        rules = written(service_port(node_port=30080), LOCAL, options=options)

        assert rules["nat KUBE-NODEPORTS"] == [
            (
                '-d 127.0.0.0/8 -p tcp -m comment --comment "ns1/svc1:p80" -m tcp --dport 30080'
                f" -m nfacct --nfacct-name  {LOCALHOST_ACCEPTED} -j KUBE-EXT-{NAME}"
            ),
            f'-p tcp -m comment --comment "ns1/svc1:p80" -m tcp --dport 30080 -j KUBE-EXT-{NAME}',
        ]

    @pytest.mark.parametrize(
        "options",
        [Options(localhost_node_ports=True), Options(counters=frozenset({LOCALHOST_ACCEPTED}))],
        ids=["no counter", "not on localhost"],
    )
    def test_else_one_rule_is_enough(self, options: Options) -> None:
        assert len(written(service_port(node_port=30080), LOCAL, options=options)["nat KUBE-NODEPORTS"]) == 1


class TestAffinity:
    def test_known_clients_come_first(self) -> None:
        rules = written(service_port(affinity_seconds=10800), LOCAL, REMOTE)

        def known(endpoint: Endpoint, chain: str) -> str:
            return (
                f'-m comment --comment "ns1/svc1:p80 -> {endpoint}" -m recent --rcheck --seconds 10800 --reap'
                f" --name {chain} --mask 255.255.255.255 --rsource -j {chain}"
            )

        assert rules[SVC][1:3] == [known(LOCAL, SEP_LOCAL), known(REMOTE, SEP_REMOTE)]
        assert len(rules[SVC]) == 5

    def test_an_endpoint_notes_its_clients(self) -> None:
        rules = written(service_port(affinity_seconds=10800), LOCAL)

        assert rules[f"nat {SEP_LOCAL}"][1] == (
            f'-p tcp -m comment --comment "ns1/svc1:p80" -m recent --set --name {SEP_LOCAL} --mask 255.255.255.255'
            " --rsource -m tcp -j DNAT --to-destination 10.180.0.1:80"
        )


def test_in_large_clusters_endpoints_have_no_comments_and_all_else_has() -> None:
    port = service_port(affinity_seconds=60, **FULL)
    small = written(port, LOCAL, REMOTE)

    large = written(port, LOCAL, REMOTE, options=Options(large_clusters=frozenset({Family.IPv4})))

    assert large[SVC][1:] == [
        f"-m recent --rcheck --seconds 60 --reap --name {SEP_LOCAL} --mask 255.255.255.255 --rsource -j {SEP_LOCAL}",
        f"-m recent --rcheck --seconds 60 --reap --name {SEP_REMOTE} --mask 255.255.255.255 --rsource -j {SEP_REMOTE}",
        f"-m statistic --mode random --probability 0.50000000000 -j {SEP_LOCAL}",
        f"-j {SEP_REMOTE}",
    ]
    assert large[f"nat {SEP_LOCAL}"] == [
        "-s 10.180.0.1/32 -j KUBE-MARK-MASQ",
        (
            f"-p tcp -m recent --set --name {SEP_LOCAL} --mask 255.255.255.255 --rsource -m tcp"
            " -j DNAT --to-destination 10.180.0.1:80"
        ),
    ]
    assert large[SVC][0] == small[SVC][0]
    for chain in ("nat KUBE-SERVICES", "nat KUBE-NODEPORTS", EXT):
        assert large[chain] == small[chain]


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_kernel_takes_all_of_it_and_shows_no_difference(
    variant: str, family: Family, protocol: Protocol, netns: Namespace
) -> None:
    four = family is Family.IPv4
    facts = replace(FACTS, families=(family,))
    options = Options(localhost_node_ports=True, counters=frozenset({INVALID_DROPPED, LOCALHOST_ACCEPTED}))
    pods = ["10.180.0.1", "10.180.1.1", "10.180.2.1"] if four else ["fd00:10::1", "fd00:10::1:1", "fd00:10::2:1"]
    endpoints = [Endpoint(pod, 80, local=number == 0) for number, pod in enumerate(pods)]
    settings = {
        "family": family,
        "protocol": protocol,
        "load_balancer_ips": ("192.0.2.10" if four else "2001:db8::10",),
        "external_ips": ("198.51.100.1" if four else "2001:db8:1::1",),
        "source_ranges": ("192.0.2.0/24" if four else "2001:db8::/64",),
        "affinity_seconds": 10800,
        "health_check_node_port": 30999,
    }
    entries = cluster(
        routed(service_port("everywhere", node_port=30080, **settings), *endpoints),
        routed(service_port("here", node_port=30081, external_local=True, **settings), *endpoints),
        routed(service_port("inside", node_port=30082, internal_local=True, **settings), *endpoints[1:]),
        routed(service_port("nowhere", node_port=30083, **settings)),
        facts=facts,
        options=options,
    )
    command = f"{'iptables' if four else 'ip6tables'}-{variant}"
    netns.run(ensure_counters, tuple(options.counters))

    netns.command(f"{command}-restore", stdin=restore_text(laid_out(entries)))

    found = read_tables(netns.command(f"{command}-save").stdout.splitlines(), family)
    entries.pop(ROUTE_LOCALNET, None)  # no rule
    assert diff(entries, entries_of(family, found, guards_localhost=four)) == []
