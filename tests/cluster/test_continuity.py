"""Traffic goes on whatever happens to the control plane, to kproxy and to single pods."""

from __future__ import annotations

import signal

import pytest

from tests.lab.apiserver import ApiServer
from tests.lab.cluster import Cluster, Node, Pod
from tests.lab.cluster_objects import port, service
from tests.lab.proxy_process import ProxyProcess
from tests.lab.traffic import NoAnswer, Stream, fails_as, settle, who_answers
from tests.lab.waiting import eventually

IP4, IP6 = "10.96.0.10", "fd00:96::10"
URL = f"http://{IP4}/"


@pytest.fixture
def visitor(cluster: Cluster) -> Pod:
    """A client pod on the third node."""
    return cluster.run_pod("visitor", cluster.nodes[2], tcp=())


@pytest.fixture
def web(cluster: Cluster, visitor: Pod) -> list[Pod]:
    """Two pods behind the Service web, in use."""
    pods = [cluster.run_pod(f"web-{n}", cluster.nodes[n], {"app": "web"}) for n in range(2)]
    cluster.apply(service("web", IP4))
    settle(visitor, URL, {"web-0", "web-1"})
    # The first attempts came before the rules. Where no rule drops them, the kernel remembers them for two minutes, and
    # a client that gets the same source port again would share their fate.
    for node in cluster.nodes:
        node.namespace.command("conntrack", "-D", "-p", "tcp", "--state", "SYN_SENT", check=False)
    return pods


def proxy_of(node: Node) -> ProxyProcess:
    assert node.proxy is not None
    return node.proxy


def test_traffic_goes_on_without_an_api_server_and_changes_arrive_when_it_returns(
    cluster: Cluster, visitor: Pod, web: list[Pod]
):
    cluster.api.down()
    try:
        assert who_answers(visitor, URL, 100).keys() == {"web-0", "web-1"}
    finally:
        cluster.api.up()

    cluster.remove_pod(web[0])
    cluster.run_pod("web-2", cluster.nodes[2], {"app": "web"})
    settle(visitor, URL, {"web-1", "web-2"}, seconds=20)


def test_what_happens_while_the_api_server_cannot_be_reached_is_found_afterwards(
    cluster: Cluster, visitor: Pod, web: list[Pod]
):
    if not isinstance(cluster.api, ApiServer):
        pytest.skip("needs an API server that takes changes while nobody reaches it")
    cluster.api.down()
    try:
        cluster.set_ready(web[0], False)
        cluster.apply(service("new", "10.96.0.11", app="web"))
        cluster.api.compact()  # longer ago than the history goes back
    finally:
        cluster.api.up()

    settle(visitor, URL, {"web-1"}, seconds=20)
    settle(visitor, "http://10.96.0.11/", {"web-1"})


def test_no_connection_fails_while_kproxy_is_killed_and_restarted(cluster: Cluster, visitor: Pod, web: list[Pod]):
    proxy = proxy_of(visitor.node)
    lasting = visitor.connect(IP4, 80)
    with Stream(visitor, URL) as stream:
        stream.more(50)
        proxy.stop(signal.SIGKILL)
        stream.more(100)
        proxy.start()
        proxy.wait_until_synced()
        stream.more(100)

    assert stream.failures == []
    assert stream.answers.keys() == {"web-0", "web-1"}
    with lasting:
        lasting.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
        assert lasting.recv(4096).startswith(b"HTTP/1.1 200")


def test_rules_stay_when_kproxy_is_stopped_and_a_restart_finds_what_changed(
    cluster: Cluster, visitor: Pod, web: list[Pod]
):
    cluster.apply(service("old", "10.96.0.11", app="web"))
    settle(visitor, "http://10.96.0.11/", {"web-0", "web-1"})
    proxy = proxy_of(visitor.node)
    proxy.stop()
    assert who_answers(visitor, URL, 20)
    cluster.set_ready(web[0], False)
    cluster.delete_service("old")

    proxy.start()
    proxy.wait_until_synced()

    assert who_answers(visitor, URL, 20).keys() == {"web-1"}
    fails_as(visitor, "http://10.96.0.11/", NoAnswer.SILENCE)  # nobody has that address any more


def test_a_restart_without_an_api_server_leaves_the_traffic_alone(cluster: Cluster, visitor: Pod, web: list[Pod]):
    proxy = proxy_of(visitor.node)
    proxy.stop(signal.SIGKILL)
    cluster.api.down()
    try:
        earlier = len(proxy.log.read_text())
        proxy.start()
        eventually(lambda: "refused" in proxy.log.read_text()[earlier:], "kproxy says what is wrong")
        assert proxy.running
        assert who_answers(visitor, URL, 50).keys() == {"web-0", "web-1"}
    finally:
        cluster.api.up()

    proxy.wait_until_synced()
    cluster.set_ready(web[0], False)
    settle(visitor, URL, {"web-1"})


def test_no_connection_fails_while_all_pods_are_replaced_one_by_one(cluster: Cluster, visitor: Pod, web: list[Pod]):
    serving = {pod.name for pod in web}
    with Stream(visitor, URL) as stream:
        for number, old in enumerate(web):
            new = cluster.run_pod(f"next-{number}", cluster.nodes[number + 1], {"app": "web"})
            serving.add(new.name)
            settle(visitor, URL, serving)
            cluster.terminate(old)
            serving.remove(old.name)
            settle(visitor, URL, serving)
            cluster.remove_pod(old)
        stream.more(50)

    assert stream.failures == []
    assert serving == {"next-0", "next-1"} < stream.answers.keys()


def test_when_every_pod_is_terminating_they_still_serve(cluster: Cluster, visitor: Pod, web: list[Pod]):
    with Stream(visitor, URL) as stream:
        for pod in web:
            cluster.terminate(pod)
        stream.more(100)

    assert stream.failures == []


@pytest.mark.parametrize(("address", "family"), [(IP4, 4), (IP6, 6)])
def test_a_udp_client_that_keeps_its_port_moves_at_once_when_its_pod_is_replaced(
    cluster: Cluster, visitor: Pod, address: str, family: int
):
    first = cluster.run_pod("dns-0", cluster.nodes[0], {"app": "dns"}, udp=(53,))
    ports = [port(53, target=53, protocol="UDP", name="dns")]
    cluster.apply(service("dns", IP4, IP6, ports=ports))
    client = visitor.open_udp(address, 53, source_port=40000, timeout=0.1)

    def answered() -> str:
        client.send(b"who are you?")
        return client.recv(512).split()[0].decode()

    with client:
        eventually(lambda: answered() == first.name, "the first pod answers")
        cluster.run_pod("dns-1", cluster.nodes[1], {"app": "dns"}, udp=(53,))
        cluster.remove_pod(first)
        # The client sends without a pause: a kernel that remembers the old pod would do so for ever.
        eventually(lambda: answered() == "dns-1", "the second pod answers", seconds=5)
