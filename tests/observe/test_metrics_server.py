import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kproxy.http.address import ListenAddress
from kproxy.metrics.families import ProxyMetrics, Registry
from kproxy.metrics.server import metrics_handler
from tests.observe.http_client import request

PATHS = ["/configz", "/healthz", "/metrics", "/metrics/slis", "/proxyMode"]
TEXT = "text/plain; charset=utf-8"


class Configuration(msgspec.Struct, rename="camel"):
    bind_address: str = "0.0.0.0"


@pytest.fixture
def serve(server):
    def start(**options) -> int:
        registry = Registry()
        ProxyMetrics(registry).count_probe("/healthz", 200)
        handler = metrics_handler(registry, "nftables", Configuration(), **options)
        return server.listen(ListenAddress("127.0.0.1", 0), handler).address.port

    return start


def test_metrics_as_text(serve):
    reply = request(serve(), "/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name for family in text_string_to_metric_families(reply.body.decode())}
    assert "kubeproxy_proxy_healthz" in families


def test_metrics_as_openmetrics_for_those_who_accept_it(serve):
    reply = request(serve(), "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1"})
    assert reply.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert "kubeproxy_proxy_healthz" in {family.name for family in parse_openmetrics(reply.body.decode())}


def test_metrics_are_compressed_for_those_who_accept_it(serve):
    reply = request(serve(), "/metrics", headers={"Accept-Encoding": "gzip"})
    assert reply.headers["Content-Encoding"] == "gzip"
    assert b"kubeproxy_proxy_healthz_total" in gzip.decompress(reply.body)


def test_many_scrapes_at_once_are_all_complete(serve):
    port = serve()
    with ThreadPoolExecutor(16) as pool:
        bodies = set(pool.map(lambda _: request(port, "/metrics").body, range(64)))
    assert len(bodies) == 1


def test_healthz_is_always_ok(serve):
    reply = request(serve(), "/healthz")
    assert (reply.status, reply.body) == (200, b"ok")
    assert reply.headers["Content-Type"] == TEXT
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_slis_are_an_empty_set(serve):
    reply = request(serve(), "/metrics/slis")
    assert (reply.status, reply.body) == (200, b"")


def test_proxy_mode(serve):
    reply = request(serve(), "/proxyMode")
    assert (reply.status, reply.body) == (200, b"nftables")
    assert reply.headers["Content-Type"] == TEXT
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_configz_is_the_configuration_under_kube_proxys_key(serve):
    reply = request(serve(), "/configz")
    assert reply.headers["Content-Type"] == "application/json"
    assert json.loads(reply.body) == {"kubeproxy.config.k8s.io": {"bindAddress": "0.0.0.0"}}


def test_other_paths_are_told_which_there_are(serve):
    reply = request(serve(), "/metric")
    assert reply.status == 404
    assert json.loads(reply.body) == {"paths": PATHS}


def test_debug_pages_are_not_there_unless_told(serve):
    port = serve()
    for path in ("/flagz", "/statusz", "/debug/flags/v", "/debug/pprof/goroutine"):
        assert request(port, path).status == 404


def test_flags_and_status(serve):
    port = serve(flags={"v": "2"}, status=lambda: {"Version": "0.1.0"})
    assert b"\nv=2\n" in request(port, "/flagz").body
    status = request(port, "/statusz").body
    assert b"\nVersion=0.1.0\n" in status
    assert b"/proxyMode" in status


def test_profiling_shows_what_every_thread_does(serve):
    reply = request(serve(set_verbosity=print), "/debug/pprof/goroutine?debug=2")
    assert reply.status == 200
    assert b"thread MainThread:" in reply.body
    assert b"test_profiling_shows_what_every_thread_does" in reply.body


def test_verbosity_is_changed_by_put(serve):
    said = []
    port = serve(set_verbosity=said.append)
    assert request(port, "/debug/flags/v", method="PUT", body=b"7").status == 200
    assert request(port, "/debug/flags/v", method="PUT", body=b"loud").status == 400
    assert request(port, "/debug/flags/v", body=b"5").status == 406
    assert said == [7]
