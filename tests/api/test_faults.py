"""What goes wrong between a proxy and its API server, and that nothing is lost by it."""

from __future__ import annotations

import random
import time

import pytest
from structlog.typing import EventDict

from kproxy.api.client import connect
from kproxy.api.events import Changed, Event
from kproxy.api.server import ApiServerSource
from kproxy.api.watch import Pace
from tests.api.conftest import QUICK, Follow, endpoint_slice, service
from tests.api.recorder import Recorder
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_faults import Answer, OnEvent, OnRequest


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "pages"])
@pytest.mark.parametrize("fault", [OnEvent.GONE, OnEvent.GARBLE])
def test_a_watch_that_ends_in_doubt_is_followed_by_a_list(api: ApiServer, follow: Follow, fault: OnEvent, stream: bool):
    api.put(service("old"))
    seen = follow(stream=stream)
    api.faults.add(fault, resource="services")

    with api.store.changed:  # both before the watch can send the first of them
        api.delete("Service", "old")
        api.put(service("new"))

    seen.until(lambda: seen.lists() == 2 and seen.names() == {"default/new"})
    assert seen.lists("EndpointSlice") == 1
    assert seen.complaints() == []


@pytest.mark.parametrize("verb", ["list", "watch"])
@pytest.mark.parametrize(
    "name",
    [b'"x","managedFields":' + b"[" * 5000 + b"]" * 5000, b'"\xff"'],
    ids=["nested deeply", "no UTF-8"],
)
def test_after_an_object_that_nobody_can_read_the_next_ones_are_read(
    api: ApiServer, follow: Follow, verb: str, name: bytes
):
    body = {
        "list": b'{"metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":%s},"spec":{}}]}\n' % name,
        "watch": b'{"type":"ADDED","object":{"metadata":{"name":%s},"spec":{}}}\n' % name,
    }
    api.faults.add(Answer(200, body=body[verb]), resource="services", verb=verb)
    seen = follow(stream=False)

    api.put(service("next"))

    seen.until(lambda: seen.names() == {"default/next"})


def test_a_version_that_the_server_has_forgotten_is_followed_by_a_list(api: ApiServer, follow: Follow):
    api.put(service("old"))
    seen = follow()

    api.down()
    api.delete("Service", "old")
    api.put(service("new"))
    api.compact()
    api.up()

    seen.until(lambda: seen.names() == {"default/new"} and seen.lists() == 2)


def test_a_list_that_expires_between_its_pages_is_asked_for_in_one_piece(api: ApiServer):
    api.put_all(service(f"web-{number}") for number in range(5))
    seen = Recorder()

    def sink(event: Event) -> None:
        if isinstance(event, Changed) and not seen.names():  # the first page is here, the second not asked for yet
            api.compact()
        seen(event)

    source = ApiServerSource(
        connect(master=api.url), node_name="node-1", pace=Pace(page=2, first_retry=0.02), stream=False
    )
    source.start(sink)
    seen.until(lambda: seen.lists())
    source.stop()

    assert seen.names() == {f"default/web-{number}" for number in range(5)}
    limits = [r.query.get("limit") for r in api.requests if r.path == "/api/v1/services" and "watch" not in r.query]
    assert limits == ["2", "2", None]
    assert seen.complaints() == []


def test_a_connection_cut_within_an_event_loses_nothing_and_needs_no_list(api: ApiServer, follow: Follow):
    seen = follow()
    api.faults.add(OnEvent.DROP_MID_EVENT, resource="services")

    api.put(service("web"))

    seen.until(lambda: seen.names() == {"default/web"})
    assert seen.lists() == 1
    [complaint] = seen.complaints()
    assert complaint.startswith(f"WATCH {api.url}/api/v1/services: the connection was cut; trying again in 0.")
    assert complaint.endswith("until then what is known stays in force")


