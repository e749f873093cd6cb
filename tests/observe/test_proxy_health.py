import json
import re

import pytest

from kproxy.api.objects import Node, NodeSpec, ObjectMeta, Taint
from kproxy.health.proxy import TO_BE_DELETED_TAINT, ProxyHealth, probe_handler, rfc3339
from kproxy.http.address import ListenAddress
from kproxy.model import Family
from tests.observe.http_client import request

SYNC_PERIOD = 30.0
EVERYTHING = (Family.IPv4, Family.IPv6)


def node(*, deleted: bool = False, taints: tuple[str, ...] = ()) -> Node:
    return Node(
        metadata=ObjectMeta(name="n1", deletion_timestamp="2026-01-01T00:00:00Z" if deleted else None),
        spec=NodeSpec(taints=[Taint(key, "NoSchedule") for key in taints]),
    )


class Served:
    """A proxy's health behind its HTTP endpoint."""

    def __init__(self, server, clock, families=EVERYTHING, sync_period=SYNC_PERIOD):
        self.answered: list[tuple[str, int]] = []
        self.health = ProxyHealth(families, sync_period, now=clock.now, monotonic=clock.monotonic)
        handler = probe_handler(self.health, lambda path, status: self.answered.append((path, status)))
        self.port = server.listen(ListenAddress("127.0.0.1", 0), handler).address.port

    def get(self, path: str, **options):
        return request(self.port, path, **options)


@pytest.fixture
def proxy(server, clock) -> Served:
    clock.advance(1_760_000_000)
    served = Served(server, clock)
    served.health.node_changed(node())
    return served


def test_body_is_kube_proxys_to_the_byte(proxy, clock):
    proxy.health.started(Family.IPv4)
    clock.advance(0.25)
    proxy.health.started(Family.IPv6)
    clock.advance(1.000000001)
    assert proxy.get("/healthz").body == (
        b'{"lastUpdated":"2025-10-09T08:53:21.250000001Z","currentTime":"2025-10-09T08:53:21.250000001Z",'
        b'"nodeEligible":true,"healthy":true,"status":{'
        b'"IPv4":{"lastUpdated":"2025-10-09T08:53:20Z","healthy":true},'
        b'"IPv6":{"lastUpdated":"2025-10-09T08:53:20.25Z","healthy":true}}}'
    )


def test_livez_says_nothing_of_the_node(proxy):
    assert proxy.get("/livez").body == (
        b'{"lastUpdated":"2025-10-09T08:53:20Z","currentTime":"2025-10-09T08:53:20Z","healthy":true}'
    )


def test_headers(proxy):
    reply = proxy.get("/healthz")
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_any_method_probes(proxy):
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        assert proxy.get("/healthz", method=method).status == 200


def test_other_paths_do_not_exist(proxy):
    for path in ("/", "/healthz/", "/metrics"):
        assert proxy.get(path).status == 404


def test_before_the_loop_starts_the_proxy_is_healthy_whatever_is_queued(proxy, clock):
    proxy.health.queued(Family.IPv4)
    clock.advance(3600)
    assert proxy.get("/healthz").status == 200


def test_an_unknown_node_is_not_eligible(server, clock):
    proxy = Served(server, clock)
    reply = proxy.get("/healthz")
    assert reply.status == 503
    assert json.loads(reply.body)["nodeEligible"] is False
    assert json.loads(reply.body)["lastUpdated"] == "0001-01-01T00:00:00Z"
    assert proxy.get("/livez").status == 200


def test_a_change_that_waits_for_two_sync_periods_makes_it_unhealthy_until_a_sync_succeeds(proxy, clock):
    proxy.health.started(Family.IPv4)
    proxy.health.queued(Family.IPv4)
    clock.advance(SYNC_PERIOD)
    proxy.health.queued(Family.IPv4)  # the oldest counts
    clock.advance(SYNC_PERIOD - 0.001)
    assert [proxy.get(path).status for path in ("/healthz", "/livez")] == [200, 200]
    clock.advance(0.001)
    assert [proxy.get(path).status for path in ("/healthz", "/livez")] == [503, 503]
    proxy.health.succeeded(Family.IPv4)
    assert [proxy.get(path).status for path in ("/healthz", "/livez")] == [200, 200]


def test_a_day_without_changes_is_healthy(proxy, clock):
    proxy.health.started(Family.IPv4)
    proxy.health.succeeded(Family.IPv4)
    clock.advance(86_400)
    reply = proxy.get("/healthz")
    assert reply.status == 200
    assert json.loads(reply.body)["lastUpdated"] == "2025-10-10T08:53:20Z"


@pytest.mark.parametrize("state", [node(deleted=True), node(taints=("other", TO_BE_DELETED_TAINT))])
def test_a_node_that_goes_is_drained_but_the_proxy_lives(proxy, state):
    proxy.health.node_changed(state)
    assert proxy.get("/healthz").status == 503
    assert proxy.get("/livez").status == 200
    proxy.health.node_changed(node(taints=("other",)))
    assert proxy.get("/healthz").status == 200


def test_ready_only_after_the_first_sync_of_every_family(proxy):
    proxy.health.started(Family.IPv4)
    proxy.health.started(Family.IPv6)
    proxy.health.succeeded(Family.IPv6)
    reply = proxy.get("/readyz")
    assert (reply.status, reply.body) == (503, b'{"ready":false,"waitingFor":["IPv4"]}')
    proxy.health.succeeded(Family.IPv4)
    assert (proxy.get("/readyz").status, proxy.get("/readyz").body) == (200, b'{"ready":true,"waitingFor":[]}')


def test_answers_are_counted(proxy):
    proxy.get("/healthz")
    proxy.health.node_changed(node(deleted=True))
    proxy.get("/healthz")
    proxy.get("/livez")
    proxy.get("/readyz")
    proxy.get("/else")
    assert proxy.answered == [("/healthz", 200), ("/healthz", 503), ("/livez", 200)]


def test_recorded_cases(health_cases, server, clock):
    cases = json.loads(health_cases.read_text())["proxy_health"]
    requests = 0
    for case in cases:
        clock.nanoseconds = 0
        proxy = Served(server, clock, sync_period=case["health_timeout_seconds"] / 2)
        for event in case["events"]:
            clock.nanoseconds = round(event["at"] * 1e9)
            match event["event"]:
                case "change_queued":
                    proxy.health.queued(Family[event["ip_family"]])
                case "sync_done":
                    proxy.health.succeeded(Family[event["ip_family"]])
                case "request":
                    state = event["node"]
                    proxy.health.node_changed(node(deleted=state["deleted"], taints=tuple(state["taints"])))
                    reply = proxy.get(event["path"])
                    assert reply.status == event["expected_status"], event
                    assert in_seconds(json.loads(reply.body)) == event["expected_body"], event
                    assert event["expected_headers"].items() <= dict(reply.headers).items()
                    requests += 1
    assert requests >= 30


def in_seconds(body):
    """The body with its times as seconds of the fake clock, which starts with 1970."""
    match body:
        case dict():
            return {key: in_seconds(value) for key, value in body.items()}
        case str() if clock_time := re.fullmatch(r"1970-01-01T00:(\d\d):(\d\d)Z", body):
            return int(clock_time[1]) * 60.0 + int(clock_time[2])
    return body


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1, "1970-01-01T00:00:00.000000001Z"),
        (1_100_000_000, "1970-01-01T00:00:01.1Z"),
        (1_760_000_000_120_000_000, "2025-10-09T08:53:20.12Z"),
    ],
)
def test_times_have_as_many_digits_as_they_need(nanoseconds, text):
    assert rfc3339(nanoseconds) == text
