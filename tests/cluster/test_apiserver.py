"""The API stand-in keeps the promises that a Kubernetes API server makes to a client that lists and watches."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_faults import Answer, OnEvent, OnRequest

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


def service(name: str, labels: dict[str, str] | None = None, **spec: object) -> dict:
    return {"kind": "Service", "metadata": {"name": name, "labels": labels or {}}, "spec": spec}


def request(api: ApiServer, method: str, path: str, body: object = None, headers: dict | None = None, **query: str):
    connection = http.client.HTTPConnection(api.address, api.port, timeout=5)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, f"{path}?{urlencode(query)}", sent, headers or {})
        answer = connection.getresponse()
        return answer, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def get(api: ApiServer, path: str, **query: str) -> dict:
    answer, body = request(api, "GET", path, **query)
    assert answer.status == 200, body
    return body


@contextmanager
def watch(api: ApiServer, path: str, **query: str) -> Iterator[Iterator[dict]]:
    connection = http.client.HTTPConnection(api.address, api.port, timeout=5)
    connection.request("GET", f"{path}?{urlencode({'watch': '1', **query})}")
    answer = connection.getresponse()
    assert answer.status == 200
    try:
        yield (json.loads(line) for line in answer)
    finally:
        answer.close()
        connection.close()


def names(listed: dict) -> list[str]:
    return [item["metadata"]["name"] for item in listed["items"]]


def said(event: dict) -> tuple[str, str]:
    return event["type"], event["object"]["metadata"]["name"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("tier", ["back", "front"]),
        ("!tier", ["bare"]),
        ("tier=front", ["front"]),
        ("tier!=front", ["back", "bare"]),
        ("tier in (front, back),!old", ["front"]),
        ("tier notin (front)", ["back", "bare"]),
    ],
)
def test_label_selectors_choose_what_is_listed(api: ApiServer, selector: str, expected: list[str]):
    api.put_all([service("front", {"tier": "front"}), service("back", {"tier": "back", "old": ""}), service("bare")])

    assert names(get(api, SERVICES, labelSelector=selector)) == expected


def test_field_selectors_are_those_of_the_real_server(api: ApiServer):
    api.put_all([service("headless", clusterIP="None"), service("plain", clusterIP="10.96.0.1")])

    assert names(get(api, SERVICES, fieldSelector="spec.clusterIP!=None")) == ["plain"]
    assert names(get(api, SERVICES, fieldSelector="metadata.name=headless")) == ["headless"]
    answer, body = request(api, "GET", SLICES, fieldSelector="spec.clusterIP!=None")
    assert (answer.status, body["message"]) == (400, 'field label not supported: "spec.clusterIP"')


def test_pages_show_the_state_of_the_first_page(api: ApiServer):
    api.put_all(service(f"s{i}") for i in range(5))
    first = get(api, SERVICES, limit="2")
    api.delete("Service", "s3")
    api.put(service("s9"))

    second = get(api, SERVICES, limit="2", **{"continue": first["metadata"]["continue"]})
    third = get(api, SERVICES, limit="2", **{"continue": second["metadata"]["continue"]})

    assert names(first) + names(second) + names(third) == ["s0", "s1", "s2", "s3", "s4"]
    assert third["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert "continue" not in third["metadata"]


def test_a_page_of_a_forgotten_version_is_gone_and_may_go_on_inconsistently(api: ApiServer):
    api.put_all(service(f"s{i}") for i in range(3))
    first = get(api, SERVICES, limit="2")
    api.delete("Service", "s2")
    api.compact()

    answer, body = request(api, "GET", SERVICES, **{"continue": first["metadata"]["continue"]})

    assert (answer.status, body["reason"]) == (410, "Expired")
    assert names(get(api, SERVICES, **{"continue": body["metadata"]["continue"]})) == []


def test_a_watch_tells_every_change_after_its_version(api: ApiServer):
    api.put(service("old"))
    version = get(api, SERVICES)["metadata"]["resourceVersion"]
    api.put(service("new"))

    with watch(api, SERVICES, resourceVersion=version) as events:
        assert said(next(events)) == ("ADDED", "new")
        api.put(service("new", {"a": "b"}))
        assert said(next(events)) == ("MODIFIED", "new")
        api.put(service("new", {"a": "b"}))  # nothing changes: no event
        deleted_at = api.store.version + 1
        api.delete("Service", "new")
        event = next(events)

    assert said(event) == ("DELETED", "new")
    assert event["object"]["metadata"]["resourceVersion"] == str(deleted_at)
    assert event["object"]["kind"] == "Service"


def test_an_object_enters_and_leaves_a_watch_with_its_labels(api: ApiServer):
    api.put(service("web"))
    version = get(api, SERVICES)["metadata"]["resourceVersion"]

    with watch(api, SERVICES, resourceVersion=version, labelSelector="!other-proxy") as events:
        api.put(service("web", {"other-proxy": "x"}))
        assert said(next(events)) == ("DELETED", "web")
        api.put(service("web", {"other-proxy": "y"}))
        api.put(service("web"))
        assert said(next(events)) == ("ADDED", "web")


def test_a_streamed_list_ends_with_its_bookmark(api: ApiServer):
    api.put_all([service("a"), service("b")])
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}

    with watch(api, SERVICES, **query) as events:
        assert [said(next(events)), said(next(events))] == [("ADDED", "a"), ("ADDED", "b")]
        end = next(events)
        api.put(service("c"))
        assert said(next(events)) == ("ADDED", "c")

    assert end["type"] == "BOOKMARK"
    assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


def test_a_server_may_ignore_or_refuse_streamed_lists(api: ApiServer):
    api.put(service("a"))
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    api.stream_lists = "refuse"
    answer, _ = request(api, "GET", SERVICES, watch="1", **query)
    assert answer.status == 422

    api.stream_lists = "ignore"
    with watch(api, SERVICES, **query, timeoutSeconds="0.1") as events:
        told = list(events)
    assert not any("annotations" in event["object"]["metadata"] for event in told)


def test_bookmarks_come_on_time_on_demand_and_at_the_end(api: ApiServer):
    version = str(api.store.version)
    with watch(api, SERVICES, resourceVersion=version, allowWatchBookmarks="1") as events:
        api.put({"kind": "Node", "metadata": {"name": "n"}})
        api.bookmark()
        event = next(events)
        assert (event["type"], event["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", str(api.store.version))

    api.bookmark_seconds = 0.05
    with watch(api, SERVICES, resourceVersion=version, allowWatchBookmarks="1") as events:
        assert [next(events)["type"], next(events)["type"]] == ["BOOKMARK"] * 2

    api.bookmark_seconds = 60
    with watch(api, SERVICES, resourceVersion=version, allowWatchBookmarks="1", timeoutSeconds="0.1") as events:
        assert [event["type"] for event in events] == ["BOOKMARK"]


def test_a_watch_from_a_forgotten_version_is_gone(api: ApiServer):
    api.put(service("a"))
    version = get(api, SERVICES)["metadata"]["resourceVersion"]
    api.put(service("b"))

    with watch(api, SERVICES, resourceVersion=str(api.store.version)) as running:
        api.compact()
        with watch(api, SERVICES, resourceVersion=version) as events:
            told = list(events)
        api.put(service("c"))
        assert said(next(running)) == ("ADDED", "c")  # running watches go on

    assert [(event["type"], event["object"]["code"]) for event in told] == [("ERROR", 410)]


def test_clients_write_as_kubectl_does(api: ApiServer):
    path = "/api/v1/namespaces/shop/services"
    answer, made = request(api, "POST", path, service("web", clusterIP="10.96.0.9"))
    assert (answer.status, made["metadata"]["namespace"]) == (201, "shop")
    assert request(api, "POST", path, service("web"))[0].status == 409

    stale = {**made, "metadata": {**made["metadata"], "resourceVersion": "1"}}
    assert request(api, "PUT", f"{path}/web", stale)[0].status == 409
    merge = {"Content-Type": "application/merge-patch+json"}
    _, patched = request(api, "PATCH", f"{path}/web", {"metadata": {"labels": {"a": "b"}}}, merge)
    assert patched["spec"] == {"clusterIP": "10.96.0.9"}
    ingress = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}
    request(api, "PATCH", f"{path}/web/status", {"status": ingress, "spec": {"clusterIP": "no"}}, merge)
    assert get(api, f"{path}/web")["status"] == ingress
    assert get(api, f"{path}/web")["spec"] == {"clusterIP": "10.96.0.9"}

    assert request(api, "DELETE", f"{path}/web")[0].status == 200
    assert request(api, "GET", f"{path}/web")[0].status == 404


def test_events_that_clients_write_can_be_read(api: ApiServer):
    event = {"metadata": {"generateName": "node-1."}, "reason": "Starting", "note": ""}
    answer, _ = request(api, "POST", "/apis/events.k8s.io/v1/namespaces/default/events", event)

    assert answer.status == 201
    assert [written["reason"] for written in api.objects("Event")] == ["Starting"]


def test_tokens_are_asked_for_and_can_be_rotated(api: ApiServer):
    api.tokens = {"first"}
    assert request(api, "GET", SERVICES)[0].status == 401
    assert request(api, "GET", SERVICES, headers={"Authorization": "Bearer first"})[0].status == 200

    api.tokens = {"second"}
    assert request(api, "GET", SERVICES, headers={"Authorization": "Bearer first"})[0].status == 401


def test_a_server_that_is_down_refuses_cuts_watches_and_comes_back_with_its_objects(api: ApiServer):
    api.put(service("a"))
    with watch(api, SERVICES, resourceVersion=str(api.store.version)) as events:
        api.down()
        with pytest.raises((http.client.IncompleteRead, StopIteration, ConnectionError)):
            next(events)
    with pytest.raises(ConnectionRefusedError):
        get(api, SERVICES)

    api.up()
    assert names(get(api, SERVICES)) == ["a"]


def test_faults_hit_the_requests_they_are_meant_for(api: ApiServer):
    api.faults.add(Answer(429, (("Retry-After", "7"),)), resource="services", verb="list")
    assert get(api, SLICES)["items"] == []
    answer, body = request(api, "GET", SERVICES)
    assert (answer.status, answer.headers["Retry-After"], body["code"]) == (429, "7", 429)
    assert get(api, SERVICES)["items"] == []

    api.faults.add(OnRequest.DROP)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        get(api, SERVICES)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OnEvent.SWALLOW, ["b"]),
        (OnEvent.GARBLE, ["not JSON", "b"]),
        (OnEvent.GONE, ["410"]),
        (OnEvent.DROP_MID_EVENT, ["cut"]),
    ],
)
def test_faults_hit_the_next_event_of_a_watch(api: ApiServer, fault: OnEvent, told: list[str]):
    seen = []
    with watch(api, SERVICES, resourceVersion=str(api.store.version), timeoutSeconds="0.3") as events:
        api.faults.add(fault, resource="services")
        api.put(service("a"))
        api.put(service("b"))
        try:
            for event in events:
                content = event["object"]
                seen.append(str(content["code"]) if "code" in content else content["metadata"]["name"])
        except json.JSONDecodeError:
            seen += ["not JSON", "b"] if fault is OnEvent.GARBLE else ["cut"]
        except (http.client.IncompleteRead, ConnectionError):
            seen.append("cut")

    assert seen == told


def test_a_request_hangs_until_the_faults_are_cleared(api: ApiServer):
    api.faults.add(OnRequest.HANG, resource="services")
    connection = http.client.HTTPConnection(api.address, api.port, timeout=0.2)
    connection.request("GET", SERVICES)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()

    assert get(api, SERVICES)["items"] == []
