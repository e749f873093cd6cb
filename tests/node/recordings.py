"""Facts recorded from kube-proxy's own tests, where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def conformance(file: str) -> Any:
    """A file of the conformance recordings; skips where they are not at hand."""
    default = Path(__file__).parents[3] / "shared" / "conformance"
    path = Path(os.environ.get("KPROXY_CONFORMANCE", default)) / file
    if not path.exists():
        pytest.skip(f"no conformance recordings at {path}: set KPROXY_CONFORMANCE")
    return json.loads(path.read_text())
