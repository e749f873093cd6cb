"""The judge is judged: whatever is taken out of the kernel, packets tell."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import Change
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
    there = story.rig.kernel.read()
    taken = [key for key in there if isinstance(key, bytes) and CONTAINERS[key[0]].name == name]
    assert taken, f"{name} has no element in this world"
    story.rig.kernel.apply([Change(key, there[key], None) for key in taken])
    assert story.flaws_of_packets() != []
    assert story.rig.plan() != []
    assert story.rig.misplaced() != []


def test_an_endpoint_that_is_never_reached_is_noticed(story: Story) -> None:
    there = story.rig.kernel.read()
    one, *_, other = sorted(k for k in there if isinstance(k, bytes) and CONTAINERS[k[0]].name == "endpoints")
    story.rig.kernel.apply([Change(one, there[one], there[other])])
    assert any("no try reached" in flaw for flaw in story.flaws_of_packets())
