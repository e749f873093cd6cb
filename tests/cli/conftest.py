from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reconcile.one_node import OneNode


@pytest.fixture
def here(tmp_path: Path) -> Iterator[OneNode]:
    """A node of its own."""
    with OneNode(tmp_path) as made:
        yield made
        for log in sorted(tmp_path.glob("*.log")):  # pytest shows it where a test has failed
            print(f"--- {log.name}\n{log.read_text()[-4000:]}")
