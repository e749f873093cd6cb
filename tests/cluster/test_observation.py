"""What monitoring and load balancers see of kproxy, over real HTTP."""

from __future__ import annotations

import json

from tests.cluster.conftest import proxies
from tests.lab.cluster import Cluster
from tests.lab.cluster_objects import load_balancer, service
from tests.lab.traffic import NoAnswer, fails_as, settle
from tests.lab.waiting import eventually

IP4 = "10.96.0.10"
LOAD_BALANCER = "198.51.100.10"
HEALTH_CHECK_PORT = 32111


def test_healthz_tells_whether_a_node_takes_traffic(cluster: Cluster):
    node = cluster.nodes[0]
    url = f"http://{node.ipv4}:10256"
    answer = cluster.client.get(f"{url}/healthz")
    assert (answer.status, json.loads(answer.text)["nodeEligible"]) == (200, True)
    assert json.loads(answer.text)["status"].keys() == {"IPv4", "IPv6"}

    drained = node.object()
    drained["spec"]["taints"] = [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
    cluster.apply(drained)
    try:
        eventually(lambda: cluster.client.get(f"{url}/healthz").status == 503, "the node is no longer eligible")
        assert cluster.client.get(f"{url}/livez").status == 200
    finally:
        cluster.apply(node.object())
    eventually(lambda: cluster.client.get(f"{url}/healthz").status == 200, "the node is eligible again")


def test_the_health_check_node_port_tells_which_nodes_have_a_pod(cluster: Cluster):
    pod = cluster.run_pod("web-0", cluster.nodes[1], {"app": "web"})
    policy = {"externalTrafficPolicy": "Local", "healthCheckNodePort": HEALTH_CHECK_PORT}
    cluster.apply(load_balancer("web", IP4, LOAD_BALANCER, **policy))

    def statuses() -> list[int]:
        return [cluster.client.get(f"http://{node.ipv4}:{HEALTH_CHECK_PORT}/").status for node in cluster.nodes]

    eventually(lambda: statuses() == [503, 200, 503], "only the second node is healthy")
    answer = cluster.client.get(f"http://{cluster.nodes[1].ipv4}:{HEALTH_CHECK_PORT}/")
    assert json.loads(answer.text)["localEndpoints"] == 1
    assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == "1"

    cluster.set_ready(pod, False)
    eventually(lambda: statuses() == [503, 503, 503], "no node is healthy")

    cluster.delete_service("web")
    for node in cluster.nodes:
        fails_as(cluster.client, f"http://{node.ipv4}:{HEALTH_CHECK_PORT}/", NoAnswer.REFUSED)


def test_metrics_count_syncs_and_measure_how_long_programming_took(cluster: Cluster):
    node = cluster.nodes[0]
    (proxy, *_) = proxies(cluster)
    cluster.apply(service("web", IP4))
    fails_as(node, f"http://{IP4}/", NoAnswer.REFUSED)
    before = proxy.scrape()
    cluster.run_pod("web-0", node, {"app": "web"})
    settle(node, f"http://{IP4}/", {"web-0"})

    def more(name: str) -> float:
        return proxy.scrape().get(name, 0.0) - before.get(name, 0.0)

    syncs = 'kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}'
    latency = 'kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}'
    eventually(lambda: more(syncs) >= 1, "a sync is counted")
    eventually(lambda: more(latency) >= 1, "the time from the pod to the rule is measured")
    mode = node.get("http://127.0.0.1:10249/proxyMode").text
    assert f"--proxy-mode={mode}" in cluster.proxy_flags(node)


def test_every_kproxy_writes_an_event_when_it_starts(cluster: Cluster):
    def started() -> set[str]:
        events = [event for event in cluster.api.objects("Event") if event["reason"] == "Starting"]
        return {event["regarding"]["name"] for event in events}

    eventually(lambda: started() == {node.name for node in cluster.nodes}, "each has told that it has started")
