"""What the tests may do here."""

from __future__ import annotations

from pathlib import Path

import pytest

_ALL_USERS = 0xFFFFFFFF

NEEDS_WIDE_BUFFERS = pytest.mark.skipif(
    int(Path("/proc/self/uid_map").read_text().split()[2]) < _ALL_USERS,
    reason="in a user namespace nft may not widen its send buffer for so much at once",
)
