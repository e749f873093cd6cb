"""What the tests of the node's own surroundings share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.namespaces import Namespace
from tests.node.udp_node import UDPNode


@pytest.fixture
def node(netns: Namespace) -> Iterator[UDPNode]:
    made = UDPNode(netns)
    yield made
    made.close()
