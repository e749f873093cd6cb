"""One cluster for all tests of this folder; what a test makes in it is removed when the test ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kproxy.dataplane.iptables.commands import Variant
from tests.lab.cluster import Cluster, Node
from tests.lab.proxy import HINT
from tests.lab.proxy_process import ProxyProcess
from tests.lab.waiting import eventually

# These say something about how rules are written: they are run in iptables mode, too, in this variant.
ALSO_IN_IPTABLES_MODE = {
    "test_a_dual_stack_cluster_ip_shares_connections_between_pods": Variant.NFT,
    "test_a_node_port_answers_on_every_node_from_outside_and_inside": Variant.NFT,
    "test_a_service_without_endpoints_refuses_at_once_until_it_has_one": Variant.NFT,
    "test_external_traffic_policy_local_keeps_the_client_address_and_stays_on_the_node": Variant.NFT,
    "test_a_pod_reaches_itself_through_its_service": Variant.NFT,
    "test_metrics_count_syncs_and_measure_how_long_programming_took": Variant.NFT,
    "test_traffic_goes_on_without_an_api_server_and_changes_arrive_when_it_returns": Variant.LEGACY,
    "test_no_connection_fails_while_kproxy_is_killed_and_restarted": Variant.LEGACY,
    "test_rules_stay_when_kproxy_is_stopped_and_a_restart_finds_what_changed": Variant.LEGACY,
    "test_no_connection_fails_while_all_pods_are_replaced_one_by_one": Variant.LEGACY,
    "test_when_every_pod_is_terminating_they_still_serve": Variant.LEGACY,
    "test_a_udp_client_that_keeps_its_port_moves_at_once_when_its_pod_is_replaced": Variant.LEGACY,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shared_cluster" in metafunc.fixturenames:
        kinds = [pytest.param(None, id="nftables")]
        if variant := ALSO_IN_IPTABLES_MODE.get(metafunc.function.__name__):
            kinds.append(pytest.param(variant, id=f"iptables-{variant}"))
        metafunc.parametrize("shared_cluster", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    variant: Variant | None = request.param
    with Cluster(mode="iptables" if variant else "nftables") as cluster:
        for node in cluster.nodes if variant else ():
            node.namespace.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
        cluster.start_proxies()
        yield cluster


@pytest.fixture(scope="session")
def nothing(shared_cluster: Cluster) -> list[list[str]]:
    """The rules of each node while there are no Services."""
    return [rules(node) for node in shared_cluster.nodes]


@pytest.fixture
def cluster(shared_cluster: Cluster, nothing: list[list[str]]) -> Iterator[Cluster]:
    """Three nodes with a kproxy each, and nothing else."""
    yield shared_cluster
    shared_cluster.clear()
    for proxy in proxies(shared_cluster):
        if not proxy.running:
            proxy.start()
            proxy.wait_until_synced()
        print(f"--- {proxy.log.name}\n{proxy.log_end()}")  # pytest shows it where a test has failed
    # Tests use the same addresses: rules that lag behind would give the next one's connections to pods that are going.
    try:
        eventually(lambda: list(map(rules, shared_cluster.nodes)) == nothing, "the rules of the test have gone")
    except AssertionError as error:
        left = [set(rules(node)) ^ set(empty) for node, empty in zip(shared_cluster.nodes, nothing, strict=True)]
        raise AssertionError(f"{error}; difference on each node: {left}") from None


def rules(node: Node) -> list[str]:
    """What netfilter holds on a node, of every kind, without counters."""
    saved = [line for name in ("iptables", "ip6tables") for line in node.exec(f"{name}-legacy-save").splitlines()]
    listed = node.exec("nft", "--stateless", "list", "ruleset").splitlines()
    return sorted(listed) + sorted(line for line in saved if line.startswith("-A"))


def proxies(cluster: Cluster) -> list[ProxyProcess]:
    """The kproxy of each node."""
    return [node.proxy for node in cluster.nodes if node.proxy is not None]
