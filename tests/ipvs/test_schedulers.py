"""`--ipvs-scheduler`: each does what its name says."""

from __future__ import annotations

import pytest

from kproxy.model import Family
from tests.lab.flows import Fate, Flow, Origin
from tests.lab.packets import Lab
from tests.lab.proxy import InProcess
from tests.lab.scenario import NODE_NAME, USUAL, Objects, items, surroundings

pytestmark = pytest.mark.ipvs

ADDRESS = "172.30.0.41"
PODS = ("10.0.1.1", "10.0.1.2", "10.0.1.3")


def begin(lab: Lab, scheduler: str, *pods: str) -> None:
    """A proxy brings a Service with these pods into force, or with all of them, and ends."""
    config = {"mode": "ipvs", "hostnameOverride": NODE_NAME, "ipvs": {"scheduler": scheduler}}
    port = {"name": "http", "port": 8080}
    given = Objects(
        services={"web": {"clusterIP": ADDRESS, "ports": [{"name": "http", "port": 80}]}},
        slices={"web-1": {"service": "web", "ports": [port], "endpoints": [*(pods or PODS)]}},
    ).over(USUAL)
    proxy = InProcess(lab.netns, config | given.config, [Family.IPv4])
    proxy.apply(*surroundings(given), *items(given, Family.IPv4))
    proxy.sync()
    proxy.close()


def reached(lab: Lab, *sources: str) -> list[str]:
    """Which pod each of some connections went to."""
    outcomes = lab.send_many([Flow(Origin.POD, source, ADDRESS, 80) for source in sources])
    assert {outcome.fate for outcome in outcomes} == {Fate.FORWARDED}
    return [outcome.destination for outcome in outcomes]


@pytest.mark.parametrize("scheduler", ["", "wrr", "sed", "nq", "wlc"])
def test_connections_are_shared_out_evenly(make_lab, scheduler: str) -> None:
    lab = make_lab()
    begin(lab, scheduler)
    went = reached(lab, *["10.0.0.2"] * 12)
    assert {pod: went.count(pod) for pod in PODS} == dict.fromkeys(PODS, 4)


def test_a_change_of_the_scheduler_holds_for_the_servers_that_are_there(lab: Lab) -> None:
    for scheduler in ("rr", "sh", "dh"):
        begin(lab, scheduler)
    shown = lab.netns.command("ipvsadm", "-Sn").stdout
    assert f"-A -t {ADDRESS}:80 -s dh" in shown
    # By the destination, which is one.
    assert len({*reached(lab, *(f"10.0.0.{n}" for n in range(2, 14)))}) == 1


def test_least_connections_spare_who_is_busy(lab: Lab) -> None:
    begin(lab, "lc", "10.0.1.1")
    assert reached(lab, *["10.0.0.2"] * 4) == ["10.0.1.1"] * 4
    begin(lab, "lc", "10.0.1.1", "10.0.1.2")
    assert reached(lab, *["10.0.0.3"] * 4) == ["10.0.1.2"] * 4
    assert {*reached(lab, *["10.0.0.3"] * 2)} == {"10.0.1.1", "10.0.1.2"}


@pytest.mark.parametrize(("scheduler", "stays"), [("sh", True), ("mh", False)])
def test_hashes_of_the_source_spread_clients(make_lab, scheduler: str, stays: bool) -> None:
    """sh looks at the address, mh (as kube-proxy sets it) at the port, too."""
    lab = make_lab()
    begin(lab, scheduler)
    assert len({*reached(lab, *["10.0.0.2"] * 12)}) == (1 if stays else 3)
    assert {*reached(lab, *(f"10.0.0.{n}" for n in range(2, 32)))} == {*PODS}
