"""What a Service promises its clients, on a whole cluster with a real kproxy on every node."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.lab.cluster import Cluster, Pod
from tests.lab.cluster_objects import external_name, headless, load_balancer, port, service
from tests.lab.traffic import NoAnswer, answered, fails_as, settle, try_once, who_answers
from tests.lab.waiting import eventually

IP4, IP6 = "10.96.0.10", "fd00:96::10"
NODE_PORT = 30007
URLS = {4: f"http://{IP4}/", 6: f"http://[{IP6}]/"}
URL = URLS[4]
LOAD_BALANCER = "198.51.100.10"


def web_pods(cluster: Cluster, *nodes: int, **options) -> list[Pod]:
    """Pods web-0, web-1 … on the nodes with these indexes."""
    return [
        cluster.run_pod(f"web-{number}", cluster.nodes[node], {"app": "web"}, **options)
        for number, node in enumerate(nodes)
    ]


def visitor(cluster: Cluster, node: int = 2) -> Pod:
    return cluster.run_pod("visitor", cluster.nodes[node], tcp=())


@pytest.mark.parametrize("family", [4, 6])
def test_a_dual_stack_cluster_ip_shares_connections_between_pods(cluster: Cluster, family: int):
    web_pods(cluster, 0, 1)
    client = visitor(cluster)
    cluster.apply(service("web", IP4, IP6))
    settle(client, URLS[family], {"web-0", "web-1"})

    seen = who_answers(client, URLS[family], 200)

    assert seen.keys() == {"web-0", "web-1"}
    assert all(60 <= count <= 140 for count in seen.values()), seen
    assert client.get(URLS[family]).client == (client.ipv4 if family == 4 else client.ipv6)


@pytest.mark.parametrize("family", [4, 6])
def test_a_node_port_answers_on_every_node_from_outside_and_inside(cluster: Cluster, family: int):
    web_pods(cluster, 0, 1)
    cluster.apply(service("web", IP4, IP6, type="NodePort", ports=[port(80, node_port=NODE_PORT)]))

    for node in cluster.nodes:
        url = f"http://{node.ipv4 if family == 4 else f'[{node.ipv6}]'}:{NODE_PORT}/"
        settle(cluster.client, url, {"web-0", "web-1"})
        settle(node, url, {"web-0", "web-1"})
    assert cluster.client.get(url).client == (node.ipv4 if family == 4 else node.ipv6)  # masqueraded: replies come back


def test_traffic_follows_a_pod_that_dies_and_comes_back_elsewhere(cluster: Cluster):
    stays, dies = web_pods(cluster, 0, 1)
    client = visitor(cluster)
    cluster.apply(service("web", IP4))
    settle(client, URL, {"web-0", "web-1"})

    cluster.remove_pod(dies)
    settle(client, URL, {stays.name})
    cluster.run_pod("web-2", cluster.nodes[2], {"app": "web"})
    settle(client, URL, {stays.name, "web-2"})


def test_a_pod_that_is_not_ready_gets_no_new_connections(cluster: Cluster):
    first, second = web_pods(cluster, 0, 1)
    client = visitor(cluster)
    cluster.apply(service("web", IP4))
    settle(client, URL, {"web-0", "web-1"})

    cluster.set_ready(first, False)
    settle(client, URL, {second.name})
    cluster.set_ready(first, True)
    settle(client, URL, {first.name, second.name})


def test_scaling_up_and_down_changes_who_answers(cluster: Cluster):
    pods = web_pods(cluster, 0, 1, 2)
    client = visitor(cluster)
    cluster.apply(service("web", IP4))
    settle(client, URL, {pod.name for pod in pods})

    pods += [cluster.run_pod(f"more-{n}", cluster.nodes[n], {"app": "web"}) for n in range(2)]
    settle(client, URL, {pod.name for pod in pods})
    for pod in pods[2:]:
        cluster.remove_pod(pod)
    settle(client, URL, {"web-0", "web-1"})


def test_a_service_without_endpoints_refuses_at_once_until_it_has_one(cluster: Cluster):
    client = visitor(cluster)
    cluster.apply(service("web", IP4, type="NodePort", ports=[port(80, node_port=NODE_PORT)]))
    node_port_url = f"http://{cluster.nodes[0].ipv4}:{NODE_PORT}/"
    fails_as(client, URL, NoAnswer.REFUSED)
    fails_as(cluster.client, node_port_url, NoAnswer.REFUSED)

    begin = time.monotonic()
    assert try_once(client, URL) is NoAnswer.REFUSED
    assert try_once(cluster.client, node_port_url) is NoAnswer.REFUSED
    assert time.monotonic() - begin < 0.5

    web_pods(cluster, 0)
    settle(client, URL, {"web-0"})
    settle(cluster.client, node_port_url, {"web-0"})


def test_session_affinity_keeps_a_client_on_its_pod_while_that_is_ready(cluster: Cluster):
    pods = web_pods(cluster, 0, 1, 2)
    client = visitor(cluster)
    cluster.apply(service("web", IP4, sessionAffinity="ClientIP"))
    chosen = answered(client, URL)
    assert who_answers(client, URL, 50) == Counter({chosen: 50})

    cluster.set_ready(next(pod for pod in pods if pod.name == chosen), False)
    now = eventually(lambda: (pod := try_once(client, URL)) != chosen and pod, "the client is moved")
    assert who_answers(client, URL, 50) == Counter({now: 50})


def test_a_load_balancer_serves_the_sources_it_is_open_to(cluster: Cluster):
    web_pods(cluster, 0)
    cluster.route_from_outside(LOAD_BALANCER, cluster.nodes[1])
    url = f"http://{LOAD_BALANCER}/"
    client = cluster.client
    cluster.apply(load_balancer("web", IP4, LOAD_BALANCER))
    settle(client, url, {"web-0"})

    cluster.apply(load_balancer("web", IP4, LOAD_BALANCER, loadBalancerSourceRanges=["192.0.2.0/24"]))
    fails_as(client, url, NoAnswer.SILENCE)
    cluster.apply(load_balancer("web", IP4, LOAD_BALANCER, loadBalancerSourceRanges=["192.0.2.0/24", "203.0.113.0/24"]))
    settle(client, url, {"web-0"})


def test_external_traffic_policy_local_keeps_the_client_address_and_stays_on_the_node(cluster: Cluster):
    web_pods(cluster, 0, 0, 1)
    ports = [port(80, node_port=NODE_PORT)]
    cluster.apply(service("web", IP4, type="NodePort", ports=ports, externalTrafficPolicy="Local"))
    first, second, third = (f"http://{node.ipv4}:{NODE_PORT}/" for node in cluster.nodes)

    settle(cluster.client, first, {"web-0", "web-1"})
    settle(cluster.client, second, {"web-2"})
    fails_as(cluster.client, third, NoAnswer.SILENCE)
    assert cluster.client.get(first).client == cluster.client.ipv4


def test_a_pod_reaches_itself_through_its_service(cluster: Cluster):
    (pod,) = web_pods(cluster, 0)
    cluster.apply(service("web", IP4, IP6))

    settle(pod, URLS[4], {pod.name})
    settle(pod, URLS[6], {pod.name})


def test_traffic_distribution_keeps_clients_in_their_zone(cluster: Cluster):
    web_pods(cluster, 0, 1, 2)
    client = visitor(cluster, 1)
    cluster.apply(service("web", IP4, trafficDistribution="PreferSameZone"))

    settle(client, URL, {"web-1"})


def test_a_service_of_several_slices_uses_all_of_them(cluster: Cluster):
    many = web_pods(cluster, *(number % 3 for number in range(101)), tcp=())
    for pod in (many[0], many[-1]):
        pod.serve(pod.name, [80], [])
    for pod in many[1:-1]:
        cluster.set_ready(pod, False)
    client = visitor(cluster)
    cluster.apply(service("web", IP4))

    settle(client, URL, {many[0].name, many[-1].name})
    slices = [len(written["endpoints"]) for written in cluster.api.objects("EndpointSlice")]
    assert sorted(slices) == [1, 100]


def test_headless_and_external_name_services_leave_no_rule(cluster: Cluster):
    web_pods(cluster, 0)
    node = cluster.nodes[0]
    cluster.apply(service("marker", "10.96.0.98", app="nobody"))
    fails_as(node, "http://10.96.0.98/", NoAnswer.REFUSED)
    before = ruleset(cluster)

    cluster.apply(headless("peers", app="web"), external_name("mail", "mail.example.org"))
    cluster.apply(service("later", "10.96.0.99", app="nobody"))
    fails_as(node, "http://10.96.0.99/", NoAnswer.REFUSED)
    assert "10.96.0.99" in ruleset(cluster)
    cluster.delete_service("later")

    eventually(lambda: ruleset(cluster) == before, "there is as much in the kernel as before")


def ruleset(cluster: Cluster) -> str:
    return cluster.nodes[0].exec("nft", "--stateless", "list", "ruleset")
