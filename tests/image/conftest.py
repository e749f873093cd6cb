"""The image, built once as a user builds it, and containers of it. Skipped, with a reason, where docker is not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.image.docker import REPOSITORY, Container, UnavailableError, daemon_with_base, docker, succeed
from tests.image.node import READY
from tests.lab.waiting import eventually

IMAGE = "kproxy:under-test"
CLUSTER_IP = "10.96.0.10"

Start = Callable[..., Container]


@pytest.fixture(scope="session")
def built() -> Iterator[str]:
    """What `make image` printed, with the image there until the end."""
    with ExitStack() as until_the_end:
        try:
            until_the_end.enter_context(daemon_with_base())
        except UnavailableError as error:
            pytest.skip(str(error))
        made = subprocess.run(
            ["make", "image", f"IMAGE={IMAGE}", "ENGINE=docker"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        yield succeed(made)
        docker("rmi", IMAGE)


@pytest.fixture(scope="session")
def image(built: str) -> str:
    """The image's name."""
    assert built
    return IMAGE


@pytest.fixture
def start(image: str) -> Iterator[Start]:
    """Starts containers of the image, which go when the test ends: `start(options, arguments)`."""
    with ExitStack() as until_the_end:

        def begin(options: list[str], arguments: list[str]) -> Container:
            container = Container(image, options, arguments)
            until_the_end.callback(container.remove)
            return container

        yield begin


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tls.crt and tls.key of an API server at 127.0.0.1."""
    directory = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=kubernetes"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "tls.key", "-out", "tls.crt"],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory


class NodeContainer:
    """A container that stands for a node: other containers share its network, and its pods answer."""

    def __init__(self, start: Start, directory: Path) -> None:
        self.directory = directory
        self.container = start(
            [
                *("--network=none", "--cap-drop=ALL", "--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--tmpfs=/run"),
                *(f"--volume={directory}:/node:ro", f"--volume={REPOSITORY}/tests:/lab/tests:ro"),
                *("--env=PYTHONPATH=/lab", "--env=PYTHONDONTWRITEBYTECODE=1", "--entrypoint=python3"),
            ],
            ["-m", "tests.image.node", "/node"],
        )
        eventually(lambda: READY in self.container.output(), "the node is there")

    def has(self, *pods: str) -> None:
        """Write the manifest that says which pods serve the Service."""
        (self.directory / "objects.json").write_text(json.dumps(objects(*pods)))

    def connect(self, port: int = 80) -> str:
        """Open a connection to the Service's cluster IP: the name of the pod that answers, or the error."""
        program = (
            f"import socket\ntry: print(socket.create_connection(({CLUSTER_IP!r}, {port}), 2).recv(99).decode())\n"
            "except OSError as e: print(e.strerror or e)"
        )
        return succeed(self.container.exec("python3", "-c", program)).strip()


def objects(*pods: str) -> dict[str, Any]:
    """A Service with these endpoints, and the node, as `kubectl get -o json` prints them."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "hello", "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": CLUSTER_IP,
            "clusterIPs": [CLUSTER_IP],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    }
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "hello-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "hello"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [pod], "conditions": {"ready": True}} for pod in pods],
    }
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node-1"},
        "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.244.0.1"}]},
    }
    return {"apiVersion": "v1", "kind": "List", "items": [service, slice_, node]}


@pytest.fixture
def node(start: Start, tmp_path: Path, certificate: Path) -> NodeContainer:
    """A node whose Service has one endpoint, the first pod."""
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_bytes((certificate / name).read_bytes())
    (tmp_path / "objects.json").write_text(json.dumps(objects("10.244.0.5")))
    return NodeContainer(start, tmp_path)