def test_a_connection_that_has_gone_silent_is_given_up(api: ApiServer, follow: Follow):
    seen = follow(pace=Pace(silence=0.3, first_retry=0.02))
    api.faults.add(OnEvent.FREEZE, resource="services")

    api.put(service("web"))

    seen.until(lambda: seen.names() == {"default/web"})
    assert seen.lists() == 1


def test_a_server_that_takes_requests_and_does_not_answer_is_reported(api: ApiServer, follow: Follow):
    api.put(service("web"))
    seen = follow(pace=Pace(silence=0.2, stream_silence=0.2, list_silence=0.2, first_retry=0.02))
    api.faults.add(OnRequest.HANG, times=None)

    seen.until(lambda: seen.complaints(), "silence of the server is noticed")
    assert "no word from the server" in seen.complaints()[0]
    assert seen.names() == {"default/web"}

    api.faults.clear()
    api.put(service("later"))
    seen.until(lambda: seen.names() == {"default/web", "default/later"})


def test_an_event_that_was_never_sent_is_made_up_for_by_the_next_list(api: ApiServer, follow: Follow):
    api.put(service("old"))
    seen = follow(pace=Pace(relist=1.0, first_retry=0.02))
    api.faults.add(OnEvent.SWALLOW, resource="services")

    api.delete("Service", "old")

    seen.until(lambda: seen.names() == set(), "the Service is found to be gone")
    assert seen.lists() > 1
    assert seen.complaints() == []


def test_a_server_that_is_down_at_the_start_is_waited_for(api: ApiServer, follow: Follow, logs: list[EventDict]):
    api.put(service("web"))
    api.down()

    seen = follow(wait=False)
    seen.until(lambda: len(seen.complaints()) > 4)
    assert "Connection refused; trying again in 0." in seen.complaints()[0]
    assert not seen.lists()
    api.up()

    seen.until(lambda: seen.names() == {"default/web"} and seen.lists() == 1)
    warnings = [entry for entry in logs if entry["log_level"] == "warning" and entry["kind"] == "Service"]
    assert len(warnings) == 1, "repeated failures are not repeated in the log"


def test_an_outage_keeps_what_is_known_and_ends_with_what_has_changed(
    api: ApiServer, follow: Follow, logs: list[EventDict]
):
    api.put(service("web"))
    seen = follow()

    api.down()
    seen.until(lambda: seen.complaints())
    assert seen.names() == {"default/web"}
    api.put(service("new"))
    api.up()

    seen.until(lambda: seen.names() == {"default/web", "default/new"})
    assert seen.lists() == 1, "the history was still there, so no list was needed"
    assert {"event": "the API server answers again", "kind": "Service", "server": api.url, "log_level": "info"} in logs


def test_the_attempts_become_rarer_up_to_the_limit(api: ApiServer):
    api.down()
    seen = Recorder()
    pace = Pace(first_retry=0.01, longest_retry=0.08)
    source = ApiServerSource(
        connect(master=api.url, qps=-1), node_name="node-1", pace=pace, randomness=_Highest(), clock=time.monotonic
    )
    began = time.monotonic()
    source.start(seen)
    seen.until(lambda: len(seen.complaints()) >= 6)  # after 0.01 + 0.02 + 0.04 + 0.08 + 0.08 seconds
    took = time.monotonic() - began
    source.stop()

    assert 0.23 <= took < 2.0


def test_after_a_success_the_attempts_begin_quickly_again(api: ApiServer):
    seen = Recorder()
    pace = Pace(first_retry=0.1, longest_retry=0.4)
    source = ApiServerSource(connect(master=api.url, qps=-1), node_name="node-1", pace=pace, randomness=_Highest())
    source.start(seen)
    seen.until(lambda: seen.complete)
    api.down()
    seen.until(lambda: len(seen.complaints()) >= 3)
    api.up()
    api.put(service("web"))
    seen.until(lambda: seen.names() == {"default/web"})
    before = len(seen.complaints())
    api.down()
    seen.until(lambda: len(seen.complaints()) > before)
    source.stop()

    assert ["in 0.1 s" in complaint for complaint in seen.complaints()[:3]] == [True, False, False]
    assert "in 0.4 s" in seen.complaints()[2]
    assert "in 0.1 s" in seen.complaints()[before]


