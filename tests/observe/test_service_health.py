import errno
import json
import socket

import msgspec
import pytest

from kproxy.api.events import Changed, Listed
from kproxy.api.objects import EndpointSlice, Service
from kproxy.cluster import ClusterState
from kproxy.health.services import ServiceHealthChecks
from kproxy.http.address import ListenAddress
from kproxy.http.message import text
from kproxy.model import Family, ServiceName
from kproxy.reconcile import summarise
from tests.observe.http_client import refused, request

WEB = ServiceName("shop", "web")
DB = ServiceName("shop", "db")


class Checks(ServiceHealthChecks):
    """Health checks with what they are told and what they tell."""

    def __init__(self, server, family=Family.IPv4, addresses=None):
        self.proxy_healthy, self.addresses = True, addresses
        self.failures: list[tuple[ServiceName, int, int]] = []
        super().__init__(
            server,
            family,
            lambda: self.addresses,
            proxy_healthy=lambda: self.proxy_healthy,
            listen_failed=lambda service, port, error: self.failures.append((service, port, error.errno)),
        )


@pytest.fixture
def checks(server) -> Checks:
    return Checks(server)


def test_body_and_headers_are_kube_proxys_to_the_byte(checks):
    checks.sync_services({WEB: 30999})
    checks.sync_endpoints({WEB: 3})
    reply = request(30999, "/anything", method="POST")
    assert reply.status == 200
    assert reply.body == (
        b'{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        b'\t"localEndpoints": 3,\n\t"serviceProxyHealthy": true\n}'
    )
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "3"


def test_no_endpoints_or_an_unhealthy_proxy_turn_the_load_balancer_away(checks):
    checks.sync_services({WEB: 30999})
    assert request(30999).status == 503
    checks.sync_endpoints({WEB: 1})
    assert request(30999).status == 200
    checks.proxy_healthy = False
    reply = request(30999)
    assert reply.status == 503
    assert json.loads(reply.body)["serviceProxyHealthy"] is False
    checks.proxy_healthy = True
    checks.sync_endpoints({})
    assert request(30999).status == 503


def test_a_removed_service_stops_listening_and_its_port_can_be_another_services(checks):
    checks.sync_services({WEB: 30999})
    checks.sync_services({DB: 30999})
    assert json.loads(request(30999).body)["service"]["name"] == "db"
    checks.sync_services({})
    assert refused(30999)


def test_two_services_may_swap_their_ports_in_one_sync(checks):
    checks.sync_services({WEB: 30001, DB: 30002})
    checks.sync_services({WEB: 30002, DB: 30001})
    assert checks.failures == []
    assert json.loads(request(30001).body)["service"]["name"] == "db"
    assert json.loads(request(30002).body)["service"]["name"] == "web"


def test_ports_move_with_the_nodes_addresses(server):
    checks = Checks(server, addresses=("127.0.0.2",))
    checks.sync_services({WEB: 30999})
    assert refused(30999)
    checks.addresses = ("127.0.0.2", "127.0.0.1")
    checks.sync_services({WEB: 30999})
    assert request(30999).status == 503
    assert checks.failures == []


def test_a_service_that_stays_is_not_interrupted(checks):
    checks.sync_services({WEB: 30999})
    checks.sync_endpoints({WEB: 2})
    with socket.create_connection(("127.0.0.1", 30999), timeout=5) as client:
        checks.sync_services({WEB: 30999, DB: 30998})
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"200 OK" in client.recv(4096)


def test_a_port_in_use_is_reported_others_are_served_and_the_next_sync_tries_again(checks):
    with socket.create_server(("0.0.0.0", 30999)):
        checks.sync_services({WEB: 30999, DB: 30998})
        checks.sync_endpoints({WEB: 1, DB: 1})
        assert checks.failures == [(WEB, 30999, errno.EADDRINUSE)]
        assert request(30998).status == 200
    checks.sync_services({WEB: 30999, DB: 30998})
    checks.sync_endpoints({WEB: 1, DB: 1})
    assert request(30999).status == 200
    assert len(checks.failures) == 1


