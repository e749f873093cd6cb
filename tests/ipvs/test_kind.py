"""kind/e2e on nodes in ipvs mode: their image has no tool for IPVS, and an old one no nft either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kind.fakes import NODE_PROGRAMS, Fakes
from tests.reconcile.objects import endpoints, port, service
from tests.reconcile.one_node import OneNode

pytestmark = pytest.mark.ipvs

KIND = Path(__file__).resolve().parents[2] / "kind"
TRACES = ("10.96.0.20", "fd00:10:96::20", "203.0.113.10", "30080")
NEVER = ("10.96.0.2", "30070")  # the first is a piece of an address, the second, in hexadecimal, is 7576
ASK = "import sys, json; from labs.nodes import KindCluster; c = KindCluster('kproxy', 'docker', ('node',)); "
ASK += "w = tuple(sys.argv[1:]); print(json.dumps([c.named('node', w), c.unseen(w)]))"
SECONDS = 120.0


def test_what_the_rules_of_a_node_name(tmp_path: Path) -> None:
    """Given a node without Services, when kproxy has written one with addresses of both families."""
    fakes = Fakes(tmp_path)
    addresses = {"clusterIPs": ["10.96.0.20", "fd00:10:96::20"], "ipFamilies": ["IPv4", "IPv6"]}
    shop = service("shop", "10.96.0.20", type="LoadBalancer", ports=[port(80, node_port=30080)], **addresses)
    shop["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.10"}]}}
    slices = endpoints("shop", "10.0.0.3"), endpoints("shop", "fd00:244::7576", number=2) | {"addressType": "IPv6"}
    with OneNode(tmp_path) as here:
        here.host.configure("link add eth0 type dummy", "link set eth0 up", "addr add 192.0.2.10/24 dev eth0")
        without_nft = [name for name in NODE_PROGRAMS if name != "nft"]
        fakes.has_nodes({"node": here.host.namespace.path}, programs=without_nft)
        before = looked_at(fakes, *TRACES, *NEVER)
        flags = ("--proxy-mode=ipvs", "--once", f"--manifests={here.manifests(shop, *slices)}")
        done = here.kproxy(*flags, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        then = looked_at(fakes, *TRACES, *NEVER)

    assert before == [[], "node has no nft"]
    assert then == [list(TRACES), ""]


def looked_at(fakes: Fakes, *words: str) -> list[object]:
    """What kind/e2e finds of these words, and why it cannot look, if it cannot."""
    environment = fakes.environment(PATH=f"{fakes.path}:{os.environ['PATH']}", PYTHONPATH=str(KIND))
    asked = subprocess.run(
        [sys.executable, "-c", ASK, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    found: list[object] = json.loads(asked.stdout)
    return found
