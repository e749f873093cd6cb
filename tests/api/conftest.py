"""A running API stand-in, and sources that are stopped when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from structlog.typing import EventDict

from kproxy.api.client import Connection, connect
from kproxy.api.server import ApiServerSource
from kproxy.api.watch import Pace
from tests.api.recorder import Recorder
from tests.lab.apiserver import ApiServer

Follow = Callable[..., Recorder]
QUICK = Pace(first_retry=0.02, longest_retry=0.1)


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    """A Service of namespace default."""
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.10", "ports": ports} | spec,
    }


def endpoint_slice(name: str = "web-1", address: str = "10.244.0.5") -> dict[str, Any]:
    """An EndpointSlice of Service default/web."""
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def follow(api: ApiServer) -> Iterator[Follow]:
    """Follows the stand-in as node-1 and returns the recorder; `wait=False` does not wait for the first lists."""
    sources: list[ApiServerSource] = []

    def start(
        connection: Connection | None = None, *, pace: Pace = QUICK, wait: bool = True, stream: bool = True
    ) -> Recorder:
        recorder = Recorder()
        connection = connection or connect(master=api.url, qps=-1)
        source = ApiServerSource(connection, node_name="node-1", pace=pace, stream=stream)
        sources.append(source)
        source.start(recorder)
        if wait:
            # A kind is said to be current by its list and by its watch; a streamed list is both at once.
            recorder.until(lambda: recorder.complete and (stream or recorder.alive() > 1), "lists and watches")
        return recorder

    yield start
    api.faults.clear()
    for source in sources:
        source.stop()


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    with structlog.testing.capture_logs() as captured:
        yield captured
