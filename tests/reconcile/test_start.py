"""How a proxy begins: with what it finds in the kernel, with a Node that is late, with ports that are taken."""

from __future__ import annotations

import socket

import pytest

from tests.lab.proxy_process import HEALTHZ_PORT, METRICS_PORT
from tests.lab.waiting import eventually
from tests.reconcile.objects import NODE, WEB_IP, node, port, service, services, sticky, web
from tests.reconcile.one_node import OneNode

BRIDGE = service("shop", "10.96.0.20", type="NodePort", ports=[port(80, node_port=30080)])


def knock(here: OneNode) -> None:
    """Try a connection to the Service web; nobody answers."""
    with here.host.socket(WEB_IP) as client:
        client.setblocking(False)
        client.connect_ex((WEB_IP, 80))


def knocks(here: OneNode) -> int:
    """How many connections the Service's element has counted."""
    [line] = [x for x in here.nft("list map ip kproxy services").splitlines() if f"{WEB_IP} . tcp . 80" in x]
    return int(line.split("packets ")[1].split()[0])


def test_a_restart_with_nothing_changed_commits_nothing_and_counters_go_on(here: OneNode):
    here.host.configure("route add 10.0.0.0/8 dev lo")
    here.api.put_all([*web(), *sticky("shop", "10.96.0.20"), *services(20)])
    proxy = here.started()
    for _ in range(3):
        knock(here)
    eventually(lambda: knocks(here) == 3, "connections are counted")
    proxy.stop()
    before = here.generation()

    here.started()

    assert here.generation() == before
    assert knocks(here) == 3
    knock(here)
    eventually(lambda: knocks(here) == 4, "the counter goes on")


def test_what_changed_meanwhile_is_one_commit(here: OneNode):
    here.api.put_all([*web(), *services(3)])
    here.started().stop()
    before = here.generation()
    here.api.delete("Service", "svc-0")
    here.api.delete("EndpointSlice", "svc-0-1")
    here.api.put_all(web("10.0.0.9"))

    here.started()

    assert here.generation() == before + 1
    assert "10.97.0.0" not in here.ruleset
    assert "10.0.0.9 . 8080" in here.ruleset


def test_old_rules_stay_until_the_api_server_answers(here: OneNode):
    here.api.put_all([*web(), *services(1)])
    here.started().stop()
    before = here.generation()
    here.api.delete("Service", "svc-0")
    here.api.down()

    proxy = here.proxy()
    proxy.start()
    eventually(lambda: "cannot be read" in proxy.log.read_text(), "it says what is wrong")
    assert here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 503
    assert here.generation() == before
    assert "10.97.0.0 . tcp . 80" in here.ruleset
    here.api.up()
    proxy.wait_until_synced()

    assert here.generation() == before + 1
    assert "10.97.0.0" not in here.ruleset
    assert here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 200


def test_without_its_node_object_the_proxy_serves_and_learns_the_address_when_it_comes(here: OneNode):
    here.api.delete("Node", NODE)
    here.api.put_all([*web(), BRIDGE])
    here.started()
    assert "10.96.0.10 . tcp . 80" in here.nft("list map ip kproxy services")
    assert "192.168.0.2" not in here.ruleset

    here.api.put(node())

    eventually(lambda: "192.168.0.2" in here.nft("list set ip kproxy nodeport-ips"), "node ports are on its address")


def test_health_check_ports_are_open_only_where_node_ports_are(here: OneNode):
    """Where that is the Node's own address, it is known only once the Node has been read."""
    policy = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 30999}
    here.api.put_all([*web(), service("shop", "10.96.0.20", type="LoadBalancer", **policy)])
    here.started("--nodeport-addresses=primary")
    eventually(lambda: here.host.get("http://192.168.0.2:30999/").status == 503, "it is open")
    with pytest.raises(ConnectionRefusedError):
        here.host.get("http://127.0.0.1:30999/")


def test_a_node_that_is_deleted_stays_in_force(here: OneNode):
    here.api.put_all([*web(), BRIDGE])
    proxy = here.started()
    here.api.delete("Node", NODE)
    here.api.put_all(web("10.0.0.9"))
    eventually(lambda: "10.0.0.9 . 8080" in here.ruleset, "the next change is in")
    assert "192.168.0.2" in here.nft("list set ip kproxy nodeport-ips")
    assert proxy.running


def test_pod_cidrs_are_waited_for_and_must_not_change(here: OneNode):
    here.api.put_all(web())
    proxy = here.proxy("--detect-local-mode=NodeCIDR")
    proxy.start()
    eventually(lambda: here.api.watching("endpointslices") == 1, "it has listed everything")
    assert here.ruleset == ""

    here.api.put(node(pod_cidrs=("10.244.1.0/24", "fd00:244:1::/64")))
    proxy.wait_until_synced()
    assert "ip saddr != 10.244.1.0/24" in here.nft("list chain ip kproxy services")
    assert "ip6 saddr != fd00:244:1::/64" in here.nft("list chain ip6 kproxy services")
    before = here.generation()

    here.api.put(node(pod_cidrs=("10.244.2.0/24",)))

    eventually(lambda: not proxy.running, "it ends")
    assert proxy.stop() == 1
    assert "pod CIDRs changed from ('10.244.1.0/24', 'fd00:244:1::/64') to ('10.244.2.0/24',)" in proxy.log.read_text()
    assert here.generation() == before


@pytest.mark.parametrize(
    ("taken", "reason"),
    [(HEALTHZ_PORT, "FailedToStartProxierHealthcheck"), (METRICS_PORT, "FailedToStartMetricServer")],
)
def test_a_taken_port_is_fatal_only_if_so_configured(here: OneNode, taken: int, reason: str):
    here.api.put_all(web())
    with here.host.namespace.run(socket.create_server, ("127.0.0.1", taken)):
        patient = here.proxy()
        patient.start()
        eventually(lambda: "10.96.0.10 . tcp . 80" in here.ruleset, "it does its work")
        assert "cannot listen" in patient.log.read_text()
        assert here.events(reason) == []
        patient.stop()

        strict = here.proxy("--bind-address-hard-fail")
        strict.start()
        eventually(lambda: not strict.running, "it ends")
        assert strict.stop() == 1
    assert f":{taken}: Address already in use" in strict.log_end()
    [event] = eventually(lambda: here.events(reason), "an Event")
    assert event["regarding"]["name"] == NODE
