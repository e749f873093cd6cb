import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kproxy.metrics.connections import ConnectionCounters, Reading
from kproxy.metrics.families import (
    IptablesMetrics,
    NftablesMetrics,
    OwnMetrics,
    ProxyMetrics,
    Registry,
    StateAge,
    register_process,
)
from kproxy.model import Endpoint, Family, Frontend, Protocol, ServicePortName

SYNC_LE = [0.001 * 2**k for k in range(15)]


@pytest.fixture
def registry() -> Registry:
    return Registry()


def exposed(registry) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """What a scrape shows: by sample name, the value for each set of labels."""
    shown: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            shown.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return shown


ACCOUNTED = ("ct_state_invalid_dropped", "localhost_nodeports_accepted")


def use_iptables(metrics: IptablesMetrics) -> None:
    for counter in (metrics.failures, metrics.partial_failures):
        counter.labels("IPv4").inc()
    for gauge in (metrics.rules, metrics.written):
        gauge.labels("nat", "IPv4").set(1)


def use_everything(proxy: ProxyMetrics, nftables: NftablesMetrics, own: OwnMetrics) -> None:
    for family in Family:
        for histogram in (
            proxy.sync_duration,
            proxy.full_sync_duration,
            proxy.partial_sync_duration,
            proxy.conntrack_duration,
        ):
            histogram.labels(family.name).observe(0.003)
        for gauge in (proxy.last_sync, proxy.last_queued):
            gauge.labels(family.name).set_to_current_time()
        proxy.observe_network_programming(family, 0.4)
        proxy.no_local_endpoints.labels("internal", family.name).set(1)
        proxy.no_local_endpoints.labels("external", family.name).set(2)
        for counter in (proxy.conntrack_deleted, nftables.sync_failures, nftables.cleanup_failures):
            counter.labels(family.name).inc()
    proxy.count_probe("/healthz", 503)
    proxy.count_probe("/livez", 200)
    proxy.rest_requests.labels("200", "GET", "api:6443").inc()
    proxy.rest_duration.labels("GET", "api:6443").observe(0.01)
    proxy.feature_enabled.labels("NFTablesProxyMode", "").set(1)
    own.events_dropped.labels("queue").inc()


def test_names_types_and_labels_are_kube_proxys(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    found = {
        (family.name, family.type, tuple(sorted({label for s in family.samples for label in s.labels} - {"le"})))
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        if family.name.startswith("kubeproxy_")
    }
    prefix = "kubeproxy_sync_proxy_rules_"
    family = ("ip_family",)
    assert found == {
        (f"{prefix}duration_seconds", "histogram", family),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds", "histogram", family),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds", "histogram", family),
        (f"{prefix}last_timestamp_seconds", "gauge", family),
        (f"{prefix}last_queued_timestamp_seconds", "gauge", family),
        ("kubeproxy_network_programming_duration_seconds", "histogram", family),
        (f"{prefix}endpoint_changes_pending", "gauge", ()),
        (f"{prefix}endpoint_changes", "counter", ()),
        (f"{prefix}service_changes_pending", "gauge", ()),
        (f"{prefix}service_changes", "counter", ()),
        (f"{prefix}no_local_endpoints_total", "gauge", ("ip_family", "traffic_policy")),
        ("kubeproxy_conntrack_reconciler_sync_duration_seconds", "histogram", family),
        ("kubeproxy_conntrack_reconciler_deleted_entries", "counter", family),
        ("kubeproxy_proxy_healthz", "counter", ("code",)),
        ("kubeproxy_proxy_livez", "counter", ("code",)),
        (f"{prefix}nftables_sync_failures", "counter", family),
        (f"{prefix}nftables_cleanup_failures", "counter", family),
    }


