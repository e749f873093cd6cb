"""Which endpoints are used, case for case as kube-proxy's own tests of topology and traffic policies require."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.api.objects import ZONE_LABEL
from kproxy.model import Endpoint, Family, Protocol, ServicePort, ServicePortName
from kproxy.routing import route
from tests.conformance import recorded

TOPOLOGY = recorded.read("topology.json")


@pytest.mark.parametrize("case", recorded.named(TOPOLOGY["cases"]))
def test_endpoints_of_a_service(case: dict[str, Any]) -> None:
    service, expected = case["service"], case["expected"]
    port = service_port(service)

    chosen = route(
        port,
        [endpoint(e, node_hints=case["prefer_same_traffic_distribution_enabled"]) for e in case["endpoints"] or []],
        node_name=case["node_name"],
        zone=case["node_labels"].get(ZONE_LABEL, ""),
    )

    assert sorted(map(str, chosen.cluster)) == (expected["cluster"] or [])
    assert sorted(map(str, chosen.local)) == (expected["local"] or [])
    assert chosen.has_any == expected["has_any_endpoints"]


@pytest.mark.parametrize("case", recorded.named(TOPOLOGY["cases"]))
def test_which_sets_of_endpoints_a_service_needs(case: dict[str, Any]) -> None:
    port = service_port(case["service"])

    assert port.uses_cluster_endpoints == case["service"]["uses_cluster_endpoints"]
    assert port.uses_local_endpoints == case["service"]["uses_local_endpoints"]


def service_port(service: dict[str, Any]) -> ServicePort:
    return ServicePort(
        name=ServicePortName("ns", "service", "http", Protocol.TCP),
        family=Family.IPv4,
        cluster_ip="172.30.0.1",
        port=80,
        node_port=service["node_port"] or 0,
        internal_local=service["internal_traffic_policy"] == "Local",
        external_local=service["external_traffic_policy"] == "Local",
        externally_accessible=service["externally_accessible"],
    )


def endpoint(given: dict[str, Any], *, node_hints: bool) -> Endpoint:
    """`node_hints`: releases before 1.35 did not read them unless a feature gate was on."""
    address, _, port = given["endpoint"].rpartition(":")
    return Endpoint(
        address=address.strip("[]"),
        port=int(port),
        ready=given["ready"],
        serving=given["serving"],
        terminating=given["terminating"],
        local=given["local"],
        zone_hints=tuple(given["zone_hints"] or ()),
        node_hints=tuple(given["node_hints"] or ()) if node_hints else (),
    )
