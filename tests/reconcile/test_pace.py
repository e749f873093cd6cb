"""When the proxy syncs: at once, not too often, again after a failure, and by itself when nothing seems to happen."""

from __future__ import annotations

import pytest

from kproxy.api.events import Alive
from kproxy.config.errors import ConfigError
from kproxy.dataplane.base import ApplyError
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.model import Family
from kproxy.proxy import FACTS_PATIENCE_SECONDS, NODE_PATIENCE_SECONDS, Pace, StartError
from tests.lab.namespaces import Namespace
from tests.reconcile.conftest import MakePart
from tests.reconcile.driven import FACTS, Driven
from tests.reconcile.objects import refused, services, sticky, web

HOUR = 3600.0


def test_nothing_is_written_before_everything_was_listed(netns: Namespace):
    with Driven(netns, listed=()) as driven:
        driven.put(*web())
        driven.list("Service", "Node", "ServiceCIDR")
        assert driven.at(10 * HOUR).syncs == 0
        driven.list("EndpointSlice")
        driven.settle()
        assert driven.syncs == 1


def test_changes_that_come_together_are_one_sync(netns: Namespace):
    with Driven(netns) as driven:
        driven.put(*services(50))
        driven.settle()
        assert 1 <= driven.syncs <= 3
        assert driven.at(HOUR / 2).seen.reports[-1].full is (driven.syncs == 1)


def test_the_minimum_between_two_syncs_is_kept(netns: Namespace):
    with Driven(netns, pace=Pace(minimum=10)) as driven:
        assert driven.at(0).syncs == 1
        for second in range(1, 10):
            driven.put(*web(f"10.0.0.{second}"))
            assert driven.at(second).syncs == 1
        assert driven.at(10).syncs == 2
        assert driven.at(100).syncs == 2  # nothing to do
        driven.put(*web("10.0.0.77"))
        assert driven.at(100).syncs == 3  # the last one is long ago


def test_failures_are_retried_with_growing_delays_and_nothing_is_forgotten(netns: Namespace, make_part: MakePart):
    other = make_part(*web())
    other.sync()  # the tables are another's now
    with Driven(netns, pace=Pace(retry=3)) as driven:
        driven.put(*services(3))
        assert driven.at(0).failures == 1
        attempted = 0.0
        for failures, longest in enumerate((0.5, 1, 2, 3, 3), start=1):
            assert driven.at(attempted + 0.79 * longest).failures == failures, "not earlier"
            attempted += longest
            assert driven.at(attempted).failures == failures + 1, "not later"
        assert driven.syncs == 0
        assert isinstance(driven.seen.failures[0], ApplyError)
        assert "another running process" in str(driven.seen.failures[0])
        assert driven.seen.wanted == 1

        other.kernel.close()
        assert driven.at(attempted + 3).syncs == 1
    assert set(driven.seen.reports[0].services) == set(driven.reconciler.state.services())
    listed = netns.command("nft", "list", "map", "ip", "kproxy", "services").stdout
    assert all(f"10.97.0.{n} . tcp . 80" in listed for n in range(3))
    assert "10.96.0.10" not in listed


def test_once_an_hour_the_kernel_is_compared_with_everything(netns: Namespace):
    with Driven(netns) as driven:
        driven.put(*web())
        done = driven.at(1).syncs
        assert driven.at(HOUR - 1).syncs == done
        assert driven.at(HOUR).syncs == done + 1
        report = driven.seen.reports[-1]
        assert (report.full, report.changes.total(), report.drift.total()) == (True, 0, 0)
        assert driven.at(2 * HOUR - 1).syncs == done + 1


def test_a_refused_service_is_tried_again_every_five_minutes(netns: Namespace):
    with Driven(netns) as driven:
        driven.put(*web(), *refused())
        done = driven.at(1).syncs
        assert [str(service) for service in driven.reconciler.quarantine] == ["default/refused"]
        assert driven.at(299).syncs == done
        assert driven.at(302).syncs == done + 1
        assert driven.seen.reports[-1].quarantined == {}  # told before
        assert driven.at(590).syncs == done + 1
        assert driven.at(603).syncs == done + 2

        driven.put(*sticky("refused", "10.96.0.66"))
        assert driven.at(604).syncs == done + 3
        assert driven.reconciler.quarantine == {}
        assert driven.at(HOUR - 1).syncs == done + 3


# What the proxy waits for at its start


def test_a_node_that_is_not_listed_is_waited_for_but_not_for_ever(netns: Namespace):
    with Driven(netns, listed=("Service", "EndpointSlice", "ServiceCIDR")) as driven:
        assert driven.at(NODE_PATIENCE_SECONDS - 1).syncs == 0
        assert driven.at(NODE_PATIENCE_SECONDS).syncs == 1


def test_waiting_for_the_node_begins_when_the_api_server_answers(netns: Namespace):
    with Driven(netns, listed=()) as driven:
        driven.at(10 * HOUR)  # for which it was down
        driven.list("Service", "EndpointSlice")
        assert driven.at(10 * HOUR + 1).syncs == 0
        driven.list("Node", "ServiceCIDR")
        assert driven.at(10 * HOUR + 2).syncs == 1


def test_pod_cidrs_are_waited_for_and_their_absence_ends_the_proxy(netns: Namespace):
    with Driven(netns, facts=lambda: None, listed=()) as driven:
        driven.at(10 * HOUR)
        driven.list("Service", "EndpointSlice", "Node", "ServiceCIDR")
        driven.at(10 * HOUR + 1)
        driven.at(10 * HOUR + FACTS_PATIENCE_SECONDS - 1)
        assert driven.error is None
        driven.at(10 * HOUR + FACTS_PATIENCE_SECONDS + 2)
        assert isinstance(driven.error, StartError)
        assert str(driven.error) == "waited 300 s for the Node's pod CIDRs, in vain"
    assert driven.syncs == 0


def test_facts_that_cannot_be_end_the_proxy(netns: Namespace):
    problem = ConfigError(["the Node's pod CIDRs changed"])
    answers = iter([FACTS, problem])

    def facts():
        answer = next(answers)
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    with Driven(netns, facts=facts) as driven:
        driven.at(1)
        assert driven.syncs == 1
        driven.proxy.addresses_changed()
        driven.at(2)
        assert driven.error is problem


@pytest.mark.parametrize("waiting", [True, False])
def test_it_stops_at_any_time(netns: Namespace, waiting: bool):
    with Driven(netns, listed=() if waiting else ("Service", "EndpointSlice", "Node", "ServiceCIDR")) as driven:
        driven.settle()
    assert driven.error is None
    with netns.run(NftablesKernel, tuple(Family)) as kernel:
        assert bool(kernel.read()) is not waiting


@pytest.mark.parametrize("readings", [1, 2])
def test_a_stop_is_heeded_whatever_the_proxy_is_about_to_do(netns: Namespace, readings: int):
    with Driven(netns) as driven:
        driven.settle()
        left = iter([lambda: None] * (readings - 1) + [driven.proxy.stop])
        driven.clock_read = lambda: next(left, lambda: None)()
        driven.proxy.post(Alive("Node"))
        assert driven.ended()
