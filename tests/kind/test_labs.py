"""kind/e2e, with the real kubectl, on the cluster lab: real kproxy processes, real packets, pods as namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kind.fakes import Fakes
from tests.kind.forwarder import Forwarder
from tests.kind.kubernetes import SYSTEM, Kubernetes
from tests.lab.apiserver_store import Key
from tests.lab.cluster import Cluster

KIND = Path(__file__).resolve().parents[2] / "kind"
LABS = (
    "nodeport",
    "clusterip",
    "deletion",
    "convert",
    "loadbalancer",
    "externalname",
    "headless",
    "affinity",
    "readiness",
    "cleanup",
)

pytestmark = [
    pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on this machine"),
    pytest.mark.skipif("KUBEBUILDER_ASSETS" in os.environ, reason="a real API server alone runs no pods"),
]


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    with Cluster(2) as cluster, Kubernetes(cluster, tmp_path_factory.mktemp("kubernetes")) as kubernetes:
        kubernetes.deploy_kproxy()
        yield kubernetes


def e2e(kubernetes: Kubernetes, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = kubernetes.environment() | variables
    command = (KIND / "e2e", *arguments)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


class InKind(NamedTuple):
    """What one run of all labs in a kind cluster has printed, and how it has called kind."""

    printed: str
    calls: list[str]


@pytest.fixture(scope="module")
def all_labs(kubernetes: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> InKind:
    """The nodes are containers of this machine, and its port 30007 leads to node port 30007 of the first."""
    fakes = Fakes(tmp_path_factory.mktemp("fakes"))
    fakes.has_images("nginx")
    nodes = kubernetes.cluster.nodes
    for node in nodes:
        kubernetes.api.patch("Node", node.name, {"spec": {"providerID": f"kind://docker/kproxy/{node.name}"}})
    with Forwarder(nodes[1], nodes[0].ipv4, 30007) as forwarder:
        fakes.has_nodes({node.name: node.namespace.path for node in nodes}, f"127.0.0.1:{forwarder.port}")
        done = e2e(kubernetes, **fakes.environment(PATH=f"{fakes.path}:{os.environ['PATH']}"))
    for node in nodes:
        kubernetes.api.patch("Node", node.name, {"spec": {"providerID": None}})
    return InKind(done.stdout + done.stderr, fakes.calls("kind"))


@pytest.mark.parametrize("lab", LABS)
def test_a_lab_passes_where_services_work(all_labs: InKind, lab: str) -> None:
    told = section(all_labs.printed, lab)
    assert "✓" in told
    assert "✗" not in told
    assert "–" not in told  # nothing is skipped


def section(printed: str, lab: str) -> str:
    """What is printed about a lab: up to the next empty line."""
    return printed.partition(f"\n\n{lab}: ")[2].partition("\n\n")[0]


def test_all_labs_pass_and_leave_nothing(all_labs: InKind, kubernetes: Kubernetes) -> None:
    assert f"{len(LABS)} of {len(LABS)} labs passed" in all_labs.printed
    assert [service["metadata"]["name"] for service in kubernetes.api.objects("Service")] == ["kube-dns"]
    assert all_labs.calls == ["kind load docker-image --name kproxy nginx"]


def test_in_kind_the_mapped_port_answers_on_this_machine(all_labs: InKind) -> None:
    assert "✓ both answer at http://localhost:" in section(all_labs.printed, "nodeport")


def test_in_kind_the_rules_themselves_are_looked_at(all_labs: InKind) -> None:
    told = section(all_labs.printed, "cleanup")
    assert "✓ every node's rules name its addresses and its node port" in told
    assert "✓ no node's rules name any of that" in told


def test_every_lab_is_tried_here() -> None:
    listed = subprocess.run([KIND / "e2e", "--help"], capture_output=True, text=True, check=True).stdout
    choices = listed.partition("{")[2].partition("}")[0]
    assert choices.replace("\n", "").replace(" ", "").split(",") == list(LABS)


def test_elsewhere_a_lab_is_kept_on_request_and_made_anew_the_next_time(kubernetes: Kubernetes) -> None:
    done = e2e(kubernetes, "--lab", "nodeport", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "– http://localhost:30007: no container of this machine" in done.stdout
    kept = kubernetes.api.get("Service", "web", "kproxy-e2e-nodeport")
    assert kept["spec"]["ports"][0]["nodePort"] == 30007

    done = e2e(kubernetes, "--lab", "nodeport")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 labs passed" in done.stdout
    assert [service["metadata"]["name"] for service in kubernetes.api.objects("Service")] == ["kube-dns"]


def test_pages_that_nobody_can_tell_apart_are_refused(kubernetes: Kubernetes) -> None:
    done = e2e(kubernetes, "--lab", "clusterip", E2E_HTTPD_IMAGE="registry.test/nginx:2")
    assert done.returncode == 1
    assert "httpd and nginx show the same page" in done.stdout


def test_an_interrupted_run_says_so_and_leaves_nothing(kubernetes: Kubernetes) -> None:
    with subprocess.Popen(
        [KIND / "e2e", "--lab", "clusterip"],
        env=kubernetes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "✓ nginx and httpd run" in line)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        printed = process.stdout.read()
    assert process.returncode == 130
    assert printed.endswith("e2e: interrupted\n")
    assert "Traceback" not in printed
    assert [service["metadata"]["name"] for service in kubernetes.api.objects("Service")] == ["kube-dns"]


def test_a_lab_fails_and_says_why_where_no_proxy_follows(kubernetes: Kubernetes) -> None:
    """Ends kproxy, so only those follow that need none."""
    kubernetes.daemon_sets.freeze("kproxy")
    done = e2e(kubernetes, "--lab", "clusterip", "--patience", "1")
    assert done.returncode == 1
    assert "✗ both answer at the ClusterIP" in done.stdout
    assert "was answered by nobody 3×" in done.stdout
    assert "kproxy on node-1, a dry run:\nnftables mode, node node-1:" in done.stdout
    assert "Service kproxy-e2e-clusterip/web" in done.stdout  # what the dry run would add
    assert "failed: clusterip" in done.stdout


def test_nothing_is_tried_where_there_is_no_kproxy(kubernetes: Kubernetes) -> None:
    kubernetes.daemon_sets.deleted(Key(SYSTEM, "kproxy"))
    done = e2e(kubernetes)
    assert done.returncode == 2
    assert '"kproxy" not found' in done.stdout


def test_nothing_is_tried_where_there_are_no_nodes(kubernetes: Kubernetes) -> None:
    for node in kubernetes.cluster.nodes:
        kubernetes.api.delete("Node", node.name)
    done = e2e(kubernetes)
    assert done.returncode == 2
    assert done.stdout == "e2e: this cluster has no nodes\n"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    done = subprocess.run([KIND / "e2e"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "kubectl is missing on this machine" in done.stdout
