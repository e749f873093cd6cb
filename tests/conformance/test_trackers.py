"""What kproxy makes of Services and EndpointSlices, case for case as kube-proxy's own tests of its caches require."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import pytest

from kproxy.cluster import ClusterState
from kproxy.cluster.services import is_ours
from kproxy.model import Family, Protocol, ServicePort, ServicePortName, canonical_cidr
from kproxy.node_addresses import accepts_ipv4_loopback, is_loopback, matching, node_port_cidrs
from kproxy.reconcile import summarise
from tests.conformance import recorded
from tests.conformance.recorded import drop, named, new_state, put

TRACKERS = recorded.read("trackers.json")


def cases(part: str) -> list[Any]:
    return named(TRACKERS[part].get("cases") or TRACKERS[part]["scenarios"])


@pytest.mark.parametrize("case", cases("slice_cache_map") + cases("slice_cache_by_port"))
def test_endpoints_of_a_service_come_from_all_its_slices(case: dict[str, Any]) -> None:
    state = new_state(case["node_name"])

    put(state, *case["endpoint_slices"])

    assert endpoints(state, case["expected"], of=case["service"]) == expected_endpoints(case["expected"])


@pytest.mark.parametrize("case", cases("slice_changed"))
def test_a_slice_that_says_the_same_is_no_change(case: dict[str, Any]) -> None:
    state = new_state()
    put(state, with_address_type(case["initial"]))
    state.dirty.clear()

    put(state, with_address_type(case["updated"]))

    assert bool(state.dirty) == case["expected_changed"]


@pytest.mark.parametrize("case", cases("local_ready_addresses"))
def test_local_ready_endpoints_are_counted_for_health_checks(case: dict[str, Any]) -> None:
    state = new_state("here")
    put(state, *services_with_health_checks(case["endpoints"]))

    put(state, *(slice_of(number, port) for number, port in enumerate(case["endpoints"])))

    expected = {name: len(addresses) for name, addresses in case["expected_local_ready_ips"].items()}
    assert ready_here(state) == expected


@pytest.mark.parametrize("case", cases("endpoints_update"))
def test_endpoints_follow_their_slices(case: dict[str, Any]) -> None:
    state = new_state(case["node_name"])
    mentioned = case["expected_before"] + case["expected_after"]
    put(state, *services_with_health_checks(mentioned))
    put(state, *(s for s in case["previous_slices"] if s))
    before = endpoints(state, mentioned)
    state.dirty.clear()

    previous, current = case["previous_slices"], case["current_slices"]
    for old, new in zip(previous, current, strict=True):
        if new:
            put(state, new)
        elif old:
            drop(state, old)

    assert nonempty(before) == expected_endpoints(case["expected_before"])
    assert nonempty(endpoints(state, mentioned)) == expected_endpoints(case["expected_after"])
    assert {str(name) for name in state.dirty} == set(case["expected_changed_services"])
    assert ready_here(state) == case["expected_local_ready_endpoints"]


@pytest.mark.parametrize("case", cases("slice_update"))
def test_a_slice_comes_or_goes(case: dict[str, Any]) -> None:
    state = new_state(case["node_name"], [Family[case["ip_family"]]])
    put(state, *case["applied_slices"])
    state.dirty.clear()

    (drop if case["remove"] else put)(state, case["slice"])

    assert bool(state.dirty) == case["expected_change_pending"]
    if case["expected_endpoints"] is not None:
        found = endpoints(state, case["expected_endpoints"], of=case["service"])
        assert found == expected_endpoints(case["expected_endpoints"])


@pytest.mark.parametrize("case", cases("checkout_changes"))
def test_a_change_leads_from_the_old_endpoints_to_the_new_ones(case: dict[str, Any]) -> None:
    state = new_state()
    put(state, *case["applied_slices"])
    changes = case["expected_changes"]
    previous = [port for change in changes for port in change["previous"]]
    current = [port for change in changes for port in change["current"]]
    before = endpoints(state, previous + current)
    state.dirty.clear()

    put(state, *case["pending_slices"])

    assert nonempty(before) == expected_endpoints(previous)
    assert nonempty(endpoints(state, previous + current)) == expected_endpoints(current)
    assert len(state.dirty) == len(changes)


@pytest.mark.parametrize("case", cases("trigger_times"))
def test_the_times_at_which_endpoints_changed_are_kept(case: dict[str, Any]) -> None:
    state = new_state(started=posix(case["tracker_start"]))

    for change in case["changes"]:
        (put if change["op"] == "apply" else drop)(state, change["object"])

    assert {str(name): sorted(times) for name, times in state.trigger_times.items()} == {
        name: [posix(text) for text in times] for name, times in case["expected_trigger_times"].items()
    }


@pytest.mark.parametrize("case", cases("service_ports"))
def test_service_ports_of_a_service(case: dict[str, Any]) -> None:
    state = new_state(families=[Family[case["ip_family"]]])

    if case["service"]:
        put(state, case["service"])

    assert service_ports(state) == {text(e["service_port"]): e["info"] for e in case["expected"]}


@pytest.mark.parametrize("case", cases("service_updates"))
def test_service_ports_follow_their_services(case: dict[str, Any]) -> None:
    state = new_state(families=[Family.IPv4])

    for step in case["steps"]:
        state.dirty.clear()
        put(state, *step["apply"])
        drop(state, *step["delete"])

        expected = step["expected_service_ports"]
        assert service_ports(state) == {text(e["service_port"]): e["info"] for e in expected}
        assert {str(name) for name in state.dirty} == set(step["expected_updated_services"])
        assert health_check_ports(state) == step["expected_health_check_node_ports"]


@pytest.mark.parametrize("case", cases("service_cidrs"))
def test_service_cidrs_of_a_family(case: dict[str, Any]) -> None:
    state = new_state()
    put(
        state,
        {
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": case["service_cidrs"]},
        },
    )

    used = state.service_cidrs(Family[case["ip_family"]])

    assert sorted(used) == sorted(canonical_cidr(cidr) for cidr in case["expected_used"])


@pytest.mark.parametrize("case", cases("node_port_addresses"))
def test_addresses_that_accept_node_ports(case: dict[str, Any]) -> None:
    family = Family[case["ip_family"]]
    local = [a.partition("/")[0] for addresses in case["interfaces"].values() for a in addresses]

    chosen = node_port_cidrs(case["cidrs"], {})[family]

    assert (chosen is None) == case["expected_match_all"]
    # Whether loopback addresses count is another question: see the next test.
    expected = {address for address in case["expected_node_ips"] or [] if not is_loopback(address)}
    assert set(matching(local, family, chosen)) == expected


@pytest.mark.parametrize("case", cases("node_port_loopback"))
def test_whether_node_ports_are_wanted_on_the_ipv4_loopback_address(case: dict[str, Any]) -> None:
    chosen = node_port_cidrs(case["cidrs"], {})[Family.IPv4]

    assert accepts_ipv4_loopback(chosen) == case["expected_ipv4"]


@pytest.mark.parametrize("case", cases("skipped_services"))
def test_services_that_are_not_for_this_proxy(case: dict[str, Any]) -> None:
    assert is_ours(recorded.decoded(case["service"])) != case["expected_skipped"]


def text(port: Mapping[str, str]) -> str:
    name = ServicePortName(port["namespace"], port["name"], port["port"], Protocol(port["protocol"]))
    return f"{name}/{name.protocol}"


def expected_endpoints(ports: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {text(port): port["endpoints"] for port in ports}


def endpoints(state: ClusterState, ports: Iterable[Mapping[str, Any]], of: str = "") -> dict[str, list[dict[str, Any]]]:
    """The endpoints of the given ports, or of those of one service, as the recordings spell them."""
    found = {}
    for port in ports:
        if of in ("", f"{port['namespace']}/{port['name']}"):
            name = ServicePortName(port["namespace"], port["name"], port["port"], Protocol(port["protocol"]))
            found[text(port)] = [
                {
                    "endpoint": str(e),
                    "local": e.local,
                    "ready": e.ready,
                    "serving": e.serving,
                    "terminating": e.terminating,
                }
                for family in state.families
                for e in state.endpoints(ServicePort(name=name, family=family, cluster_ip="", port=0))
            ]
    return found


def nonempty(ports: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: found for name, found in ports.items() if found}


def service_ports(state: ClusterState) -> dict[str, dict[str, Any]]:
    return {
        f"{port.name}/{port.name.protocol}": {
            "cluster_ip": port.cluster_ip,
            "port": port.port,
            "protocol": str(port.name.protocol),
            "load_balancer_vips": list(port.load_balancer_ips),
            "external_ips": list(port.external_ips),
            "load_balancer_source_ranges": list(port.source_ranges),
            "health_check_node_port": port.health_check_node_port or None,
        }
        for name in state.services()
        for port in state.service_ports(name)
    }


def health_check_ports(state: ClusterState) -> dict[str, int]:
    ports = {str(name): summarise(state.routes(name)).health_check_port for name in state.services()}
    return {name: port for name, port in ports.items() if port}


def with_address_type(item: dict[str, Any]) -> dict[str, Any]:
    """The recording leaves it out here, as its test did; an API server would refuse that."""
    return item | {"addressType": item["addressType"] or "IPv4"}


def ready_here(state: ClusterState) -> dict[str, int]:
    """What the health check node port of each Service would report, if anything."""
    counted = {str(name): sum(n for _, n in summarise(state.routes(name)).ready_here) for name in state.services()}
    return {name: count for name, count in counted.items() if count}


def services_with_health_checks(ports: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The Services to which the recorded endpoints belong, such that their local endpoints count."""
    by_service: defaultdict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for port in ports:
        by_service[port["namespace"], port["name"]].add((port["port"], port["protocol"]))
    for number, ((namespace, name), wanted) in enumerate(by_service.items()):
        yield {
            "kind": "Service",
            "metadata": {"namespace": namespace, "name": name},
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": f"172.30.0.{number + 1}",
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 30000 + number,
                "ports": [{"name": n, "protocol": p, "port": i + 1} for i, (n, p) in enumerate(sorted(wanted))],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": f"1.2.3.{number + 1}"}]}},
        }


def slice_of(number: int, port: Mapping[str, Any]) -> dict[str, Any]:
    """An EndpointSlice with the recorded endpoints of one port."""
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": port["namespace"],
            "name": f"{port['name']}-{number}",
            "labels": {"kubernetes.io/service-name": port["name"]},
        },
        "addressType": "IPv4",
        "ports": [
            {"name": port["port"], "port": int(e["endpoint"].rpartition(":")[2]), "protocol": port["protocol"]}
            for e in port["endpoints"][:1]
        ],
        "endpoints": [
            {
                "addresses": [e["endpoint"].rpartition(":")[0]],
                "conditions": {k: e[k] for k in ("ready", "serving", "terminating")},
                "nodeName": "here" if e["local"] else "elsewhere",
            }
            for e in port["endpoints"]
        ],
    }


def posix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
