import threading

import pytest

from kproxy import events
from kproxy.api.client import connect
from kproxy.events import BURST, QUEUE_LENGTH, REFILL_SECONDS, REPEAT_SECONDS, EventRecorder
from kproxy.model import ServiceName
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_faults import Answer
from tests.observe.http_client import eventually
from tests.observe.log_lines import records_of

WEB = ServiceName("shop", "web")


@pytest.fixture
def api(_private_network):
    with ApiServer() as api:
        yield api


class Recording:
    """A recorder that sends to the API server, with what it dropped and how long it waited."""

    def __init__(self, clock, post):
        clock.advance(1_760_000_000.123456)
        self.dropped: list[str] = []
        self.slept: list[float] = []
        self.recorder = EventRecorder(
            "n1", post, dropped=self.dropped.append, clock=clock.monotonic, now=clock.now, sleep=self.slept.append
        )

    def record(self, event: events.Event) -> None:
        self.recorder.record(event)


@pytest.fixture
def recording(api, clock):
    recording = Recording(clock, connect(master=api.url, qps=1000, burst=1000).post)
    yield recording
    recording.recorder.close(5)


def arrived(api: ApiServer, count: int) -> list[dict]:
    assert eventually(lambda: len(api.objects("Event")) >= count)
    return sorted(api.objects("Event"), key=lambda event: event["metadata"]["name"])


def test_starting_is_told_of_the_node(api, recording):
    recording.record(events.starting("n1"))
    [event] = arrived(api, 1)
    assert event["metadata"]["namespace"] == "default"
    assert event["metadata"]["name"].startswith("n1.")
    assert {key: event[key] for key in event if key != "metadata"} == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "eventTime": "2025-10-09T08:53:20.123456Z",
        "reportingController": "kube-proxy",
        "reportingInstance": "kube-proxy-n1",
        "action": "StartKubeProxy",
        "reason": "Starting",
        "regarding": {"kind": "Node", "name": "n1", "uid": "n1"},
        "note": "",
        "type": "Normal",
    }


def test_a_failed_health_check_is_told_of_the_service_in_its_namespace(api, recording):
    recording.record(events.service_healthcheck_failed("n1", WEB, 30999, "address already in use", "u-1"))
    [event] = arrived(api, 1)
    assert event["metadata"]["namespace"] == "shop"
    assert event["regarding"] == {
        "kind": "Service",
        "name": "web",
        "namespace": "shop",
        "uid": "u-1",
        "apiVersion": "v1",
    }
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "FailedToStartServiceHealthcheck", "Listen")
    assert event["note"] == 'node n1 failed to start healthcheck "shop/web" on port 30999: address already in use'


@pytest.mark.parametrize(
    ("event", "reason", "about"),
    [
        (events.proxier_healthcheck_failed("n1", "in use"), "FailedToStartProxierHealthcheck", "Node"),
        (events.metric_server_failed("n1", "in use"), "FailedToStartMetricServer", "Node"),
        (events.service_quarantined("n1", WEB, "no such thing"), "ServiceQuarantined", "Service"),
        (events.drift_repaired("n1", "3 entries"), "DriftRepaired", "Node"),
    ],
)
def test_reasons(api, recording, event, reason, about):
    recording.record(event)
    [sent] = arrived(api, 1)
    assert (sent["reason"], sent["regarding"]["kind"], sent["type"]) == (reason, about, "Warning")


def test_the_same_again_is_only_counted_and_told_with_its_count_later(api, recording, clock):
    event = events.service_quarantined("n1", WEB, "refused")
    for _ in range(5):
        recording.record(event)
    assert recording.dropped == ["repeated"] * 4
    clock.advance(REPEAT_SECONDS)
    recording.record(event)
    first, second = arrived(api, 2)
    assert "series" not in first
    assert second["series"] == {"count": 5, "lastObservedTime": second["eventTime"]}


def test_a_storm_of_different_events_is_cut_short(api, recording, clock):
    for number in range(BURST + 10):
        recording.record(events.service_quarantined("n1", ServiceName("shop", f"s{number}"), "refused"))
    assert recording.dropped == ["rate"] * 10
    assert len(arrived(api, BURST)) == BURST
    clock.advance(REFILL_SECONDS)
    recording.record(events.drift_repaired("n1", "one"))
    recording.record(events.drift_repaired("n1", "two"))
    assert len(arrived(api, BURST + 1)) == BURST + 1
    assert recording.dropped == ["rate"] * 11


def test_a_server_in_trouble_is_asked_again(api, recording):
    api.faults.add(Answer(503), resource="events", verb="create")
    api.faults.add(Answer(429), resource="events", verb="create")
    recording.record(events.starting("n1"))
    assert len(arrived(api, 1)) == 1
    assert recording.slept == [5, 10]
    assert recording.dropped == []


def test_a_refusal_is_not_repeated_and_the_next_event_is_sent(api, recording):
    api.faults.add(Answer(403), resource="events", verb="create")
    recording.record(events.starting("n1"))
    recording.record(events.drift_repaired("n1", "3 entries"))
    [event] = arrived(api, 1)
    assert event["reason"] == "DriftRepaired"
    assert recording.dropped == ["refused"]
    assert recording.slept == []


def test_without_a_server_the_event_is_given_up_and_the_proxy_goes_on(api, recording):
    api.down()
    recording.record(events.starting("n1"))
    assert eventually(lambda: recording.dropped == ["unreachable"], 20)
    api.up()
    recording.record(events.drift_repaired("n1", "3 entries"))
    assert [event["reason"] for event in arrived(api, 1)] == ["DriftRepaired"]


def test_a_transport_that_raises_harms_nobody(clock):
    def post(path: str, body: bytes) -> int:
        raise ValueError("broken")

    recording = Recording(clock, post)
    recording.record(events.starting("n1"))
    assert eventually(lambda: recording.dropped == ["unreachable"])
    recording.recorder.close(5)


def test_recording_never_waits_for_a_server_that_hangs(clock):
    hang = threading.Event()
    recording = Recording(clock, lambda *_: hang.wait(10) and 201)
    for number in range(QUEUE_LENGTH + 20):
        clock.advance(REFILL_SECONDS)
        recording.record(events.drift_repaired("n1", f"{number} entries"))
    assert set(recording.dropped) == {"queue"}
    assert 18 <= len(recording.dropped) <= 20
    hang.set()


def test_names_are_never_used_twice_even_if_the_clock_stands(api, recording):
    for number in range(3):
        recording.record(events.drift_repaired("n1", f"{number} entries"))
    assert len({event["metadata"]["name"] for event in arrived(api, 3)}) == 3


def test_a_long_note_is_cut_to_what_the_api_takes(api, recording):
    recording.record(events.service_quarantined("n1", WEB, "é" * 2000))
    [event] = arrived(api, 1)
    assert 1020 <= len(event["note"].encode()) <= 1024


def test_closing_sends_what_is_queued(api, recording):
    for number in range(5):
        recording.record(events.drift_repaired("n1", f"{number} entries"))
    recording.recorder.close(5)
    assert len(api.objects("Event")) == 5


def test_without_an_api_server_events_are_logged():
    [line] = records_of("""
        from kproxy import events
        from kproxy.model import ServiceName
        logs.configure("json", 0)
        recorder = events.EventRecorder("n1", None, dropped=print)
        recorder.record(events.service_quarantined("n1", ServiceName("shop", "web"), "refused"))
        recorder.close(1)
    """)
    assert (line["reason"], line["object"]) == ("ServiceQuarantined", "Service shop/web")
    assert line["note"] == "node n1 leaves this Service out until it changes: refused"
