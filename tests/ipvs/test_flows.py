"""Kubernetes' own proxy tests of the other modes in ipvs mode: the same objects in, real packets through IPVS."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.model import Family
from tests.conformance.flows import through_all_steps
from tests.conformance.ipvs import IpvsWorld
from tests.conformance.recorded import read
from tests.lab.scenario import NODE_NAME, Objects, items

pytestmark = pytest.mark.ipvs

FLOWS = {mode: read(f"flows-{mode}.json") for mode in ("nftables", "iptables")}

HERE, ELSEWHERE = "10.180.0.1", "10.180.2.1"
POD, CLIENT, UNWANTED, NODE = "10.0.0.2", "203.0.113.2", "203.0.113.130", "192.168.0.2"
KINDS = {POD: "pod", NODE: "node"}


@pytest.mark.parametrize("scenario", [pytest.param(s, id=s["id"]) for r in FLOWS.values() for s in r["scenarios"]])
def test_one_proxy_through_all_steps(scenario: dict[str, Any], make_lab) -> None:
    world = IpvsWorld(scenario["config"])
    lab = make_lab(**world.lab_arguments())

    assert through_all_steps(lab, world, scenario["steps"]) == []


def test_what_a_part_of_the_recordings_may_lack(make_lab) -> None:
    """Flows of the kinds that are translated for ipvs mode, as iptables mode has them."""
    ports = [{"name": "p80", "protocol": "TCP", "port": 80, "nodePort": 3001}]
    guarded = {
        "type": "LoadBalancer",
        "clusterIP": "172.30.0.41",
        "ports": ports,
        "ingress": ["1.2.3.4", {"ip": "9.10.11.12", "ipMode": "Proxy"}],
        "loadBalancerSourceRanges": [f"{NODE}/32", "203.0.113.0/25"],
    }
    away = {
        "type": "LoadBalancer",
        "clusterIP": "172.30.0.42",
        "ports": [ports[0] | {"nodePort": 3002}],
        "ingress": ["5.6.7.8"],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local",
    }
    given = Objects(
        services={"guarded": guarded, "away": away},
        slices={
            "guarded-1": {"service": "guarded", "ports": ports, "endpoints": [f"{HERE} {NODE_NAME}", ELSEWHERE]},
            "away-1": {"service": "away", "ports": ports, "endpoints": [ELSEWHERE]},
        },
    )
    sticky = Objects(services={"guarded": guarded | {"sessionAffinity": "ClientIP"}})
    world = IpvsWorld(FLOWS["iptables"]["scenarios"][0]["config"] | {"node_name": NODE_NAME})
    lab = make_lab(**world.lab_arguments())

    complaints = through_all_steps(
        lab,
        world,
        [
            step(
                given,
                flow(CLIENT, "1.2.3.4", 80, "dnat", HERE, ELSEWHERE, masquerade=True),
                flow(UNWANTED, "1.2.3.4", 80, "drop"),
                flow("1.2.3.4", "1.2.3.4", 80, "dnat", HERE, ELSEWHERE, masquerade=True),
                flow(CLIENT, "9.10.11.12", 81, "pass"),
                flow(CLIENT, "5.6.7.8", 80, "drop"),
                flow(POD, "172.30.0.42", 80, "drop"),
                flow(POD, NODE, 3002, "dnat", ELSEWHERE),
                flow(NODE, "5.6.7.8", 80, "dnat", ELSEWHERE, masquerade=True),
            ),
            step(sticky, flow(POD, "172.30.0.41", 80, "dnat", HERE, ELSEWHERE)),
        ],
    )

    assert complaints == []


def step(changes: Objects, *flows: dict[str, Any]) -> dict[str, Any]:
    return {"apply": [*items(changes, Family.IPv4)], "delete": [], "flows": flows}


def flow(source: str, to: str, port: int, action: str, *endpoints: str, masquerade: bool = False) -> dict[str, Any]:
    return {
        "name": f"{source} to {to}:{port}",
        "source_kind": KINDS.get(source, "external"),
        "source_ip": source,
        "protocol": "TCP",
        "dest_ip": to,
        "dest_port": port,
        "expect": {
            "action": action,
            "destinations": [{"ip": endpoint, "port": 80} for endpoint in endpoints],
            "masquerade": masquerade,
        },
    }
