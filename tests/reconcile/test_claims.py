"""Two Services that ask for one address and port: one has it, whatever came first, and the other when that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import pytest

from kproxy.cluster.claims import Claims
from kproxy.model import Family, Protocol, ServiceName, ServicePort, ServicePortName
from kproxy.routing import frontends
from tests.lab.flows import Fate, Flow, Origin
from tests.lab.packets import Lab
from tests.reconcile.driven import Part, part
from tests.reconcile.objects import Object, endpoints, port, service
from tests.reconcile.one_node import generation

OLD, NEW = "2020-01-01T00:00:00Z", "2024-01-01T00:00:00Z"
CLIENT = "203.0.113.9"
POD = "10.0.0.2"


def made(item: Object, created: str) -> Object:
    return item | {"metadata": item["metadata"] | {"creationTimestamp": created}}


def with_external_ip(name: str, cluster_ip: str, created: str) -> Object:
    return made(service(name, cluster_ip, externalIPs=["192.0.2.1"]), created)


def with_cluster_ip(name: str, cluster_ip: str, created: str) -> Object:
    del cluster_ip
    return made(service(name, "10.96.0.50"), created)


def with_node_port(name: str, cluster_ip: str, created: str) -> Object:
    return made(service(name, cluster_ip, type="NodePort", ports=[port(80, node_port=30080)]), created)


CONFLICTS: dict[str, tuple[Callable[[str, str, str], Object], Flow]] = {
    "one external address": (with_external_ip, Flow(Origin.OUTSIDE, CLIENT, "192.0.2.1", 80)),
    "one cluster IP": (with_cluster_ip, Flow(Origin.POD, POD, "10.96.0.50", 80)),
    "one node port": (with_node_port, Flow(Origin.OUTSIDE, CLIENT, "192.168.0.2", 30080)),
}


@pytest.fixture
def node_of(lab: Lab) -> Iterator[Part]:
    """What programs the lab's node."""
    made = part(lab.netns)
    yield made
    made.kernel.close()


@pytest.mark.parametrize("older_first", [True, False], ids=["older first", "younger first"])
@pytest.mark.parametrize(("build", "flow"), CONFLICTS.values(), ids=CONFLICTS)
def test_the_older_service_has_it_and_the_other_takes_over_in_one_transaction(
    lab: Lab, node_of: Part, build: Callable[[str, str, str], Object], flow: Flow, older_first: bool
):
    older, younger = build("zebra", "10.96.0.1", OLD), build("ant", "10.96.0.2", NEW)
    node_of.put(endpoints("zebra", "10.0.1.1"), endpoints("ant", "10.0.1.2", "10.0.1.3"))
    for item in (older, younger) if older_first else (younger, older):
        node_of.put(item)
        node_of.sync()
    assert {o.destination for o in lab.send_many([flow] * 20)} == {"10.0.1.1"}
    assert any("default/ant" in note and "belongs to Service default/zebra" in note for note in node_of.notes)

    before = generation(lab.netns)
    node_of.delete(older)
    node_of.sync()
    assert generation(lab.netns) == before + 1
    outcomes = lab.send_many([flow] * 40)
    assert {o.destination for o in outcomes} == {"10.0.1.2", "10.0.1.3"}

    node_of.put(older)
    node_of.sync()
    assert generation(lab.netns) == before + 2
    assert {(o.fate, o.destination) for o in lab.send_many([flow] * 20)} == {(Fate.FORWARDED, "10.0.1.1")}
    assert node_of.in_step


def test_the_loser_keeps_its_other_addresses_and_ports(lab: Lab, node_of: Part):
    first = made(service("first", "10.96.0.1", externalIPs=["192.0.2.1"]), OLD)
    ports = [port(80, name="a"), port(81, name="b")]
    second = made(service("second", "10.96.0.2", externalIPs=["192.0.2.1", "192.0.2.2"], ports=ports), NEW)
    slice_ = endpoints("second", "10.0.1.2", port_name="a")
    slice_["ports"].append({"name": "b", "port": 8081, "protocol": "TCP"})
    node_of.put(first, second, endpoints("first", "10.0.1.1"), slice_)
    node_of.sync()
    targets = {("192.0.2.1", 80): "10.0.1.1", ("192.0.2.2", 80): "10.0.1.2", ("192.0.2.1", 81): "10.0.1.2"}
    flows = [Flow(Origin.OUTSIDE, CLIENT, address, number) for address, number in targets]
    assert [outcome.destination for outcome in lab.send_many(flows)] == list(targets.values())


# The rule by itself: whoever claims, in whatever order


def claimant(name: str, created: str, cluster_ip: str = "", **more: Any) -> ServicePort:
    return ServicePort(
        name=ServicePortName("ns", name, "", Protocol.TCP),
        family=Family.IPv4,
        cluster_ip=cluster_ip or f"10.96.1.{ord(name[0])}",
        port=80,
        created=created,
        **more,
    )


CLAIMANTS = (
    claimant("c", OLD, external_ips=("10.96.0.9",)),
    claimant("b", NEW, "10.96.0.9"),
    claimant("a", NEW, "10.96.0.9"),
    claimant("d", OLD, load_balancer_ips=("10.96.0.9",)),
)
RANKED = ["a", "b", "c", "d"]  # cluster IPs first, then by age, then by name


def owner(claims: Claims) -> str:
    [contested] = [frontend for _, frontend in frontends(CLAIMANTS[1])]
    found = claims.owner(contested)
    return found.name if found else ""


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_who_wins_does_not_depend_on_who_came_first(order: tuple[int, ...]):
    claims = Claims(lambda _: None)
    for index in order:
        claims.claim(CLAIMANTS[index], frontends(CLAIMANTS[index]))
    assert owner(claims) == RANKED[0]
    by_name = {one.name.name: one for one in CLAIMANTS}
    for winner, following in zip(RANKED, [*RANKED[1:], ""], strict=True):
        gainers = claims.release(by_name[winner])
        assert owner(claims) == following
        assert gainers == ({ServiceName("ns", following)} if following else set())


def test_who_loses_an_address_is_told_apart_from_who_only_asks_for_it():
    notes: list[str] = []
    claims = Claims(notes.append)
    b, a, c = CLAIMANTS[1], CLAIMANTS[2], CLAIMANTS[0]
    assert claims.claim(b, frontends(b)) == set()
    assert claims.claim(c, frontends(c)) == set()
    assert claims.claim(a, frontends(a)) == {ServiceName("ns", "b")}
    assert notes == [
        "Service ns/c: 10.96.0.9:80/TCP belongs to Service ns/b, which goes first",
        "Service ns/b: 10.96.0.9:80/TCP belongs to Service ns/a, which goes first",
    ]
    assert [frontend.address for _, frontend in claims.owned(c)] == ["10.96.1.99"]
    assert claims.owned(b) == ()
    assert claims.release(b) == set()
    assert claims.owned(b) == ()


def test_two_ports_of_one_service_with_one_number_and_protocol_share_nothing():
    claims = Claims(lambda _: None)
    http = claimant("web", OLD, "10.96.0.9")
    other = ServicePort(
        name=http.name._replace(port="other"), family=Family.IPv4, cluster_ip="10.96.0.9", port=80, created=OLD
    )
    assert claims.claim(http, frontends(http)) == set()
    claims.claim(other, frontends(other))
    assert len(claims.owned(http)) == 1
    assert claims.owned(other) == ()
    claims.release(http)
    assert len(claims.owned(other)) == 1
