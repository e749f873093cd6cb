from __future__ import annotations

import time

import pytest

from kproxy.api.client import connect
from kproxy.api.events import Changed, Listed
from kproxy.api.server import ApiServerSource
from kproxy.api.watch import Pace
from tests.api.conftest import QUICK, Follow, endpoint_slice, service
from tests.api.recorder import Recorder
from tests.lab.apiserver import ApiServer, Request

IN_PAGES_OF_TWO = Pace(page=2, first_retry=0.02, longest_retry=0.1)


def requests(api: ApiServer, plural: str = "services", *, watch: bool) -> list[Request]:
    return [
        request
        for request in api.requests
        if request.path.endswith(f"/{plural}") and ("watch" in request.query) == watch
    ]


@pytest.mark.parametrize("stream", [True, False], ids=["as a stream", "in pages"])
def test_everything_that_exists_is_delivered_before_the_kind_is_complete(api: ApiServer, follow: Follow, stream: bool):
    api.put_all(service(f"web-{number}") for number in range(5))
    api.put(endpoint_slice())
    api.put({"kind": "Node", "metadata": {"name": "node-1"}})
    api.put({"kind": "Node", "metadata": {"name": "node-2"}})
    api.put({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}})

    seen = follow(pace=IN_PAGES_OF_TWO, stream=stream)

    assert seen.names("Service") == {f"default/web-{number}" for number in range(5)}
    assert seen.names("EndpointSlice") == {"default/web-1"}
    assert seen.names("Node") == {"/node-1"}
    assert seen.names("ServiceCIDR") == {"/kubernetes"}
    of_services = [event for event in seen.events if getattr(event, "kind", "") == "Service"]
    assert [type(event) for event in of_services[:6]] == [Changed] * 5 + [Listed]
    lists = requests(api, watch=False)
    if stream:
        assert lists == []
        assert [request.query["sendInitialEvents"] for request in requests(api, watch=True)] == ["true"]
    else:
        assert [("continue" in request.query, request.query["limit"]) for request in lists] == [
            (False, "2"),
            (True, "2"),
            (True, "2"),
        ]


def test_the_selectors_are_those_of_kube_proxy(api: ApiServer, follow: Follow):
    follow()

    selectors = {
        request.path: (request.query.get("labelSelector"), request.query.get("fieldSelector"))
        for request in api.requests
    }
    assert selectors == {
        "/api/v1/services": ("!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None"),
        "/apis/discovery.k8s.io/v1/endpointslices": ("!service.kubernetes.io/headless", None),
        "/api/v1/nodes": (None, "metadata.name=node-1"),
        "/apis/networking.k8s.io/v1/servicecidrs": (None, None),
    }


def test_changes_arrive_without_another_list(api: ApiServer, follow: Follow):
    api.put(service("web"))
    seen = follow()

    api.put(service("api", clusterIP="10.96.0.11"))
    api.put(service("web", clusterIP="10.96.0.99"))
    seen.until(
        lambda: len(seen.names()) == 2 and seen.objects["Service"]["default/web"].spec.cluster_ip == "10.96.0.99"
    )
    api.delete("Service", "web")
    seen.until(lambda: seen.names() == {"default/api"})

    assert seen.lists() == 1
    assert seen.complaints() == []


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "pages"])
@pytest.mark.parametrize("server_selects", [True, False])
def test_services_of_other_proxies_and_headless_ones_are_left_out(
    api: ApiServer, follow: Follow, server_selects: bool, stream: bool
):
    api.selectors = server_selects
    api.put(service("ours"))
    api.put(service("headless", clusterIP="None"))
    foreign = service("foreign")
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": ""}
    api.put(foreign)
    headless_slice = endpoint_slice("headless-1")
    headless_slice["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    api.put(headless_slice)
    seen = follow(stream=stream)
    assert seen.names("Service") == {"default/ours"}
    assert seen.names("EndpointSlice") == set()

    api.patch("Service", "ours", {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "istio"}}})
    seen.until(lambda: seen.names("Service") == set(), "a Service that goes to another proxy is gone for us")


