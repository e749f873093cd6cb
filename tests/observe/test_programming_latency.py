"""How long endpoints waited to be programmed is measured once, and nothing of it is kept."""

from __future__ import annotations

from prometheus_client import generate_latest

from kproxy.metrics.families import OwnMetrics, ProxyMetrics, Registry, StateAge
from kproxy.observers import Measured
from tests.lab.namespaces import Namespace
from tests.reconcile.driven import Part, part
from tests.reconcile.objects import Object, endpoints, web

CHANGED = "2024-05-01T10:00:00Z"
NOW = 1714557602.0  # two seconds later


def triggered(item: Object) -> Object:
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": CHANGED}
    return item | {"metadata": item["metadata"] | {"annotations": annotations}}


def measured(made: Part, registry: Registry) -> Measured:
    return Measured(
        made.reconciler,
        made.reconciler.facts.families,
        proxy=ProxyMetrics(registry),
        own=OwnMetrics(registry),
        age=StateAge(registry, []),
        now=lambda: NOW,
    )


def seconds(registry: Registry) -> str:
    name = 'kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"} '
    return "".join(line.removeprefix(name) for line in generate_latest(registry).decode().split("\n") if name in line)


def test_the_time_from_a_change_of_endpoints_to_the_kernel_is_measured_once(netns: Namespace):
    service, piece = web()
    registry = Registry()
    made = part(netns, service, triggered(piece))
    with made.kernel:
        observer = measured(made, registry)
        observer.sync_done(made.sync(), 0.001)
        observer.sync_done(made.sync(), 0.001)

    assert seconds(registry) == "2.0"


def test_endpoints_without_a_service_gather_no_times(netns: Namespace):
    made = part(netns)
    with made.kernel:
        observer = measured(made, Registry())
        for last in range(1, 20):
            made.put(triggered(endpoints("nobody", f"10.0.0.{last}")))
            observer.sync_done(made.sync(), 0.001)

    assert made.reconciler.state.trigger_times == {}
