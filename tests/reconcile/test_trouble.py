"""The kernel cannot be written for a while, changes come in crowds: nothing is lost, and health tells the truth."""

from __future__ import annotations

import json
import random

import pytest

from kproxy.api.events import Event
from kproxy.cluster import ClusterState
from kproxy.dataplane.nftables.chains import base_entries
from kproxy.dataplane.nftables.render import render_route
from tests.lab.apiserver_faults import Answer
from tests.lab.proxy_process import HEALTHZ_PORT, ProxyProcess
from tests.lab.waiting import eventually
from tests.reconcile.driven import FACTS, changed, deleted, part
from tests.reconcile.objects import NODE, endpoints, service, services, sticky, web
from tests.reconcile.one_node import OneNode

SYNCS = "kubeproxy_sync_proxy_rules_duration_seconds_count"


def health(here: OneNode, path: str = "livez") -> int:
    return here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/{path}").status


def endpoint_of(here: OneNode, address: str) -> bool:
    return f"{address} . 8080" in here.nft("list map ip kproxy endpoints")


def test_while_another_process_owns_the_tables_health_tells_and_then_all_is_in(here: OneNode):
    other = part(here.host.namespace, *web())
    with other.kernel:
        other.sync()
        here.api.put_all([*web("10.0.0.8"), *services(5)])
        proxy = here.proxy("--iptables-sync-period=1s")
        proxy.start()

        eventually(lambda: health(here) == 503, "it is not healthy", seconds=5)
        body = json.loads(here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/healthz").text)
        assert body["healthy"] is False
        assert health(here, "readyz") == 503
        assert proxy.metric("kubeproxy_sync_proxy_rules_nftables_sync_failures_total") >= 1
        assert "belongs to another running process" in proxy.log.read_text()
        here.api.put_all(sticky("late", "10.96.0.30"))
        assert endpoint_of(here, "10.0.0.1")  # as the other one wrote it

    eventually(lambda: health(here) == 200, "it is healthy", seconds=3)
    assert endpoint_of(here, "10.0.0.8")
    assert not endpoint_of(here, "10.0.0.1")
    listed = here.nft("list map ip kproxy services")
    assert all(f"{address} . tcp . 80" in listed for address in ("10.97.0.4", "10.96.0.30"))


@pytest.fixture
def busy(here: OneNode) -> ProxyProcess:
    """A proxy that writes at most once a second."""
    here.api.put_all([*web(), *services(20)])
    return here.started("--iptables-min-sync-period=1s")


def test_a_hundred_changes_in_a_crowd_are_few_syncs(here: OneNode, busy: ProxyProcess):
    before = busy.metric(SYNCS), here.generation()
    for n in range(100):
        here.api.put(endpoints(f"svc-{n % 20}", f"10.2.0.{n}"))
    eventually(lambda: endpoint_of(here, "10.2.0.99"), "the last one is in")
    assert all(endpoint_of(here, f"10.2.0.{n}") for n in range(80, 100))
    assert busy.metric(SYNCS) - before[0] <= 3
    assert here.generation() - before[1] <= 3


def test_without_a_minimum_changes_are_in_at_once(here: OneNode):
    here.api.put_all([*web(), *services(20)])
    here.started("--iptables-min-sync-period=0")
    for n in range(100):
        here.api.put(endpoints(f"svc-{n % 20}", f"10.2.0.{n}"))
    eventually(lambda: endpoint_of(here, "10.2.0.99"), "the last one is in", seconds=1)


def test_what_does_not_concern_the_kernel_is_not_written_to_it(here: OneNode):
    here.api.put_all(web())
    proxy = here.started("--iptables-min-sync-period=0")
    before = here.generation(), proxy.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total")
    others = service("others", "10.96.9.9")
    others["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
    here.api.put_all([others, endpoints("others", "10.0.0.1"), endpoints("nobody", "10.0.0.1")])
    here.api.patch("Service", "web", {"metadata": {"annotations": {"by": "somebody"}}})
    here.api.bookmark()
    eventually(
        lambda: proxy.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total") >= before[1] + 2, "all was heard"
    )
    here.api.put_all(web("10.0.0.9"))
    eventually(lambda: endpoint_of(here, "10.0.0.9"), "what does concern it is in")
    assert here.generation() == before[0] + 1


def test_an_object_is_read_that_is_nested_as_deeply_as_an_api_server_allows(here: OneNode):
    """Who may write Services can bring it into a part that nobody reads, and must not stop all others by that."""
    deep, shallow = json.dumps(service("deep", "10.96.0.40"))[:-1], json.dumps(service("shallow", "10.96.0.41"))
    items = f'{deep}, "unread": {"[" * 9990}{"]" * 9990}}}, {shallow}'
    here.api.stream_lists = "refuse"
    body = f'{{"metadata": {{"resourceVersion": "1"}}, "items": [{items}]}}'.encode()
    here.api.faults.add(Answer(200, body=body), resource="services", verb="list", times=None)
    here.started()
    assert "10.96.0.40 . tcp . 80" in here.ruleset
    assert "10.96.0.41 . tcp . 80" in here.ruleset


# The order of events


def state_after(happened: list[Event]) -> dict[object, object]:
    """What the kernel should hold in the end."""
    state = ClusterState(NODE, note=lambda text: None)
    for event in happened:
        state.apply(event)
    entries = base_entries(FACTS)
    for name in sorted(state.services()):
        for route in state.routes(name):
            entries.update(render_route(route, FACTS, {}))
    return entries


def test_in_which_order_objects_come_does_not_matter():
    objects = [*web(), *services(4), *sticky("shop", "10.96.0.20"), endpoints("web", "10.0.0.2", "10.0.0.7", number=2)]
    contested = service("zebra", "10.96.0.30", externalIPs=["10.96.0.10"])
    happened = [changed(item) for item in (*objects, contested)]
    wanted = state_after(happened)
    rng = random.Random(1)
    for _ in range(30):
        rng.shuffle(happened)
        gone = rng.sample(objects, 3)
        meanwhile = [changed(web("10.0.0.99")[1]), *map(changed, gone), *map(deleted, gone), *map(changed, gone)]
        assert state_after([*meanwhile, *happened]) == wanted
