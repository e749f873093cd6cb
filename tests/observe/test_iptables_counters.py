"""Connection counters in iptables mode: real packets through real rules, in both variants of iptables."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.names import hash16
from kproxy.metrics.connections import ConnectionCounters
from kproxy.metrics.families import Registry
from kproxy.model import Family, Protocol
from kproxy.traffic import RuleTraffic
from tests.lab import scenario as scenarios
from tests.lab.flows import Fate, Flow, Origin
from tests.lab.namespaces import Namespace
from tests.lab.packets import Lab
from tests.lab.proxy import HINT, InProcess
from tests.lab.scenario import USUAL, Objects
from tests.lab.waiting import eventually
from tests.observe.clock import Clock
from tests.reconcile.objects import endpoints, service
from tests.reconcile.one_node import OneNode

VIP, EXTERNAL, OTHER_EXTERNAL, NODE_IP = "172.30.0.41", "192.0.2.41", "192.0.2.42", "192.168.0.2"
HTTP = {"name": "http", "port": 80, "targetPort": 8080}
WEB = {"clusterIP": VIP, "ports": [HTTP]}
ONE, TWO, THREE = "10.0.1.1", "10.0.1.2", "10.0.1.3"
SERVICES, ENDPOINTS = "kproxy_service_connections_total", "kproxy_endpoint_connections_total"
SOURCES = {Origin.POD: "10.0.0.2", Origin.OUTSIDE: "203.0.113.9", Origin.NODE: NODE_IP}


def slice_of(name: str, *addresses: str) -> dict[str, Any]:
    return {"service": name, "ports": [{"name": "http", "port": 8080}], "endpoints": list(addresses)}


class Node:
    """A node that kproxy serves in iptables mode, and a scrape of its connection counters."""

    def __init__(self, lab: Lab, variant: Variant) -> None:
        self.lab = lab
        self.variant = variant
        self.proxy = InProcess(
            lab.netns, {"mode": "iptables", "hostnameOverride": "here", **USUAL.config}, variant=variant
        )
        self.registry = Registry()
        self.clock = Clock()
        traffic = RuleTraffic(variant, tuple(Family), self.proxy.state.owner, self.clock.monotonic)
        ConnectionCounters(self.registry, lambda: lab.netns.run(traffic.readings), 5000)
        self.proxy.apply(*scenarios.surroundings(USUAL))

    def given(self, services: dict[str, Any], slices: dict[str, Any]) -> None:
        """Objects are created or replaced, and the rules follow."""
        self.proxy.apply(*scenarios.items(Objects(services=services, slices=slices), Family.IPv4))
        self.proxy.sync()

    def connect(
        self, count: int, to: str = VIP, port: int = 80, origin: Origin = Origin.POD, source: str = ""
    ) -> Counter[str]:
        """Make TCP connections; how many each endpoint got, "" for those that came nowhere."""
        flow = Flow(origin, source or SOURCES[origin], to, port, Protocol.TCP)
        outcomes = self.lab.send_many([flow] * count)
        return Counter(f"{o.destination}:{o.port}" if o.fate is Fate.FORWARDED else "" for o in outcomes)

    def scrape(self) -> tuple[dict[str, float], dict[str, float]]:
        """The connections of frontends and of endpoints."""
        shown: dict[str, dict[str, float]] = {SERVICES: {}, ENDPOINTS: {}}
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                if sample.name in shown:
                    labels = sample.labels
                    at = labels.get("frontend") or labels["endpoint"]
                    shown[sample.name][f"{labels['service']} {at}"] = sample.value
        return shown[SERVICES], shown[ENDPOINTS]

    def iptables(self, *arguments: str) -> None:
        """Somebody else uses iptables."""
        self.lab.netns.command(f"iptables-{self.variant}", "--wait", *arguments)


@pytest.fixture(params=list(Variant))
def node(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Iterator[Node]:
    made = Node(make_lab(), request.param)
    yield made
    made.proxy.close()


def to_web(got: Counter[str]) -> dict[str, float]:
    return {f"web {endpoint}": float(count) for endpoint, count in got.items()}


def test_every_connection_is_counted_once_at_its_frontend_and_at_its_endpoint(node: Node) -> None:
    spec = {
        **WEB,
        "type": "LoadBalancer",
        "ports": [{**HTTP, "nodePort": 30080}],
        "externalIPs": [EXTERNAL],
        "ingress": [EXTERNAL, OTHER_EXTERNAL],  # the first has rules as both
    }
    node.given(
        {"web": spec, "other": {**WEB, "clusterIP": "172.30.0.42"}},
        {"web": slice_of("web", ONE, TWO), "other": slice_of("other", ONE)},
    )
    got = (
        node.connect(5)
        + node.connect(3, origin=Origin.NODE)
        + node.connect(4, EXTERNAL, origin=Origin.OUTSIDE)
        + node.connect(2, OTHER_EXTERNAL, origin=Origin.OUTSIDE)
        + node.connect(6, NODE_IP, 30080, origin=Origin.OUTSIDE)
    )
    frontends, given = node.scrape()
    assert frontends == {
        f"web {VIP}:80": 8,
        f"web {EXTERNAL}:80": 4,
        f"web {OTHER_EXTERNAL}:80": 2,
        "web :30080": 6,
        "other 172.30.0.42:80": 0,
    }
    assert given == {**to_web(got), "other 10.0.1.1:8080": 0}


def test_both_families_and_all_protocols_are_told_apart(node: Node) -> None:
    vip6, pod6 = "fd00::ac1e:29", "fd00::a00:101"
    named = [(str(protocol), protocol.lower()) for protocol in Protocol]
    ports = [{**HTTP, "name": name, "protocol": protocol} for protocol, name in named]
    backends = [{"name": name, "port": 8080, "protocol": protocol} for protocol, name in named]
    node.given(
        {"web": {"clusterIPs": [VIP, vip6], "ipFamilies": ["IPv4", "IPv6"], **WEB, "ports": ports}},
        {
            "web-4": {**slice_of("web", ONE), "ports": backends},
            "web-6": {**slice_of("web", pod6), "ports": backends, "addressType": "IPv6"},
        },
    )
    for source, vip, times in (("10.0.0.2", VIP, 1), ("fd00::a00:2", vip6, 4)):
        for count, protocol in enumerate(Protocol, 1):
            node.lab.send_many([Flow(Origin.POD, source, vip, 80, protocol)] * (count * times))
    text = generate_latest(node.registry).decode()
    for family, at, pod, times in (("IPv4", VIP, ONE, 1), ("IPv6", f"[{vip6}]", f"[{pod6}]", 4)):
        for count, (protocol, name) in enumerate(named, 1):
            labels = f'ip_family="{family}",namespace="default",port="{name}",protocol="{protocol}",service="web"'
            assert f'{SERVICES}{{frontend="{at}:80",{labels}}} {count * times}.0' in text
            assert f'{ENDPOINTS}{{endpoint="{pod}:8080",{labels}}} {count * times}.0' in text


def test_what_is_not_let_in_is_not_counted(node: Node) -> None:
    spec = {
        **WEB,
        "type": "LoadBalancer",
        "ports": [{**HTTP, "nodePort": 30080}],
        "ingress": [EXTERNAL, OTHER_EXTERNAL],
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
    }
    node.given({"web": spec, "empty": {**WEB, "clusterIP": "172.30.0.42"}}, {"web": slice_of("web", ONE)})
    for _ in range(2):
        node.connect(3, EXTERNAL, origin=Origin.OUTSIDE)
        assert node.connect(5, EXTERNAL, origin=Origin.OUTSIDE, source="198.51.100.9") == {"": 5}
        assert node.connect(7, OTHER_EXTERNAL, origin=Origin.OUTSIDE, source="198.51.100.9") == {"": 7}
        assert node.connect(2, "172.30.0.42") == {"": 2}
        frontends, given = node.scrape()
    assert frontends == {f"web {VIP}:80": 0, f"web {EXTERNAL}:80": 6, f"web {OTHER_EXTERNAL}:80": 0, "web :30080": 0}
    assert given == {f"web {ONE}:8080": 6}


def test_who_is_refused_while_counters_are_read_is_not_counted_either(node: Node) -> None:
    spec = {**WEB, "type": "LoadBalancer", "ingress": [EXTERNAL], "loadBalancerSourceRanges": ["203.0.113.0/24"]}
    node.given({"web": spec}, {"web": slice_of("web", ONE)})
    node.scrape()
    with ThreadPoolExecutor(max_workers=1) as monitoring:
        for _ in range(30):
            scraping = monitoring.submit(node.scrape)
            while not scraping.done():
                node.connect(1, EXTERNAL, origin=Origin.OUTSIDE, source="198.51.100.9")
    frontends, _ = node.scrape()
    assert frontends[f"web {EXTERNAL}:80"] == 0


def test_what_policy_local_drops_is_not_counted_also_when_an_endpoint_comes_to_the_node(node: Node) -> None:
    spec = {
        **WEB,
        "type": "LoadBalancer",
        "ports": [{**HTTP, "nodePort": 30080}],
        "externalIPs": [EXTERNAL],
        "ingress": [EXTERNAL],
        "externalTrafficPolicy": "Local",
    }
    node.given({"web": spec}, {"web": slice_of("web", ONE)})
    for to, port in ((EXTERNAL, 80), (NODE_IP, 30080)):
        assert node.connect(5, to, port, Origin.OUTSIDE) == {"": 5}
        node.connect(2, to, port)  # pods of this node are let through
    assert node.scrape() == ({f"web {VIP}:80": 0, f"web {EXTERNAL}:80": 2, "web :30080": 2}, {f"web {ONE}:8080": 4})

    node.given({}, {"web": slice_of("web", ONE, f"{TWO} here")})
    node.connect(3, EXTERNAL, origin=Origin.OUTSIDE)
    frontends, given = node.scrape()
    assert frontends == {f"web {VIP}:80": 0, f"web {EXTERNAL}:80": 5, "web :30080": 2}
    assert given == {f"web {ONE}:8080": 4, f"web {TWO}:8080": 3}


def test_clients_that_stay_with_their_endpoint_are_counted_too(node: Node) -> None:
    node.given({"web": {**WEB, "sessionAffinity": "ClientIP"}}, {"web": slice_of("web", ONE, TWO)})
    got = node.connect(10)
    assert len(got) == 1
    assert node.scrape() == ({f"web {VIP}:80": 10}, {f"web {ONE}:8080": 0, f"web {TWO}:8080": 0} | to_web(got))


def test_counts_go_on_when_endpoints_come_and_go(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE, TWO)})
    before = node.connect(12)
    node.scrape()
    node.given({}, {"web": slice_of("web", TWO, THREE)})
    after = node.connect(9)
    frontends, given = node.scrape()
    assert frontends == {f"web {VIP}:80": 21}
    assert given == {
        f"web {TWO}:8080": before[f"{TWO}:8080"] + after[f"{TWO}:8080"],
        f"web {THREE}:8080": after[f"{THREE}:8080"],
    }


def test_counts_go_on_when_every_rule_of_a_service_is_written_anew(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    node.connect(5)
    node.scrape()
    node.given(
        {"web": {**WEB, "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local"}},
        {"web": slice_of("web", f"{ONE} here")},
    )
    node.connect(11)
    assert node.scrape() == ({f"web {VIP}:80": 16}, {f"web {ONE}:8080": 16})


def test_an_address_that_another_service_takes_over_starts_at_zero(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    node.connect(12)
    node.scrape()
    node.proxy.delete(*scenarios.items(Objects(services={"web": None}, slices={"web": None}), Family.IPv4))
    node.proxy.apply(
        *scenarios.items(Objects(services={"next": WEB}, slices={"next": slice_of("next", ONE)}), Family.IPv4)
    )
    assert node.scrape() == ({}, {})  # the rules are still those of the other
    node.proxy.sync()
    node.connect(4)
    assert node.scrape() == ({f"next {VIP}:80": 4}, {f"next {ONE}:8080": 4})


def test_services_are_told_apart_in_a_large_cluster(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    node.connect(8)
    node.scrape()
    many = [f"10.1.{n >> 8}.{n & 255}" for n in range(1, 1001)]
    node.given({"many": {**WEB, "clusterIP": "172.30.0.42"}}, {"many": slice_of("many", *many)})
    saved = node.lab.netns.command(f"iptables-{node.variant}-save", "-t", "nat").stdout
    rules_of_endpoints = [line for line in saved.splitlines() if "DNAT" in line]
    assert len(rules_of_endpoints) == 1001
    assert not any("comment" in line for line in rules_of_endpoints)
    node.connect(9)
    to_many = node.connect(30, "172.30.0.42")
    frontends, given = node.scrape()
    assert frontends == {f"web {VIP}:80": 17, "many 172.30.0.42:80": 30}
    assert {at: count for at, count in given.items() if count} == {
        f"web {ONE}:8080": 17,
        **{f"many {endpoint}": count for endpoint, count in to_many.items()},
    }


def test_rules_of_others_are_not_counted(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    node.iptables("-t", "nat", "-N", "DOCKER")
    node.iptables("-t", "nat", "-I", "PREROUTING", "-j", "DOCKER")
    node.iptables(
        "-t",
        "nat",
        "-I",
        "DOCKER",
        "-p",
        "tcp",
        "-d",
        VIP,
        "--dport",
        "80",
        "-m",
        "comment",
        "--comment",
        'let\'s "see" -j KUBE-SEP-X',
    )
    node.iptables(
        "-t", "nat", "-A", "DOCKER", "-p", "tcp", "--dport", "8088", "-j", "DNAT", "--to-destination", f"{TWO}:80"
    )
    node.iptables(
        "-t", "nat", "-I", "KUBE-SERVICES", "-s", "10.0.0.9", "-p", "tcp", "-d", VIP, "--dport", "80", "-j", "RETURN"
    )
    node.iptables("-t", "nat", "-I", "KUBE-SERVICES", "-p", "tcp", "-d", TWO, "--dport", "80", "-j", "LOG")
    endpoint = f"KUBE-SEP-{hash16(f'default/web:httptcp{ONE}:8080')}"
    node.iptables("-t", "nat", "-I", endpoint, "-s", "10.0.0.9", "-j", "DNAT", "--to-destination", TWO)
    chain = f"KUBE-SVC-{hash16('default/web:httptcp')}"
    node.iptables(
        "-t", "nat", "-I", "KUBE-SERVICES", "-s", "10.0.0.9", "-p", "tcp", "-d", VIP, "--dport", "80", "-j", chain
    )  # fmt: skip
    node.connect(5)
    node.connect(4, NODE_IP, 8088, Origin.OUTSIDE)
    assert node.scrape() == ({f"web {VIP}:80": 5}, {f"web {ONE}:8080": 5})


def test_programs_that_replace_a_legacy_table_meanwhile_do_not_disturb_the_counts(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    node = Node(make_lab(), Variant.LEGACY)
    many = [f"10.1.{n >> 8}.{n & 255}" for n in range(1, 501)]  # so that writing takes a while
    node.given({"web": WEB}, {"web": slice_of("web", *many)})
    got = to_web(node.connect(50))
    node.scrape()
    rule = "iptables-legacy --wait -t nat %s OUTPUT -d 192.0.2.99 -j RETURN"
    with node.lab.netns.start(
        ["sh", "-c", f"for _ in $(seq 2000); do {rule % '-A'}; {rule % '-D'}; done"],
        env={**os.environ, "XTABLES_LOCKFILE": str(tmp_path / "lock")},
        start_new_session=True,
    ) as meddling:
        try:
            for _ in range(60):
                frontends, given = node.scrape()
                assert frontends == {f"web {VIP}:80": 50}
                assert {at: count for at, count in given.items() if count} == got
            assert meddling.poll() is None
        finally:
            os.killpg(meddling.pid, signal.SIGKILL)


def test_what_cannot_be_read_leaves_the_last_figures_and_says_why(
    make_lab: Callable[..., Lab], capfd: pytest.CaptureFixture[str]
) -> None:
    node = Node(make_lab(), Variant.NFT)
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    node.connect(5)
    before = node.scrape()
    node.lab.netns.command("nft", "add rule ip nat PREROUTING meta mark set numgen random mod 2")
    capfd.readouterr()
    assert node.scrape() == before
    assert "iptables-nft-save --counters --table nat: # Table `nat' is incompatible" in capfd.readouterr().out
    node.proxy.close()


@pytest.mark.parametrize("variant", list(Variant))
def test_reading_makes_no_tables(netns: Namespace, variant: Variant) -> None:
    assert netns.run(RuleTraffic(variant, tuple(Family), lambda frontend: None).readings) == []
    assert netns.command("nft", "list", "ruleset").stdout == ""
    assert netns.command("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names", check=False).stdout == ""


def test_what_took_long_to_read_is_given_again_for_a_while(node: Node) -> None:
    node.given({"web": WEB}, {"web": slice_of("web", ONE)})
    times = iter((0.0, 2.0, 19.9, 21.0, 21.1))  # began, ended, asked again, began, ended
    traffic = RuleTraffic(node.variant, (Family.IPv4,), node.proxy.state.owner, lambda: next(times))

    def counted() -> set[int]:
        return {reading.packets for reading in node.lab.netns.run(traffic.readings)}

    node.connect(5)
    assert counted() == {5}
    node.connect(4)
    assert counted() == {5}
    assert counted() == {9}


@pytest.mark.parametrize("variant", list(Variant))
def test_a_running_kproxy_shows_them(tmp_path: Path, variant: Variant) -> None:
    with OneNode(tmp_path) as here:
        here.host.namespace.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
        here.api.put(service("web", "10.96.0.10"))
        here.api.put(endpoints("web", "192.168.0.2"))
        proxy = here.started("--proxy-mode=iptables", "--cluster-cidr=10.0.0.0/8")
        here.host.exec("ip", "route", "add", "10.96.0.0/16", "dev", "lo")
        listening = here.host.namespace.run(socket.create_server, ("192.168.0.2", 8080))
        with closing(listening):
            for _ in range(3):
                here.host.connect("10.96.0.10", 80).close()

        def counted(name: str) -> list[float]:
            return [value for sample, value in proxy.scrape().items() if sample.startswith(f"{name}{{")]

        eventually(lambda: (counted(SERVICES), counted(ENDPOINTS)) == ([3], [3]), "three connections are counted")
        proxy.stop()
        quiet = here.started("--proxy-mode=iptables", "--cluster-cidr=10.0.0.0/8", "--service-metrics=false")
        assert not any(sample.startswith((SERVICES, ENDPOINTS)) for sample in quiet.scrape())
