"""An nftables kernel in a namespace of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kproxy.dataplane.nftables.features import Features
from kproxy.dataplane.nftables.kernel import NftablesKernel
from tests.lab.namespaces import Namespace
from tests.nftables.samples import BOTH

OpenKernel = Callable[..., NftablesKernel]
WITHOUT_OWNER = Features(owner=False, destroy=True)  # as kernels before 6.9 are


@pytest.fixture
def open_kernel(netns: Namespace) -> Iterator[OpenKernel]:
    """Opens the kernel side in a namespace, `netns` unless told; closed when the test ends."""
    with ExitStack() as opened:

        def open_one(where: Namespace = netns, features: Features | None = None) -> NftablesKernel:
            return opened.enter_context(where.run(NftablesKernel, BOTH, features))

        yield open_one


@pytest.fixture
def kernel(open_kernel: OpenKernel) -> NftablesKernel:
    return open_kernel()
