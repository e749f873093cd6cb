"""What the tests of the node's own surroundings share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.udp_node import UDPNode


@pytest.fixture
def node() -> Iterator[UDPNode]:
    made = UDPNode()
    yield made
    made.close()