def test_retry_after_is_obeyed(api: ApiServer, follow: Follow):
    api.faults.add(Answer(429, (("Retry-After", "7"),)), resource="services")

    seen = follow(wait=False)

    seen.until(lambda: seen.complaints())
    assert "429" in seen.complaints()[0]
    assert "trying again in 7.0 s" in seen.complaints()[0]


def test_kinds_that_are_forbidden_or_unknown_to_the_server_count_as_empty(
    api: ApiServer, follow: Follow, logs: list[EventDict]
):
    api.put(service("web"))
    api.put({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}})
    api.faults.add(Answer(403), resource="servicecidrs", times=3)

    seen = follow(pace=Pace(missing_retry=0.05, first_retry=0.02))
    assert seen.names("Service") == {"default/web"}
    seen.until(lambda: seen.names("ServiceCIDR") == {"/kubernetes"}, "it is found once it may be read")
    assert seen.complaints("ServiceCIDR") == []

    told = [entry for entry in logs if entry["event"].startswith("this kind is not served to us")]
    assert len(told) == 1
    assert told[0]["kind"] == "ServiceCIDR"
    assert "403" in told[0]["error"]


def test_a_kind_that_is_forbidden_after_it_was_known_stays_as_it_was(api: ApiServer, follow: Follow):
    api.put({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}})
    seen = follow()
    api.faults.add(Answer(403), resource="servicecidrs", times=None)

    api.down()
    api.up()

    seen.until(lambda: "403" in str(seen.complaints("ServiceCIDR")))
    assert seen.names("ServiceCIDR") == {"/kubernetes"}


def test_services_that_are_forbidden_are_a_failure(api: ApiServer, follow: Follow):
    api.faults.add(Answer(403), resource="services", times=None)

    seen = follow(wait=False)

    seen.until(lambda: seen.complaints() and seen.lists("EndpointSlice"))
    assert "403 Forbidden: the server answers 403 by order of the test; trying again in" in seen.complaints()[0]
    assert not seen.lists("Service")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "pages"])
def test_a_malformed_object_in_a_list_is_named_and_the_others_go_on(
    api: ApiServer, follow: Follow, logs: list[EventDict], stream: bool
):
    api.put(service("good"))
    api.put(service("bad", ports=[{"port": "http"}]))

    seen = follow(stream=stream)

    assert seen.names() == {"default/good"}
    assert [entry["error"] for entry in logs if entry["log_level"] == "warning"] == [
        "Service default/bad: spec.ports[0].port: Expected int, got str"
    ]


def test_an_object_whose_metadata_is_malformed_is_named_and_removed_when_it_goes(
    api: ApiServer, follow: Follow, logs: list[EventDict]
):
    api.put(service("web"))
    seen = follow()
    malformed = service("web")
    malformed["metadata"]["annotations"] = {"replicas": 3}

    api.put(malformed)
    api.put(service("next"))
    seen.until(lambda: seen.names() == {"default/web", "default/next"})
    errors = [entry["error"] for entry in logs if entry["log_level"] == "warning"]
    assert errors == ["Service default/web: metadata.annotations[...]: Expected str, got int"]

    api.delete("Service", "web")
    seen.until(lambda: seen.names() == {"default/next"})


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "pages"])
def test_an_object_that_becomes_malformed_keeps_its_last_good_state_until_it_goes(
    api: ApiServer, follow: Follow, logs: list[EventDict], stream: bool
):
    api.put(service("web", clusterIP="10.96.0.10"))
    seen = follow(stream=stream)

    api.put(service("web", clusterIP=["10.96.0.11"]))
    api.put(service("next"))
    seen.until(lambda: "default/next" in seen.names(), "events after the malformed one")
    assert seen.objects["Service"]["default/web"].spec.cluster_ip == "10.96.0.10"
    assert [e["error"] for e in logs if e["log_level"] == "warning"] == [
        "Service default/web: spec.clusterIP: Expected str, got array"
    ]

    api.faults.add(OnEvent.GONE, resource="services")
    api.delete("Service", "next")
    seen.until(lambda: seen.lists() == 2)
    assert seen.names() == {"default/web"}, "a list that names it does not remove it"

    api.delete("Service", "web")
    seen.until(lambda: seen.names() == set())


