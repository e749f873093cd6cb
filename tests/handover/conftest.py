"""A stage for each variant of iptables; what proxies leave on it is removed when a test ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kproxy.dataplane.iptables.commands import Variant
from tests.handover.stage import Stage


@pytest.fixture(scope="session", params=list(Variant))
def open_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture
def stage(open_stage: Stage) -> Iterator[Stage]:
    """A node with pods and clients, others' rules, and no proxy's."""
    yield open_stage
    open_stage.end_proxies()
    open_stage.clean_up()
