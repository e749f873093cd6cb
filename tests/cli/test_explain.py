"""`kproxy explain`: what happens to one packet, and why; the exit code says whether it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster_objects import load_balancer
from tests.reconcile.objects import endpoints, port, service, sticky, web
from tests.reconcile.one_node import OneNode

POD, CLIENT = "10.0.0.9", "203.0.113.1"
CIDR = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {"name": "kubernetes"},
    "spec": {"cidrs": ["10.96.0.0/16"]},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OneNode, Path]]:
    """A node, and the manifests of what it serves."""
    ports = [port(80, node_port=30080)]
    with OneNode(tmp_path_factory.mktemp("explain")) as here:
        yield (
            here,
            here.manifests(
                *web(),
                *sticky("sticky", "10.96.0.40"),
                service("shop", "10.96.0.20", type="NodePort", externalTrafficPolicy="Local", ports=ports),
                endpoints("shop", "10.0.0.3"),
                load_balancer("lb", "10.96.0.30", "192.0.2.9", loadBalancerSourceRanges=["203.0.113.0/24"]),
                endpoints("lb", "10.0.0.4"),
                service("empty", "10.96.0.50"),
                CIDR,
            ),
        )


OUTCOMES = {
    "a pod to a cluster IP": (
        [POD, "10.96.0.10:80"],
        ["default/web", "→ 10.0.0.1:8080 (1 in 2)", "→ 10.0.0.2:8080 (1 in 2)", "dnat"],
    ),
    "somebody outside to a cluster IP": (
        [CLIENT, "10.96.0.10:80/tcp"],
        ["203.0.113.1 is not a pod's address", "→ 10.0.0.1:8080 (1 in 2, masqueraded)", "dnat"],
    ),
    "a pod to a sticky Service": ([POD, "10.96.0.40:80"], ["86400 s", "→ 10.0.0.66:8080 (1 in 1)", "dnat"]),
    "the node to its own node port": (
        ["192.168.0.2", "192.168.0.2:30080"],
        ["NodePort of service port default/shop", "→ 10.0.0.3:8080 (1 in 1, masqueraded)", "dnat"],
    ),
    "a load balancer's address from an allowed source": (
        [CLIENT, "192.0.2.9:80"],
        ["LoadBalancer of service port default/lb", "→ 10.0.0.4:8080 (1 in 1, masqueraded)", "dnat"],
    ),
    "nobody's address": ([POD, "198.51.100.1:53/udp"], ["no service's address or node port", "pass"]),
    "an IPv6 address that nobody has": (["fd00::9", "[fd00::1]:80"], ["[fd00::1]:80/TCP", "pass"]),
}
LOSSES = {
    "a Local policy without endpoints here": (
        [CLIENT, "192.168.0.2:30080", "eth0"],
        ["externalTrafficPolicy Local", "none on this node", "drop"],
    ),
    "a load balancer's address from elsewhere": (
        ["198.51.100.1", "192.0.2.9:80"],
        ["198.51.100.1 is in none of 203.0.113.0/24", "drop"],
    ),
    "a Service without endpoints": ([POD, "10.96.0.50:80"], ["default/empty", "no endpoint is ready", "reject"]),
    "a port that the Service does not have": ([POD, "10.96.0.10:81"], ["no service has TCP port 81", "reject"]),
    "an address that no Service has": ([POD, "10.96.0.99:80"], ["service range 10.96.0.0/16", "drop"]),
}


@pytest.mark.parametrize(
    ("packet", "said", "status"),
    [(*case, 0) for case in OUTCOMES.values()] + [(*case, 1) for case in LOSSES.values()],
    ids=[*OUTCOMES, *LOSSES],
)
def test_the_fate_of_a_packet(cluster: tuple[OneNode, Path], packet: list[str], said: list[str], status: int):
    here, manifests = cluster
    done = here.kproxy("explain", f"--manifests={manifests}", "--cluster-cidr=10.0.0.0/8", *packet)
    assert (done.returncode, done.stderr) == (status, "")
    *reasons, fate = said
    for reason in reasons:
        assert reason in done.stdout
    assert done.stdout.splitlines()[-1].startswith(fate)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        ([], "for instance explain 10.244.1.7 10.96.0.10:53/UDP"),
        ([POD], "for instance explain 10.244.1.7 10.96.0.10:53/UDP"),
        ([POD, "10.96.0.10:80", "eth0", "eth1"], "for instance explain 10.244.1.7 10.96.0.10:53/UDP"),
        ([POD, "10.96.0.10"], "'10.96.0.10' has no port"),
        ([POD, "10.96.0.10:http"], "'http' is not a port number"),
        ([POD, "10.96.0.10:70000"], "'70000' is not a port number"),
        ([POD, "10.96.0.10:80/icmp"], "'icmp' is none of TCP, UDP, SCTP"),
        (["nobody", "10.96.0.10:80"], "'nobody' is not an IP address"),
        ([POD, "[fd00::1]:80"], "10.0.0.9 and fd00::1 are not of one family"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_no_packet_is_refused_in_one_line(cluster: tuple[OneNode, Path], packet: list[str], reason: str):
    here, manifests = cluster
    done = here.kproxy("explain", f"--manifests={manifests}", *packet)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("kproxy: ")
    assert "explain" in line
    assert line.endswith(reason)


def test_nothing_is_changed_by_explaining(cluster: tuple[OneNode, Path]):
    here, manifests = cluster
    before = here.generation()
    here.kproxy("explain", f"--manifests={manifests}", POD, "10.96.0.10:80")
    assert (here.ruleset, here.generation()) == ("", before)