def test_a_page_that_is_not_a_list_is_a_failure_that_passes(api: ApiServer, follow: Follow):
    api.put(service("web"))
    api.faults.add(Answer(200, body=b'{"kind":"ServiceList","items":[{"meta'), resource="services", verb="list")

    seen = follow(stream=False)

    assert seen.names() == {"default/web"}
    assert "this is not a list: Input data was truncated" in seen.complaints()[0]


def test_redirects_are_refused(api: ApiServer, follow: Follow):
    with ApiServer() as elsewhere:
        elsewhere.put(service("stolen"))
        location = (("Location", f"{elsewhere.url}/api/v1/services"),)
        api.faults.add(Answer(302, location), resource="services", times=None)

        seen = follow(wait=False)
        seen.until(lambda: len(seen.complaints()) > 1)

        assert elsewhere.requests == []
        assert f"redirects (to {elsewhere.url}/api/v1/services) are not followed" in seen.complaints()[0]


def test_a_watch_that_always_ends_at_once_is_not_repeated_in_a_busy_loop(api: ApiServer, follow: Follow):
    api.faults.add(Answer(200, body=b"\n"), resource="endpointslices", verb="watch", times=None)

    seen = follow(wait=False, stream=False, pace=Pace(first_retry=0.05, longest_retry=30))

    seen.until(lambda: len(seen.complaints("EndpointSlice")) >= 3)
    assert "the watch ended at once" in seen.complaints("EndpointSlice")[0]
    assert len([r for r in api.requests if "endpointslices" in r.path]) <= 6  # a list and three watches, or little more


def test_a_server_that_knows_less_than_we_do_is_listed_again(api: ApiServer, follow: Follow):
    """As after etcd was restored from a backup."""
    api.put_all(service(f"lost-{number}") for number in range(3))
    seen = follow()
    address, port = api.address, api.port
    api.down()

    with ApiServer(address, port) as restored:
        restored.put(service("kept"))
        seen.until(lambda: seen.names() == {"default/kept"})


def test_doubts_that_do_not_end_are_a_failure(api: ApiServer, follow: Follow):
    seen = follow()
    api.faults.add(Answer(410), resource="services", verb="watch", times=None)
    api.bookmark()
    api.faults.add(OnEvent.GONE, resource="services")
    api.put(service("web"))

    seen.until(lambda: len(seen.complaints()) > 1)
    assert "410 Gone: the server answers 410 by order of the test; trying again in" in seen.complaints()[0]
    api.faults.clear()
    seen.until(lambda: seen.names() == {"default/web"})


def test_one_kind_in_trouble_does_not_hold_up_another(api: ApiServer, follow: Follow):
    api.faults.add(OnRequest.HANG, resource="services", times=None)
    api.put(endpoint_slice())

    seen = follow(wait=False)

    seen.until(lambda: seen.names("EndpointSlice") == {"default/web-1"})
    assert not seen.lists("Service")


def test_stop_does_not_wait_for_a_server_that_does_not_answer(api: ApiServer):
    api.faults.add(OnRequest.HANG, times=None)
    seen = Recorder()
    source = ApiServerSource(connect(master=api.url), node_name="node-1", pace=QUICK)
    source.start(seen)
    seen.until(lambda: len(api.requests) == 4)

    began = time.monotonic()
    source.stop()
    took = time.monotonic() - began
    api.faults.clear()

    assert took < 2.0
    assert seen.events == []


class _Highest(random.Random):
    """Draws the highest number each time."""

    def uniform(self, _low: float, high: float) -> float:
        return high
