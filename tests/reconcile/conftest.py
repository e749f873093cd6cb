from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lab.namespaces import Namespace
from tests.reconcile.driven import Part, part
from tests.reconcile.objects import Object
from tests.reconcile.one_node import OneNode

MakePart = Callable[..., Part]


@pytest.fixture
def make_part(netns: Namespace) -> Iterator[MakePart]:
    """Makes reconcilers that share the kernel of `netns`; the arguments are those of `part`."""
    with ExitStack() as made:

        def make(*objects: Object, **options: Any) -> Part:
            new = part(netns, *objects, **options)
            made.callback(new.kernel.close)
            return new

        yield make


@pytest.fixture
def here(tmp_path: Path) -> Iterator[OneNode]:
    """A node of its own."""
    with OneNode(tmp_path) as made:
        yield made
        for log in sorted(tmp_path.glob("*.log")):  # pytest shows it where a test has failed
            print(f"--- {log.name}\n{log.read_text()[-4000:]}")
