"""The objects of kind/e2e and its patches, as an API server takes them: a real one if KUBEBUILDER_ASSETS has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kind.labs import manifests
from tests.kind.kubernetes import Kubernetes
from tests.lab.apiserver_real import RealApiServer
from tests.lab.cluster import API_ADDRESS, Cluster
from tests.lab.host import Host

Object = dict[str, Any]
Kubectl = Callable[..., str]

NAMESPACE = "kproxy-e2e-objects"

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on this machine")


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """kubectl in a namespace of its own."""
    directory = tmp_path_factory.mktemp("api")
    with _real(directory) if "KUBEBUILDER_ASSETS" in os.environ else _stand_in(directory) as run:
        run("create", "-f", "-", stdin=json.dumps(manifests.namespace(NAMESPACE)))

        def kubectl(*arguments: str, stdin: str = "") -> str:
            return run("-n", NAMESPACE, *arguments, stdin=stdin)

        yield kubectl


@contextmanager
def _real(directory: Path) -> Iterator[Kubectl]:
    host = Host("fabric", API_ADDRESS)
    try:
        host.configure(f"addr add {API_ADDRESS}/24 dev lo")
        with RealApiServer(Path(os.environ["KUBEBUILDER_ASSETS"]), host, directory, ("10.96.0.0/16",)) as api:
            command = ("kubectl", *api.client_flags())
            yield lambda *arguments, stdin="": host.namespace.command(*command, *arguments, stdin=stdin).stdout
    finally:
        host.close()


@contextmanager
def _stand_in(directory: Path) -> Iterator[Kubectl]:
    with Cluster(1) as cluster, Kubernetes(cluster, directory) as kubernetes:

        def kubectl(*arguments: str, stdin: str = "") -> str:
            command, environment = ("kubectl", *arguments), kubernetes.environment()
            return subprocess.run(
                command, env=environment, input=stdin, stdout=subprocess.PIPE, text=True, check=True
            ).stdout

        yield kubectl


def create(kubectl: Kubectl, *objects: Object) -> None:
    documents = "".join(f"---\n{json.dumps(each)}\n" for each in objects)
    kubectl("create", "--validate=strict", "-f", "-", stdin=documents)


def patch(kubectl: Kubectl, name: str, change: Object, *more: str) -> Object:
    kubectl("patch", "service", name, "--type=merge", *more, "-p", json.dumps(change))
    changed: Object = json.loads(kubectl("get", "service", name, "-o", "json"))
    return changed


def test_pods_and_deployments_are_taken(kubectl: Kubectl) -> None:
    pods = manifests.server("nginx", manifests.NGINX, "web"), manifests.server("httpd", manifests.HTTPD, "web")
    create(kubectl, *pods, manifests.deployment("many", manifests.NGINX, 2), manifests.client())
    names = kubectl("get", "pods,deployments", "-o", "name").split()
    assert {"pod/nginx", "pod/httpd", "pod/client", "deployment.apps/many"} <= set(names)


def test_a_service_becomes_a_node_port_and_goes_back(kubectl: Kubectl) -> None:
    create(kubectl, manifests.service("convert", "web"))
    outside = patch(kubectl, "convert", {"spec": {"type": "NodePort"}})
    assert 30000 <= outside["spec"]["ports"][0]["nodePort"] < 32768
    inside = patch(kubectl, "convert", {"spec": {"type": "ClusterIP"}})
    assert "nodePort" not in inside["spec"]["ports"][0]
    assert inside["spec"]["clusterIP"] == outside["spec"]["clusterIP"]


def test_the_chosen_node_port_is_given(kubectl: Kubectl) -> None:
    create(kubectl, manifests.service("chosen", "web", [{"port": 80, "nodePort": 30007}], type="NodePort"))
    found = json.loads(kubectl("get", "service", "chosen", "-o", "json"))
    assert found["spec"]["ports"][0]["nodePort"] == 30007


def test_the_status_of_a_load_balancer_can_be_set(kubectl: Kubectl) -> None:
    create(kubectl, manifests.service("balanced", "web", type="LoadBalancer", loadBalancerClass="kproxy.dev/e2e"))
    ingress = {"loadBalancer": {"ingress": [{"ip": "203.0.113.10"}]}}
    changed = patch(kubectl, "balanced", {"status": ingress}, "--subresource=status")
    assert changed["status"]["loadBalancer"]["ingress"] == [{"ip": "203.0.113.10", "ipMode": "VIP"}]
    changed = patch(kubectl, "balanced", {"spec": {"loadBalancerSourceRanges": ["192.0.2.1/32"]}})
    assert changed["spec"]["loadBalancerSourceRanges"] == ["192.0.2.1/32"]
    assert changed["status"]["loadBalancer"]["ingress"][0]["ip"] == "203.0.113.10"


def test_affinity_goes_on_and_off(kubectl: Kubectl) -> None:
    create(kubectl, manifests.service("sticky", "web"))
    changed = patch(kubectl, "sticky", {"spec": {"sessionAffinity": "ClientIP"}})
    assert changed["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] == 10800
    changed = patch(kubectl, "sticky", {"spec": {"sessionAffinity": "None", "sessionAffinityConfig": None}})
    assert changed["spec"]["sessionAffinity"] == "None"


def test_services_without_an_address_are_taken(kubectl: Kubectl) -> None:
    target = f"web.{NAMESPACE}.svc.cluster.local"
    alias = manifests.service("alias", type="ExternalName", externalName=target)
    create(kubectl, manifests.service("headless", "web", clusterIP="None"), alias)
    assert kubectl("get", "service", "headless", "-o", "jsonpath={.spec.clusterIP}") == "None"
    assert kubectl("get", "service", "alias", "-o", "jsonpath={.spec.clusterIP}") == ""
