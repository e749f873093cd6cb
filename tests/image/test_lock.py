"""The lock file that the image is built from."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.image.docker import REPOSITORY

LOCK = (REPOSITORY / "requirements.lock").read_text()


def test_every_dependency_is_pinned_to_a_version_that_fits() -> None:
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", LOCK, re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    for dependency in map(Requirement, project["dependencies"]):
        name = canonicalize_name(dependency.name)
        assert name in pinned, f"{name} is not in requirements.lock: see there how it is made"
        assert dependency.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {dependency.specifier}"


def test_every_pin_has_hashes_and_comes_from_the_index() -> None:
    pins = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]

    assert len(pins) > 10
    for pin in pins:
        assert re.match(r"[a-z0-9.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}\b", pin), pin
