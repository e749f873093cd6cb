"""What a scanner for vulnerable packages, or an SBOM, finds in the image, which has no package manager to ask."""

from __future__ import annotations

import json
import re

import pytest

from tests.image.docker import CONFINED, docker, succeed
from tests.image.test_lock import LOCK

LOOK = """
import importlib.metadata, json, pathlib
print(json.dumps({
    "os": pathlib.Path("/etc/os-release").read_text(),
    "debian": {file.name: file.read_text() for file in pathlib.Path("/var/lib/dpkg/status.d").iterdir()},
    "python": {found.name: found.version for found in importlib.metadata.distributions()},
}))
"""
LINKED = {
    "libc6",
    "libssl3",
    "libexpat1",
    "libsqlite3-0",
    "zlib1g",
    "python3.11-minimal",
    "iptables",
    "ca-certificates",
}


@pytest.fixture(scope="module")
def found(image: str) -> dict:
    return json.loads(succeed(docker("run", "--rm", *CONFINED, "--entrypoint=python3", image, "-c", LOOK)))


def test_the_packages_of_debian_are_recorded_with_their_versions(found: dict) -> None:
    fields = {
        name: dict(re.findall(r"^([A-Z][\w-]*): (.*)$", text, re.MULTILINE)) for name, text in found["debian"].items()
    }

    assert {"ID=debian", 'VERSION_ID="12"'} <= set(found["os"].splitlines())
    assert fields.keys() >= LINKED
    for name, package in fields.items():
        assert package["Package"] == name
        assert package["Status"] == "install ok installed"
        assert re.fullmatch(r"[\w.:+~-]+", package["Version"])


def test_the_packages_of_python_are_those_of_the_lock_file(found: dict) -> None:
    pinned = dict(re.findall(r"^([a-z0-9.-]+)==(\S+) \\$", LOCK, re.MULTILINE))
    installed = {re.sub(r"[._]", "-", name.lower()): version for name, version in found["python"].items()}

    assert installed.pop("kproxy")
    assert installed.items() <= pinned.items()
    assert installed.keys() >= {"kubernetes", "urllib3", "msgspec", "pyyaml"}