def test_if_one_address_fails_the_others_of_the_service_are_closed(server):
    checks = Checks(server, addresses=["127.0.0.1", "127.0.0.2"])
    with socket.create_server(("127.0.0.2", 30999)):
        checks.sync_services({WEB: 30999})
    assert refused(30999, "127.0.0.1")
    assert len(checks.failures) == 1
    assert checks.listening == {}


def test_chosen_addresses_only(server):
    checks = Checks(server, addresses=["127.0.0.2"])
    checks.sync_services({WEB: 30999})
    assert request(30999, host="127.0.0.2").status == 503
    assert refused(30999, "127.0.0.1")


def test_both_families_listen_on_the_same_port_and_count_their_own(server):
    four, six = Checks(server), Checks(server, Family.IPv6)
    for checks, count in ((four, 1), (six, 2)):
        checks.sync_services({WEB: 30999})
        checks.sync_endpoints({WEB: count})
    assert request(30999, host="127.0.0.1").headers["X-Load-Balancing-Endpoint-Weight"] == "1"
    assert request(30999, host="::1").headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert four.failures + six.failures == []


def test_a_service_cannot_take_the_proxys_own_port(server, checks):
    server.listen(ListenAddress("0.0.0.0", 10256), lambda _: text(200, "proxy"))
    checks.sync_services({WEB: 10256})
    assert checks.failures == [(WEB, 10256, errno.EADDRINUSE)]
    assert request(10256).body == b"proxy"


def test_recorded_cases(health_cases, server):
    cases = json.loads(health_cases.read_text())["service_health"]
    requests = 0
    for case in cases:
        wildcard = case["listen_addresses"] == ["0.0.0.0"]
        family = Family.IPv6 if case["listen_network"] == "tcp6" else Family.IPv4
        checks = Checks(server, family, None if wildcard else case["listen_addresses"])
        for step in case["steps"]:
            match step:
                case {"sync_services": ports}:
                    checks.sync_services(by_name(ports))
                case {"sync_local_endpoints": counts}:
                    checks.sync_endpoints(by_name(counts))
            listening = checks.listening
            assert {name: port for name, (port, _) in listening.items()} == by_name(step["expected_listening"])
            assert {name: n for name, (_, n) in listening.items()} == by_name(step["expected_local_endpoints"])
            for expected in step["requests"]:
                checks.proxy_healthy = expected["proxy_healthy"]
                reply = request(step["expected_listening"][expected["service"]], expected["path"])
                assert reply.status == expected["expected_status"], expected
                assert expected["expected_headers"].items() <= dict(reply.headers).items()
                assert json.loads(reply.body) == expected["expected_body"]
                requests += 1
        checks.sync_services({})
    assert requests >= 20


def test_recorded_counts_of_local_endpoints(health_cases):
    for case in json.loads(health_cases.read_text())["local_ready_endpoints"]:
        state = ClusterState(case["node_name"], note=pytest.fail)
        for kind in ("Service", "EndpointSlice"):
            state.apply(Listed(kind, frozenset()))
        for step in case["steps"]:
            for item in step["apply"]:
                state.apply(Changed(item["kind"], decode(item)))
            counts = {s: sum(dict(summarise(state.routes(s)).ready_here).values()) for s in state.services()}
            assert {s: n for s, n in counts.items() if n} == by_name(step["expected_local_ready_endpoints"])


def decode(item):
    """The recorded object; its Service has no valid port and no health check, which would make it count nothing."""
    if item["kind"] == "Service":
        item["spec"]["ports"][0] |= {"port": 80, "nodePort": 30080}
        item["spec"] |= {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30999}
    return msgspec.convert(item, {"Service": Service, "EndpointSlice": EndpointSlice}[item["kind"]])


def by_name(recorded: dict[str, int]) -> dict[ServiceName, int]:
    return {ServiceName(*name.split("/")): value for name, value in recorded.items()}
