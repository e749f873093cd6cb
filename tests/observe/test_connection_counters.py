import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kproxy.metrics.connections import ConnectionCounters, Reading
from kproxy.metrics.families import Registry
from kproxy.model import Endpoint, Family, Frontend, Protocol, ServicePortName

WEB = ServicePortName("shop", "web", "http", Protocol.TCP)
VIP = Frontend(Family.IPv4, "10.96.0.10", Protocol.TCP, 80)
NODE_PORT = Frontend(Family.IPv6, "", Protocol.TCP, 30080)
POD = Endpoint("10.0.0.1", 8080)


class Kernel:
    """Counters that can be read, and may fail to."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.error: OSError | None = None

    def read(self):
        yield from self.readings
        if self.error:
            raise self.error


class Scrape:
    def __init__(self, limit: int = 100) -> None:
        self.kernel = Kernel()
        self.registry = Registry()
        ConnectionCounters(self.registry, self.kernel.read, limit)

    def __call__(self, *readings: Reading) -> dict[str, dict[str, float]]:
        """Totals by sample name, then by frontend or endpoint ("(other)" for the sum of the rest)."""
        self.kernel.readings = list(readings)
        shown: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                key = sample.labels.get("frontend") or sample.labels.get("endpoint") or sample.labels.get("service")
                shown.setdefault(sample.name, {})[key or sample.labels["object"]] = sample.value
        return shown


SERVICES, ENDPOINTS = "kproxy_service_connections_total", "kproxy_endpoint_connections_total"


def test_a_scrape_shows_the_kernels_counters_with_all_labels():
    scrape = Scrape()
    scrape(Reading(WEB, VIP, "s1", 7), Reading(WEB, NODE_PORT, "s2", 3), Reading(WEB, POD, "e1", 4))
    text = generate_latest(scrape.registry).decode()
    common = 'namespace="shop",port="http",protocol="TCP",service="web"} '
    assert f'{SERVICES}{{frontend="10.96.0.10:80",ip_family="IPv4",{common}7.0' in text
    assert f'{SERVICES}{{frontend=":30080",ip_family="IPv6",{common}3.0' in text
    assert f'{ENDPOINTS}{{endpoint="10.0.0.1:8080",ip_family="IPv4",{common}4.0' in text


def test_an_endpoint_behind_several_frontends_is_summed():
    shown = Scrape()(Reading(WEB, POD, "cluster ip slot 0", 4), Reading(WEB, POD, "node port slot 0", 5))
    assert shown[ENDPOINTS] == {"10.0.0.1:8080": 9}


def test_an_endpoint_with_other_conditions_is_the_same_endpoint():
    scrape = Scrape()
    scrape(Reading(WEB, POD, "e", 4))
    assert scrape(Reading(WEB, Endpoint("10.0.0.1", 8080, ready=False), "e", 6))[ENDPOINTS] == {"10.0.0.1:8080": 6}


def test_a_replaced_element_does_not_set_the_total_back():
    scrape = Scrape()
    scrape(Reading(WEB, POD, "a", 100), Reading(WEB, POD, "b", 50))
    shown = scrape(Reading(WEB, POD, "a", 2), Reading(WEB, POD, "b", 60))
    assert shown[ENDPOINTS] == {"10.0.0.1:8080": 162}
    assert scrape(Reading(WEB, POD, "a", 5))[ENDPOINTS] == {"10.0.0.1:8080": 165}
    assert scrape(Reading(WEB, POD, "a", 5), Reading(WEB, POD, "b", 1))[ENDPOINTS] == {"10.0.0.1:8080": 166}


def test_a_service_that_went_is_not_shown_any_more():
    scrape = Scrape()
    scrape(Reading(WEB, VIP, "s", 7))
    assert SERVICES not in scrape()
    assert scrape(Reading(WEB, VIP, "s", 1))[SERVICES] == {"10.96.0.10:80": 1}


def test_what_cannot_be_read_leaves_the_last_figures():
    scrape = Scrape()
    scrape(Reading(WEB, VIP, "s", 7))
    scrape.kernel.error = OSError("interrupted")
    assert scrape(Reading(WEB, VIP, "s", 9))[SERVICES] == {"10.96.0.10:80": 7}
    scrape.kernel.error = None
    assert scrape(Reading(WEB, VIP, "s", 9))[SERVICES] == {"10.96.0.10:80": 9}


def frontend(number: int, packets: int) -> Reading:
    return Reading(WEB, Frontend(Family.IPv4, f"10.96.0.{number}", Protocol.TCP, 80), number, packets)


def test_beyond_the_limit_is_summed_and_counted():
    scrape = Scrape(limit=2)
    shown = scrape(*(frontend(number, 10) for number in range(1, 6)))
    assert shown[SERVICES] == {"10.96.0.1:80": 10, "10.96.0.2:80": 10, "(other)": 30}
    assert shown["kproxy_folded_connection_counters"] == {"service": 3, "endpoint": 0}


def test_series_keep_their_place_below_the_limit_and_free_ones_are_taken():
    scrape = Scrape(limit=2)
    scrape(frontend(1, 1), frontend(2, 1), frontend(3, 1))
    shown = scrape(frontend(3, 2), frontend(2, 2))
    assert shown[SERVICES] == {"10.96.0.2:80": 2, "(other)": 2}
    assert scrape(frontend(3, 3), frontend(2, 3))[SERVICES].keys() == {"10.96.0.2:80", "10.96.0.3:80", "(other)"}


@given(
    st.lists(
        st.dictionaries(st.integers(1, 6), st.integers(0, 100), max_size=6),
        min_size=2,
        max_size=8,
    )
)
def test_no_total_that_stays_ever_falls(history):
    scrape = Scrape(limit=3)
    before: dict[str, float] = {}
    for step in history:
        now = scrape(*(frontend(number, packets) for number, packets in step.items())).get(SERVICES, {})
        for series in before.keys() & now.keys():
            assert now[series] >= before[series]
        before = now


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=20))
def test_every_connection_is_counted_once_however_often_the_element_is_replaced(steps):
    scrape = Scrape()
    counter = total = 0
    for connections, replaced in steps:
        # A replacement that has counted more than its predecessor when it is first read looks like the same counter.
        if replaced and connections < counter:
            counter = 0
        counter += connections
        total += connections
        shown = scrape(Reading(WEB, VIP, "s", counter))
        assert shown[SERVICES] == {"10.96.0.10:80": total}


@pytest.mark.parametrize("object_", ["service", "endpoint"])
def test_nothing_is_folded_without_need(object_):
    assert Scrape()(Reading(WEB, VIP, "s", 1))["kproxy_folded_connection_counters"][object_] == 0
