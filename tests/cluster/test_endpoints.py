"""The lab's EndpointSlice controller writes what the one in a real cluster would."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.cluster_objects import headless, port, service
from tests.lab.endpoints import EndpointSliceController

IP4, IP6 = "10.96.0.10", "fd00:96::10"


@dataclass
class APod:
    name: str
    ipv4: str
    ipv6: str = ""
    node_name: str = "node-1"
    zone: str = "zone-1"
    labels: dict[str, str] = field(default_factory=lambda: {"app": "web"})
    port_names: dict[str, int] = field(default_factory=dict)
    ready: bool = True
    terminating: bool = False
    changed_at: float = 1_700_000_000.25


@pytest.fixture
def api() -> ApiServer:
    return ApiServer()  # its store is all that is needed: it does not listen


def slices(api: ApiServer) -> list[dict]:
    return api.objects("EndpointSlice")


def conditions(api: ApiServer) -> list[dict[str, bool]]:
    return [endpoint["conditions"] for written in slices(api) for endpoint in written["endpoints"]]


def test_a_slice_has_what_a_proxy_reads(api: ApiServer):
    api.put(service("web", IP4, ports=[port(80, target="http", name="web")]))
    pod = APod("a", "10.244.1.2", port_names={"http": 8080})

    EndpointSliceController(api, [pod]).sync()

    (written,) = slices(api)
    assert written["metadata"]["labels"]["kubernetes.io/service-name"] == "web"
    assert written["metadata"]["annotations"] == {
        "endpoints.kubernetes.io/last-change-trigger-time": "2023-11-14T22:13:20.250000Z"
    }
    assert written["ports"] == [{"name": "web", "protocol": "TCP", "port": 8080}]
    (endpoint,) = written["endpoints"]
    assert (endpoint["addresses"], endpoint["nodeName"], endpoint["zone"]) == (["10.244.1.2"], "node-1", "zone-1")


def test_conditions_follow_readiness_and_termination(api: ApiServer):
    api.put(service("web", IP4))
    pod = APod("a", "10.244.1.2")
    controller = EndpointSliceController(api, [pod])

    controller.sync()
    assert conditions(api) == [{"ready": True, "serving": True, "terminating": False}]
    pod.terminating = True
    controller.sync()
    assert conditions(api) == [{"ready": False, "serving": True, "terminating": True}]
    pod.ready = False
    controller.sync()
    assert conditions(api) == [{"ready": False, "serving": False, "terminating": True}]


def test_publish_not_ready_addresses_makes_everything_ready(api: ApiServer):
    api.put(service("web", IP4, publishNotReadyAddresses=True))

    EndpointSliceController(api, [APod("a", "10.244.1.2", ready=False, terminating=True)]).sync()

    assert conditions(api) == [{"ready": True, "serving": False, "terminating": True}]


def test_each_family_has_slices_of_its_own_and_pods_that_do_not_match_have_none(api: ApiServer):
    api.put(service("web", IP4, IP6))
    pods = [APod("a", "10.244.1.2", "fd00:244:1::2"), APod("b", "10.244.1.3", labels={"app": "other"})]

    EndpointSliceController(api, pods).sync()

    addresses = {written["addressType"]: written["endpoints"][0]["addresses"] for written in slices(api)}
    assert addresses == {"IPv4": ["10.244.1.2"], "IPv6": ["fd00:244:1::2"]}


def test_slices_hold_100_endpoints_and_only_those_that_change_are_written(api: ApiServer):
    api.put(service("web", IP4))
    pods = [APod(f"p{n}", f"10.244.1.{n}") for n in range(1, 251)]
    controller = EndpointSliceController(api, pods)
    controller.sync()
    before = {written["metadata"]["name"]: written["metadata"]["resourceVersion"] for written in slices(api)}
    assert sorted(len(written["endpoints"]) for written in slices(api)) == [50, 100, 100]

    pods[120].ready = False
    controller.sync()
    after = {written["metadata"]["name"]: written["metadata"]["resourceVersion"] for written in slices(api)}
    assert len(after.items() - before.items()) == 1

    del pods[:100]  # a slice that nothing is left in goes; the others stay as they are
    controller.sync()
    assert sorted(len(written["endpoints"]) for written in slices(api)) == [50, 100]


def test_a_service_without_pods_has_an_empty_slice_and_one_that_goes_has_none(api: ApiServer):
    api.put(service("web", IP4))
    controller = EndpointSliceController(api, [])
    controller.sync()
    assert [written["endpoints"] for written in slices(api)] == [[]]

    api.delete("Service", "web")
    controller.sync()
    assert slices(api) == []


def test_slices_of_headless_services_are_marked(api: ApiServer):
    api.put(headless("peers", app="web"))

    EndpointSliceController(api, [APod("a", "10.244.1.2")]).sync()

    assert slices(api)[0]["metadata"]["labels"]["service.kubernetes.io/headless"] == ""


@pytest.mark.parametrize(
    ("distribution", "hints"),
    [
        ("PreferSameZone", {"forZones": [{"name": "zone-1"}]}),
        ("PreferSameNode", {"forZones": [{"name": "zone-1"}], "forNodes": [{"name": "node-1"}]}),
    ],
)
def test_traffic_distribution_becomes_hints(api: ApiServer, distribution: str, hints: dict):
    api.put(service("web", IP4, trafficDistribution=distribution))

    EndpointSliceController(api, [APod("a", "10.244.1.2")]).sync()

    assert slices(api)[0]["endpoints"][0]["hints"] == hints


def test_the_empty_slice_becomes_the_first_one_and_the_last_one_the_empty_one(api: ApiServer):
    api.put(service("web", IP4))
    pods: list[APod] = []
    controller = EndpointSliceController(api, pods)
    controller.sync()
    (name,) = (written["metadata"]["name"] for written in slices(api))

    pods.append(APod("a", "10.244.1.2"))
    controller.sync()
    assert [(written["metadata"]["name"], len(written["endpoints"])) for written in slices(api)] == [(name, 1)]
    pods.clear()
    controller.sync()
    assert [(written["metadata"]["name"], len(written["endpoints"])) for written in slices(api)] == [(name, 0)]