def test_a_watch_goes_on_from_the_last_bookmark_after_an_orderly_end(api: ApiServer, follow: Follow):
    seen = follow(pace=Pace(watch=(1.2, 1.3)))
    api.put({"kind": "Node", "metadata": {"name": "another"}})  # moves the version, says nothing to watches of Services
    before = seen.alive()
    api.bookmark()
    seen.until(lambda: seen.alive() > before, "the bookmark says that the source is current")
    version = str(api.store.version)

    seen.until(lambda: requests(api, watch=True)[-1].query.get("resourceVersion") == version, "the next watch")

    assert seen.lists() == 1
    assert seen.complaints() == []


def test_a_watch_goes_on_from_the_last_event_after_the_connection_was_lost(api: ApiServer, follow: Follow):
    seen = follow()
    version = api.put(service("web"))["metadata"]["resourceVersion"]
    seen.until(lambda: seen.names() == {"default/web"})

    api.down()
    api.up()

    seen.until(lambda: len(requests(api, watch=True)) == 2)
    assert requests(api, watch=True)[-1].query["resourceVersion"] == version


def test_the_pages_of_a_list_count_as_one_request_for_the_rate_limit(api: ApiServer, follow: Follow):
    api.put_all(service(f"web-{number}") for number in range(10))
    four_lists_and_four_watches = 8

    seen = follow(
        connect(master=api.url, qps=0.01, burst=four_lists_and_four_watches), pace=IN_PAGES_OF_TWO, stream=False
    )

    assert len(seen.names()) == 10


def test_watches_ask_for_bookmarks_and_end_after_five_to_ten_minutes(api: ApiServer, follow: Follow):
    follow(pace=Pace())

    lengths = {int(request.query["timeoutSeconds"]) for request in requests(api, watch=True)}
    assert all(300 <= length <= 600 for length in lengths)
    assert {request.query["allowWatchBookmarks"] for request in requests(api, watch=True)} == {"true"}


def test_an_event_of_more_than_a_megabyte_arrives_whole(api: ApiServer, follow: Follow):
    seen = follow()
    ports = [{"name": f"port-{number}", "port": number} for number in range(1, 30_001)]

    api.put(service("wide", ports=ports))

    seen.until(lambda: seen.names() == {"default/wide"})
    assert len(seen.objects["Service"]["default/wide"].spec.ports) == 30_000


@pytest.mark.parametrize("answer", ["refuse", "ignore"])
def test_a_server_that_cannot_stream_lists_is_asked_for_pages_from_then_on(api: ApiServer, follow: Follow, answer: str):
    api.stream_lists = answer
    api.put(service("web"))

    seen = follow(pace=Pace(relist=0.3, stream_silence=0.2, first_retry=0.02))
    assert seen.names() == {"default/web"}
    seen.until(lambda: seen.lists() > 1, "the next list")

    streams = [r for r in api.requests if "sendInitialEvents" in r.query and r.path.endswith("/services")]
    assert len(streams) == 1
    assert seen.complaints() == []


def test_stop_ends_the_watches_at_once_and_nothing_comes_after_it(api: ApiServer):
    seen = Recorder()
    source = ApiServerSource(connect(master=api.url), node_name="node-1", pace=QUICK)
    source.start(seen)
    seen.until(lambda: seen.complete)

    began = time.monotonic()
    source.stop()
    took = time.monotonic() - began
    known = len(seen.events)
    api.put(service("late"))

    seen.until(lambda: not api.watching("services"), "the server notices that nobody watches")
    assert took < 0.9
    assert len(seen.events) == known


def test_stop_is_prompt_while_the_server_is_away(api: ApiServer):
    api.down()
    seen = Recorder()
    source = ApiServerSource(connect(master=api.url), node_name="node-1", pace=Pace(first_retry=20))
    source.start(seen)
    seen.until(lambda: seen.complaints())

    began = time.monotonic()
    source.stop()

    assert time.monotonic() - began < 0.9
