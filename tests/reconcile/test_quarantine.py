"""A Service that the kernel refuses stays out alone, and comes in as soon as it is mended."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kproxy.dataplane.base import Change
from kproxy.dataplane.nftables.dataplane import NftablesDataplane
from kproxy.model import ServiceName
from tests.lab.cluster_objects import port, service
from tests.lab.namespaces import Namespace
from tests.lab.waiting import eventually
from tests.reconcile.conftest import MakePart
from tests.reconcile.objects import Object, endpoints, refused, services, sticky, web
from tests.reconcile.one_node import OneNode

REFUSED = ServiceName("default", "refused")
WEB = ServiceName("default", "web")


def listed(netns: Namespace, what: str = "map ip kproxy services") -> str:
    return netns.command("nft", "list", *what.split()).stdout


def test_the_refused_service_is_named_with_the_reason_and_the_others_are_in(make_part: MakePart, netns: Namespace):
    target = make_part(*services(20), *refused(), *web())
    report = target.sync()

    assert list(report.quarantined) == [REFUSED]
    assert "chain learn-100000000000" in report.quarantined[REFUSED]
    assert len(report.services) == 21
    assert "10.96.0.66" not in listed(netns)
    assert "10.97.0.19 . tcp . 80" in listed(netns)
    assert not target.reconciler.pending


def test_a_service_that_becomes_bad_keeps_what_it_had(make_part: MakePart, netns: Namespace):
    target = make_part(*sticky("refused", "10.96.0.66"), *web())
    target.sync()
    before = listed(netns, "table ip kproxy")

    moved, _ = refused(cluster_ip="10.96.0.67")
    target.put(moved)
    assert list(target.sync().quarantined) == [REFUSED]
    assert listed(netns, "table ip kproxy") == before

    target.reconciler.doubt()
    report = target.sync()
    assert (report.changes.total(), report.drift.total()) == (0, 0)
    assert listed(netns, "table ip kproxy") == before
    assert list(target.reconciler.quarantine) == [REFUSED]


def test_a_mended_service_comes_in(make_part: MakePart, netns: Namespace):
    target = make_part(*refused(), *web())
    target.sync()
    target.put(*sticky("refused", "10.96.0.66"))
    report = target.sync()
    assert report.services == [REFUSED]
    assert target.reconciler.quarantine == {}
    assert target.in_step


def test_a_deleted_service_is_refused_no_more_and_is_no_drift(make_part: MakePart, netns: Namespace):
    target = make_part(*sticky("refused", "10.96.0.66"), *web())
    target.sync()
    target.put(*refused())
    target.sync()
    target.delete(refused()[0])
    report = target.sync()
    assert target.reconciler.quarantine == {}
    assert report.drift.total() == 0
    assert "10.96.0.66" not in listed(netns, "table ip kproxy")
    assert target.in_step


def test_changes_beside_a_refused_service_go_in(make_part: MakePart, netns: Namespace):
    target = make_part(*web(), *services(3))
    target.sync()
    target.put(*refused(), *web("10.0.0.7"))
    target.delete(services(3)[0])

    report = target.sync()

    assert list(report.quarantined) == [REFUSED]
    assert report.drift.total() == 0
    assert "10.0.0.7 . 8080" in listed(netns, "map ip kproxy endpoints")
    assert "10.97.0.0 . tcp" not in listed(netns, "table ip kproxy")


def test_a_refused_service_that_changes_and_changes_makes_nobody_read_the_kernel(make_part: MakePart, netns: Namespace):
    target = make_part(*refused(), *services(5))
    target.sync()
    for n in range(3):
        target.put(endpoints("refused", f"10.0.0.{n}"), endpoints("svc-1", f"10.0.1.{n}"))
        report = target.sync()
        assert not report.full
        assert ServiceName("default", "svc-1") in report.services
        assert list(target.reconciler.quarantine) == [REFUSED]
    assert target.in_step is False
    assert [difference.service for difference in target.reconciler.plan() if difference.service] == [REFUSED]


class Counting(NftablesDataplane):
    """Counts the attempts at the kernel."""

    attempts = 0

    def apply(self, changes: Iterable[Change]) -> None:
        self.attempts += 1
        super().apply(changes)


def test_the_search_for_the_culprits_is_bounded(make_part: MakePart, netns: Namespace):
    bad = [item for n in range(8) for item in refused(f"bad-{n}", f"10.96.1.{n}", seconds=10**11 + n)]
    counting: list[Counting] = []
    target = make_part(*services(200), *bad, dataplane=lambda kernel: counting.append(Counting(kernel)) or counting[0])

    report = target.sync()

    assert len(report.quarantined) == 8
    assert len(report.services) == 200
    assert counting[0].attempts <= 3 + 2 * 8
    counting[0].attempts = 0
    target.put(*web())
    target.sync()
    assert counting[0].attempts == 1


@pytest.mark.parametrize(
    "bad",
    [
        [service("bad", "10.96.0.66", ports=[port(70000)]), endpoints("bad", "10.0.0.66")],
        [service("bad", "10.96.0.66", ports=[port(-1)]), endpoints("bad", "10.0.0.66")],
        [
            service("bad", "10.96.0.66", type="NodePort", ports=[port(80, node_port=70000)]),
            endpoints("bad", "10.0.0.66"),
        ],
        [service("bad", "10.96.0.66"), endpoints("bad", "10.0.0.66", target=70000)],
        refused("bad", seconds=10**30),
        refused("bad", seconds=-1),
    ],
    ids=["port", "negative port", "node port", "endpoint port", "endless affinity", "negative affinity"],
)
def test_numbers_that_cannot_be_written_down_hurt_nobody_else(make_part: MakePart, netns: Namespace, bad: list[Object]):
    """An API server would not take them; should it ever, one object must not stop the proxy."""
    target = make_part()
    target.put(*bad, *web())
    target.sync()
    assert "10.96.0.10 . tcp . 80" in listed(netns)
    assert not target.reconciler.pending


def test_a_service_whose_address_a_refused_one_holds_gets_it_when_that_is_mended(make_part: MakePart, netns: Namespace):
    """`refused` gives 192.0.2.1 away and asks for the impossible at once: what it has, stays."""
    first, slice_ = sticky("refused", "10.96.0.66")
    first["spec"]["externalIPs"] = ["192.0.2.1"]
    target = make_part(first, slice_)
    target.sync()
    taker = service("web", "10.96.0.10", externalIPs=["192.0.2.1"])
    target.put(*refused(), taker, endpoints("web", "10.0.0.1"), *services(5))

    report = target.sync()

    assert REFUSED in report.quarantined
    assert "10.97.0.4 . tcp . 80" in listed(netns)
    assert "192.0.2.1 . tcp . 80" in listed(netns)

    target.put(*sticky("refused", "10.96.0.66"))
    target.sync()
    assert target.reconciler.quarantine == {}
    assert target.in_step
    assert 'comment "default/web"' in listed(netns).split("192.0.2.1 . tcp . 80")[1].split(",")[0]


def test_an_administrator_sees_it_and_sees_it_healed(here: OneNode):
    here.api.put_all([*web(), *services(3)])
    proxy = here.started()
    here.api.put_all(refused())

    eventually(lambda: proxy.metric("kproxy_quarantined_services") == 1, "the metric counts it")
    [event] = eventually(lambda: here.events("ServiceQuarantined"), "an Event")
    assert event["regarding"]["name"] == "refused"
    assert event["type"] == "Warning"
    assert "Numerical result out of range" in event["note"]
    [line] = [line for line in proxy.log.read_text().splitlines() if "the kernel refuses this Service" in line]
    assert '"service": "default/refused"' in line

    here.api.put_all(web("10.0.0.9"))
    eventually(lambda: "10.0.0.9 . 8080" in here.nft("list map ip kproxy endpoints"), "others go on")
    here.api.put_all(sticky("refused", "10.96.0.66"))
    eventually(lambda: "10.96.0.66 . tcp . 80" in here.nft("list map ip kproxy services"), "it came in")
    eventually(lambda: proxy.metric("kproxy_quarantined_services") == 0, "nothing is refused")
    assert len(here.events("ServiceQuarantined")) == 1
