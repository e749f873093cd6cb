"""The judge is judged: whatever is taken out of the kernel, packets tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kproxy.dataplane.base import Change, Key, Value
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, JumpKey
from kproxy.dataplane.nftables.containers import CONTAINERS
from tests.lab.packets import Lab
from tests.lab.scenario import Objects
from tests.oracle.story import Story
from tests.oracle.worlds import HERE_PODS, OTHER_PODS, PRIMARY, SECOND, History

# Only later connections of the same client read these.
OF_LATER_CONNECTIONS = {"affinity", "learn", "learn-nodeports"}


def service(number: int, **fields: object) -> dict[str, object]:
    ports = [{"name": "http", "port": 80, "nodePort": 30080 + number}]
    return {"type": "LoadBalancer", "clusterIP": f"172.30.0.{11 + number}", "ports": ports} | fields


def endpoints(of: str, *addresses: str) -> dict[str, object]:
    found = [{"addresses": [a], "nodeName": "here" if a in HERE_PODS else "elsewhere"} for a in addresses]
    return {"service": of, "ports": [{"name": "http", "port": 8080}], "endpoints": found}


EVERYTHING = Objects(
    config={"clusterCIDR": "10.0.0.0/8", "nodePortAddresses": ["192.168.0.0/16"]},
    node={"addresses": [PRIMARY, SECOND]},
    services={
        "a": service(0, ingress=["1.2.3.4"], loadBalancerSourceRanges=["203.0.113.0/24"]),
        "b": service(1, ingress=["1.2.3.5"], externalTrafficPolicy="Local"),
        "c": service(2, externalIPs=["198.51.100.80"]),
    },
    slices={"a-1": endpoints("a", *HERE_PODS, *OTHER_PODS), "b-1": endpoints("b", *HERE_PODS[:2], *OTHER_PODS)},
    service_cidrs=["172.30.0.0/16"],
)


def containers() -> list[str]:
    return sorted({c.name for c in CONTAINERS.values()} - OF_LATER_CONNECTIONS)


@pytest.fixture
def story(node_lab: Lab):
    with Story(node_lab, History(EVERYTHING, (), 0)) as story:
        yield story


def test_nothing_is_wrong_at_first(story: Story) -> None:
    assert story.complaints() == []


@pytest.mark.parametrize("name", containers())
def test_elements_that_are_missing_are_noticed(story: Story, name: str) -> None:
    there = story.rig.opened.kernel.read()
    taken = [key for key in there if isinstance(key, bytes) and CONTAINERS[key[0]].name == name]
    assert taken, f"{name} has no element in this world"
    story.rig.opened.kernel.apply([Change(key, there[key], None) for key in taken])
    assert story.flaws_of_packets() != []
    assert story.rig.plan() != []
    assert story.rig.misplaced() != []


def test_an_endpoint_that_is_never_reached_is_noticed(story: Story) -> None:
    there = story.rig.opened.kernel.read()
    one, *_, other = sorted(k for k in there if isinstance(k, bytes) and CONTAINERS[k[0]].name == "endpoints")
    story.rig.opened.kernel.apply([Change(one, there[one], there[other])])
    assert any("no try reached" in flaw for flaw in story.flaws_of_packets())


@pytest.fixture
def iptables_story(node_lab: Lab):
    with Story(node_lab, History(EVERYTHING, (), 0), variant=Variant.LEGACY) as story:
        yield story


# What stands in KUBE-NODEPORTS, KUBE-FORWARD and KUBE-FIREWALL of the filter table matters only to other firewalls.
BLOCKS = [
    ("nat", "KUBE-SERVICES"),
    ("nat", "KUBE-NODEPORTS"),
    ("filter", "KUBE-SERVICES"),
    ("filter", "KUBE-EXTERNAL-SERVICES"),
    ("filter", "KUBE-PROXY-FIREWALL"),
]
CHAINS = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"]


def test_in_iptables_mode_nothing_is_wrong_at_first(iptables_story: Story) -> None:
    assert iptables_story.complaints() == []


@pytest.mark.parametrize(("table", "chain"), BLOCKS)
def test_rules_that_are_missing_are_noticed(iptables_story: Story, table: str, chain: str) -> None:
    def concerned(key: Key) -> bool:
        return isinstance(key, BlockKey) and (key.table, key.chain) == (table, chain)

    without(iptables_story, concerned, None)
    is_noticed(iptables_story)


@pytest.mark.parametrize("prefix", CHAINS)
def test_chains_that_are_empty_are_noticed(iptables_story: Story, prefix: str) -> None:
    without(iptables_story, lambda key: isinstance(key, ChainKey) and key.chain.startswith(prefix), ())
    is_noticed(iptables_story)


@pytest.mark.parametrize(("table", "chain"), [*BLOCKS[:1], *BLOCKS[2:], ("nat", "KUBE-POSTROUTING")])
def test_jumps_that_are_missing_are_noticed(iptables_story: Story, table: str, chain: str) -> None:
    there = iptables_story.lab.netns.run(iptables_story.rig.opened.kernel.read)

    def concerned(key: Key) -> bool:
        return isinstance(key, JumpKey) and key.table == table and there[key].target.to == chain

    without(iptables_story, concerned, None)
    is_noticed(iptables_story)


def without(story: Story, concerned: Callable[[Key], bool], instead: Value | None) -> None:
    def take() -> list[Change]:
        there = story.rig.opened.kernel.read()
        taken = [Change(key, value, instead) for key, value in there.items() if concerned(key)]
        story.rig.opened.kernel.apply(taken)
        return taken

    assert story.lab.netns.run(take), "there is nothing of it in this world"


def is_noticed(story: Story) -> None:
    assert story.flaws_of_packets() != []
    story.rig.reconciler.doubt()
    assert story.rig.plan() != []
    assert story.rig.misplaced() != []
