"""One cluster for all tests of this folder; what a test makes in it is removed when the test ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.cluster import Cluster
from tests.lab.proxy_process import ProxyProcess


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.start_proxies()
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Three nodes with a kproxy each, and nothing else."""
    yield shared_cluster
    shared_cluster.clear()
    for proxy in proxies(shared_cluster):
        if not proxy.running:
            proxy.start()
            proxy.wait_until_synced()
        print(f"--- {proxy.log.name}\n{proxy.log_end()}")  # pytest shows it where a test has failed


def proxies(cluster: Cluster) -> list[ProxyProcess]:
    """The kproxy of each node."""
    return [node.proxy for node in cluster.nodes if node.proxy is not None]