def test_counters_are_exposed_with_total(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    shown = exposed(registry)
    assert shown["kubeproxy_proxy_healthz_total"] == {(("code", "503"),): 1}
    assert shown["kubeproxy_proxy_livez_total"] == {(("code", "200"),): 1}
    assert shown["kubeproxy_sync_proxy_rules_nftables_sync_failures_total"] == {
        (("ip_family", "IPv4"),): 1,
        (("ip_family", "IPv6"),): 1,
    }


def test_labelled_families_appear_with_their_first_use(registry):
    proxy = ProxyMetrics(registry)
    NftablesMetrics(registry)
    assert not [name for name in exposed(registry) if "partial" in name or "healthz" in name or "failures" in name]
    assert b"partial" not in generate_latest(registry)  # no HELP or TYPE of an empty family either
    proxy.partial_sync_duration.labels("IPv4").observe(0.1)
    assert exposed(registry)["kubeproxy_sync_partial_proxy_rules_duration_seconds_count"] == {
        (("ip_family", "IPv4"),): 1
    }


def test_no_creation_times_are_exposed(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    assert "_created" not in generate_latest(registry).decode()


def buckets(registry, name: str) -> dict[float, float]:
    return {float(dict(labels)["le"]): value for labels, value in exposed(registry)[f"{name}_bucket"].items()}


def test_sync_buckets(registry):
    ProxyMetrics(registry).sync_duration.labels("IPv4").observe(0.0015)
    found = buckets(registry, "kubeproxy_sync_proxy_rules_duration_seconds")
    assert list(found) == pytest.approx([*SYNC_LE, float("inf")])
    assert list(found.values()) == [0] + [1] * 15


def test_network_programming_buckets(registry):
    ProxyMetrics(registry).observe_network_programming(Family.IPv6, 61)
    found = buckets(registry, "kubeproxy_network_programming_duration_seconds")
    bounds = [0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), 120, 150, 180, 210, 240, 270, 300, float("inf")]
    assert list(found) == bounds
    assert min(bound for bound, count in found.items() if count) == 65


def test_a_trigger_time_in_the_future_is_counted_in_the_lowest_bucket(registry):
    ProxyMetrics(registry).observe_network_programming(Family.IPv4, -7.5)
    assert buckets(registry, "kubeproxy_network_programming_duration_seconds")[0] == 1
    assert exposed(registry)["kubeproxy_network_programming_duration_seconds_sum"] == {(("ip_family", "IPv4"),): 0}


def test_openmetrics_exposition_parses_too(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    register_process(registry, "0.1.0", "v1.36.2")
    names = {family.name for family in parse_openmetrics(openmetrics(registry).decode())}
    assert {"kubeproxy_proxy_healthz", "kproxy_drift_detected", "kubernetes_build_info"} <= names


def test_drift_is_zero_before_it_happens_so_that_the_first_is_an_increase(registry):
    OwnMetrics(registry)
    assert exposed(registry)["kproxy_drift_detected_total"] == {
        (("found", "changed"),): 0,
        (("found", "foreign"),): 0,
        (("found", "missing"),): 0,
    }


def test_help_is_given_for_every_family(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    text = generate_latest(registry).decode()
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert types
    assert [name for name in types if not re.search(rf"^# HELP {name} \S", text, re.MULTILINE)] == []


def test_state_age_grows_until_the_source_is_heard_of(registry, clock):
    age = StateAge(registry, ["Service", "EndpointSlice"], clock=clock.monotonic)
    clock.advance(40)
    age.alive("Service")
    clock.advance(2)
    assert exposed(registry)["kproxy_state_age_seconds"] == {
        (("kind", "EndpointSlice"),): 42,
        (("kind", "Service"),): 2,
    }


def test_process_and_build_are_described(registry):
    register_process(registry, "0.1.0", "v1.36.2")
    shown = exposed(registry)
    assert shown["process_resident_memory_bytes"][()] > 0
    [labels] = shown["kubernetes_build_info"]
    assert dict(labels)["git_version"] == "v1.36.2"
    assert (dict(labels)["major"], dict(labels)["minor"]) == ("1", "36")
    [labels] = shown["kproxy_build_info"]
    assert dict(labels)["version"] == "0.1.0"


def test_a_mode_adds_a_family_in_one_line(registry):
    failures = Counter("kubeproxy_x_failures_total", "A mode's own", ["ip_family"], registry=registry)
    failures.labels("IPv4").inc()
    assert exposed(registry)["kubeproxy_x_failures_total"] == {(("ip_family", "IPv4"),): 1}


def test_registries_do_not_share_anything():
    first, second = Registry(), CollectorRegistry()
    ProxyMetrics(first).count_probe("/livez", 200)
    ProxyMetrics(second)
    assert "kubeproxy_proxy_livez_total" not in exposed(second)


def test_the_documentation_names_exactly_what_is_exposed(registry):
    use_everything(ProxyMetrics(registry), NftablesMetrics(registry), OwnMetrics(registry))
    StateAge(registry, ["Service"])
    register_process(registry, "0.1.0", "v1.36.2")
    use_iptables(IptablesMetrics(registry))
    pod = Endpoint("10.0.0.1", 80)
    port = ServicePortName("a", "b", "c", Protocol.TCP)
    vip = Frontend(Family.IPv4, "10.96.0.1", Protocol.TCP, 80)
    ConnectionCounters(registry, lambda: [Reading(port, vip, 1, 1), Reading(port, pod, 2, 1)], 10)
    text = generate_latest(registry).decode()
    names = r"(?:kubeproxy|kproxy|kubernetes|rest_client)_[a-z_]+"
    found = set(re.findall(rf"^# TYPE ({names})", text, re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    # The counters of nfacct are there while rules refer to them.
    accounted = {f"kubeproxy_iptables_{what}_packets_total" for what in ACCOUNTED}
    assert found | accounted == set(re.findall(rf"\b{names}\b", page))
