"""One laboratory for all the examples of a test; each example leaves it as it found it."""

from __future__ import annotations

import pytest

from kproxy.model import Family
from tests.lab.packets import Lab
from tests.oracle.worlds import PRIMARY, SECOND, in_family


@pytest.fixture
def node_lab(make_lab) -> Lab:
    return make_lab(addresses=[in_family(address, family) for family in Family for address in (PRIMARY, SECOND)])
