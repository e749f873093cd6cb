"""Random clusters in IPVS: every packet fares as `explain` says, after every step of a history."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from heapq import nsmallest
from ipaddress import ip_address
from zlib import crc32

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy

from kproxy.cluster import ClusterState
from kproxy.config.v1alpha1 import KproxyConfiguration, OwnIPVS
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.explain import Action, Explanation, Packet
from kproxy.model import Endpoint, Family
from kproxy.node_addresses import LOOPBACK, local_addresses
from tests.lab.flows import Flow, Origin, Outcome
from tests.lab.namespaces import Namespace
from tests.lab.node import POD_GATEWAYS
from tests.lab.packets import Lab
from tests.lab.scenario import Objects
from tests.oracle.judge import complaints
from tests.oracle.kernels import Explain
from tests.oracle.probes import probes, targets, towards
from tests.oracle.profile import examples
from tests.oracle.story import Story
from tests.oracle.worlds import (
    CLIENTS,
    CLUSTER_IPS,
    ENDPOINTS,
    HERE_PODS,
    OTHER_PODS,
    PRIMARY,
    SECOND,
    History,
    Step,
    histories,
    in_family,
)

pytestmark = pytest.mark.ipvs

USUAL, OF_THE_NODE = 120, 60  # flows that are tried; the others are sent by a process that has a Service's address
PROGRAMS = {Family.IPv4: "iptables-legacy", Family.IPv6: "ip6tables-legacy"}


class UnevenLab(Lab):
    """Sends some of the flows twice: IPVS takes turns, so two flows that alternate would never change places."""

    def __init__(self, addresses: Sequence[str]) -> None:
        super().__init__(addresses)
        self._luck = random.Random(0)

    def send_many(self, flows: Sequence[Flow]) -> list[Outcome]:
        order = list(range(len(flows)))
        order += [i for i in order if self._luck.random() < 0.25]
        self._luck.shuffle(order)
        outcomes = dict(zip(order, super().send_many([flows[i] for i in order]), strict=True))
        return [outcomes[i] for i in range(len(flows))]


class IpvsStory(Story):
    """A history in ipvs mode."""

    def __init__(
        self, lab: Lab, history: History, *, stock_local_fallback: bool = False, also: Sequence[Flow] = ()
    ) -> None:
        self._also = also  # flows that are tried beside the drawn ones
        settings = KproxyConfiguration(ipvs=OwnIPVS(stock_local_fallback=stock_local_fallback))
        super().__init__(lab, history, settings=settings)

    @property
    def _mode(self) -> str:
        return "ipvs"

    def _meddle(self, how: int) -> None:
        meddle(self.lab.netns, how)

    def flaws_of_packets(self) -> list[str]:
        self.lab.flush_conntrack()
        explain = self.rig.explainer()
        known = {a for a in self.lab.netns.run(local_addresses) if not ip_address(a).is_link_local}
        own = frozenset(known - set(POD_GATEWAYS) - set(LOOPBACK.values()))
        flows = [*chosen_flows(self.rig.state, own, self._history.luck), *self._also]
        return complaints(self.lab, flows, lambda packet: as_judged(packet, explain), self.rig.forget_clients)


def as_judged(packet: Packet, explain: Explain) -> Explanation:
    """The judge knows of masquerading only where packets go to endpoints."""
    found = explain(packet)
    if found.action is not Action.PASS or not found.masquerade:
        return found
    endpoint = Endpoint(packet.destination, packet.port)
    return msgspec.structs.replace(found, action=Action.DNAT, endpoints=(endpoint,))


def chosen_flows(state: ClusterState, own: frozenset[str], luck: int) -> list[Flow]:
    """Some from everywhere, some from the node itself: by the address that it connects to, as routing would choose."""

    def drawn(flow: Flow) -> int:
        return crc32(f"{luck} {flow}".encode())

    usual = nsmallest(USUAL, probes(state, own, luck), key=drawn)
    by_service_addresses = [
        flow
        for target in targets(state, own)
        for flow in (
            *([Flow(Origin.NODE, target[0], *target)] if target[0] in own else []),
            *(flow for flow in towards(target, CLUSTER_IPS, own) if flow.origin is Origin.NODE),
        )
    ]
    return usual + nsmallest(OF_THE_NODE, dict.fromkeys(by_service_addresses), key=drawn)


# --- what others do ---


def meddle(netns: Namespace, how: int) -> None:
    """Change something of ours as a stranger does; the number decides what."""
    luck = random.Random(how)
    ways: tuple[Callable[[Namespace, random.Random], Iterator[str]], ...] = (_servers, _servers, _sets, _device, _rules)
    for command in luck.choice(ways)(netns, luck):
        netns.command("sh", "-c", command)


def _servers(netns: Namespace, luck: random.Random) -> Iterator[str]:
    saved = [line.split() for line in netns.command("ipvsadm", "-Sn").stdout.splitlines()]
    virtual = sorted((kind, at, scheduler) for add, kind, at, _, scheduler, *_ in saved if add == "-A")
    real = sorted((kind, at, server) for add, kind, at, _, server, *_ in saved if add == "-a")
    if virtual:
        kind, at, _ = luck.choice(virtual)
        yield luck.choice((f"ipvsadm -D {kind} {at}", f"ipvsadm -E {kind} {at} -s wlc -p 77", "ipvsadm -C", "true"))
    elif real:
        raise AssertionError("real servers without a virtual one")
    there = netns.command("ipvsadm", "-Sn").stdout
    real = [(kind, at, server) for kind, at, server in real if f"-a {kind} {at} -r {server}" in there]
    if real:
        kind, at, server = luck.choice(real)
        where = f"{kind} {at} -r {server}"
        yield luck.choice((f"ipvsadm -d {where}", f"ipvsadm -e {where} -m -w 0", f"ipvsadm -e {where} -m -w 7"))


def _sets(netns: Namespace, luck: random.Random) -> Iterator[str]:
    saved = [line.split() for line in netns.command("ipset", "save").stdout.splitlines()]
    names = sorted(words[1] for words in saved if words[0] == "create")
    members = sorted((name, member) for add, name, member, *_ in saved if add == "add")
    if members:
        name, member = luck.choice(members)
        yield luck.choice((f"ipset del {name} {member}", f"ipset flush {name}"))
    yield luck.choice(
        (
            f"ipset flush {luck.choice(names)}",
            "ipset -exist add KUBE-CLUSTER-IP 198.51.100.81,tcp:80",
            "ipset -exist add KUBE-NODE-PORT-TCP 80",
            "ipset -exist add KUBE-LOAD-BALANCER-FW 1.2.3.4,tcp:80",
        )
    )


def _device(netns: Namespace, luck: random.Random) -> Iterator[str]:
    shown = netns.command("ip", "-o", "address", "show", "dev", DEVICE).stdout
    addresses = sorted(line.split()[3] for line in shown.splitlines())
    yield luck.choice(
        (
            f"ip link delete {DEVICE}",
            f"ip address add 198.51.100.81/32 dev {DEVICE}",
            *(f"ip address delete {address} dev {DEVICE}" for address in addresses),
        )
    )


def _rules(netns: Namespace, luck: random.Random) -> Iterator[str]:
    program = luck.choice(list(PROGRAMS.values()))
    table = luck.choice(("nat", "filter"))
    saved = netns.command(f"{program}-save", "-t", table).stdout.splitlines()
    found = [line.removeprefix("-A ") for line in saved if line.startswith("-A ") and "KUBE-" in line]
    rule = luck.choice(sorted(found))
    chain = luck.choice(sorted({rule.split()[0] for rule in found}))
    yield luck.choice(
        (
            f"{program} -w -t {table} -D {rule}",
            f"{program} -w -t {table} -A {rule}",  # once more
            f"{program} -w -t {table} -F {chain}",
            f"{program} -w -t {table} -I {chain} -j RETURN",
            f"{program} -w -t {table} -F",
        )
    )


# --- tests ---

HEALTH_CHECKS = 30099


def service(number: int, **fields: object) -> dict[str, object]:
    return {"type": "LoadBalancer", "clusterIP": CLUSTER_IPS[number]} | fields


def ports(port: int, node_port: int = 0) -> list[dict[str, object]]:
    return [{"name": "http", "port": port, "nodePort": node_port}]


def endpoints(of: str, *addresses: str) -> dict[str, object]:
    found = [{"addresses": [a], "nodeName": ENDPOINTS[a]} for a in addresses]
    return {"service": of, "ports": [{"name": "http", "port": 8080}], "endpoints": found}


A, B, _, D = CLUSTER_IPS
EVERYTHING = Objects(
    config={"clusterCIDR": "10.0.0.0/8", "nodePortAddresses": ["192.168.0.0/24"]},
    node={"addresses": [PRIMARY, SECOND]},
    services={
        "guarded": service(0, ports=ports(80, 30080), ingress=["1.2.3.4"], loadBalancerSourceRanges=["203.0.113.0/24"]),
        "local": service(
            1,
            ports=ports(80, 30081),
            ingress=["1.2.3.5"],
            externalIPs=["198.51.100.82"],
            externalTrafficPolicy="Local",
            healthCheckNodePort=HEALTH_CHECKS,
        ),
        "external": service(2, ports=ports(80), externalIPs=["198.51.100.80", SECOND]),
        "host": service(3, ports=ports(30080)),  # the number of another one's node port
    },
    slices={
        "guarded-1": endpoints("guarded", *HERE_PODS, *OTHER_PODS),
        "local-1": endpoints("local", *HERE_PODS[:2], *OTHER_PODS),
        "external-1": endpoints("external", *OTHER_PODS),
        "host-1": endpoints("host", PRIMARY),
    },
)
UNUSUAL = (
    Flow(Origin.POD, HERE_PODS[0], B, HEALTH_CHECKS),  # somebody answers there, so it is not refused
    Flow(Origin.NODE, "1.2.3.4", "1.2.3.4", 80),  # the node is not within its source ranges
    Flow(Origin.NODE, "127.0.0.1", A, 80),
    Flow(Origin.NODE, "127.0.0.1", PRIMARY, 30080),
    Flow(Origin.NODE, "127.0.0.1", D, 30080),
)
LOSSES = (
    *(f"ipset flush KUBE-{name}" for name in ("LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL")),
    *(f"ipset flush KUBE-LOAD-BALANCER{name}" for name in ("", "-LOCAL", "-FW", "-SOURCE-CIDR")),
    *(f"ipset flush KUBE-{name}" for name in ("NODE-PORT-TCP", "NODE-PORT-LOCAL-TCP")),
    *(f"ipset flush KUBE-{name}" for name in ("HEALTH-CHECK-NODE-PORT", "IPVS-IPS")),
    "iptables-legacy -F KUBE-IPVS-OUT-FILTER",
    f"ipvsadm -d -t 1.2.3.5:80 -r {HERE_PODS[0]}:8080",
    f"ipvsadm -a -t {B}:80 -r 10.0.3.1:8080 -m",
)


@pytest.fixture
def node_lab() -> Iterator[Lab]:
    """One laboratory for all the examples of a test; each example leaves it as it found it."""
    with UnevenLab([in_family(address, family) for family in Family for address in (PRIMARY, SECOND)]) as lab:
        yield lab


def eventful(steps: int) -> SearchStrategy[History]:
    """Histories that begin with something to look at: there is time for a few only."""
    return histories(steps).filter(lambda history: len(history.given.services) > 1 and len(history.given.slices) > 3)


def few(usual: int) -> settings:
    """So many examples. Those that fail are not made smaller: that would take hours in User-Mode Linux."""
    return settings(examples(usual), phases=(Phase.generate,))


@few(3)
@given(history=eventful(steps=3))
def test_packets_fare_as_explained(node_lab: Lab, history: History) -> None:
    with IpvsStory(node_lab, history) as story:
        assert story.complaints() == [], "at first"
        for number, step in enumerate(history.steps, 1):
            story.go_on(step)
            assert story.complaints() == [], f"after step {number}"


@pytest.mark.parametrize("fallback", [False, True])
def test_policy_local_without_an_endpoint_here(node_lab: Lab, fallback: bool) -> None:
    elsewhere = Objects(slices={"local-1": endpoints("local", *OTHER_PODS)}).over(EVERYTHING)
    to_local = Packet(CLIENTS[0], "1.2.3.5", 80, interface="eth0")

    with IpvsStory(node_lab, History(elsewhere, (), 0), stock_local_fallback=fallback) as story:
        assert story.rig.explainer()(to_local).action is (Action.DNAT if fallback else Action.REJECT)
        assert story.complaints() == []


def test_what_was_left_on_an_address_that_comes_back(node_lab: Lab) -> None:
    given = Objects(
        config={"clusterCIDR": "10.0.0.0/8"},
        node={"addresses": [PRIMARY, SECOND]},
        services={"a": service(0, ports=ports(80, 30080))},
        slices={"a-1": endpoints("a", *HERE_PODS)},
    )
    gone = Objects(node={"addresses": [PRIMARY]})
    back = Objects(node=given.node, slices={"a-1": endpoints("a", *OTHER_PODS)})

    with IpvsStory(node_lab, History(given, (), 0)) as story:
        story.go_on(Step(gone, restart=True))
        assert story.complaints() == [], "a new process, while the address is gone"
        story.go_on(Step(back))
        assert story.complaints() == [], "other endpoints when it is back"


def test_whatever_is_missing_packets_tell(node_lab: Lab) -> None:
    with IpvsStory(node_lab, History(EVERYTHING, (), 0), also=UNUSUAL) as story:
        assert story.complaints() == []
        for loss in LOSSES:
            node_lab.netns.command("sh", "-c", loss)
            assert story.flaws_of_packets() != [], f"nobody notices {loss}"
            story.rig.reconciler.doubt()
            story.rig.sync()
        assert story.complaints() == []
