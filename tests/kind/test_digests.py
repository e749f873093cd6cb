"""Images that are named by their digest, as kind's release notes name those of nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kind.fakes import Fakes
from tests.kind.test_scripts import KIND, run

NODES = "kindest/node:v1.36.1@sha256:c0ffee"


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def created_with(fakes: Fakes, **variables: str) -> list[str]:
    """What kind was asked for beyond the configuration; `up` ends there, for there is no cluster."""
    run("up", env=fakes.environment(KPROXY_IMAGE="kproxy:1", **variables))
    (create,) = [call for call in fakes.calls("kind") if "create" in call]
    return create.partition(f"--config {KIND}/cluster.yaml")[2].split()


def test_kind_is_given_the_node_image_as_it_is_named(fakes: Fakes) -> None:
    assert created_with(fakes, KIND_NODE_IMAGE=NODES) == ["--image", NODES]


def test_a_node_image_that_kind_has_pulled_itself_is_used(fakes: Fakes) -> None:
    fakes.has_images("nginx@sha256:0ff", "kindest/node@sha256:c0ffee", "kindest/node@sha256:decaf")
    assert created_with(fakes) == ["--image", "kindest/node@sha256:c0ffee"]


def test_one_with_a_tag_says_its_version_and_comes_first(fakes: Fakes) -> None:
    fakes.has_images("kindest/node@sha256:c0ffee", "kindest/node:v1.9.0", "kindest/node:v1.36.1")
    assert created_with(fakes) == ["--image", "kindest/node:v1.36.1"]


def test_what_kind_cannot_bring_is_left_to_the_nodes(fakes: Fakes) -> None:
    fakes.has_images("nginx@sha256:0ff")
    done = run("load", "kproxy", "nginx@sha256:0ff", env=fakes.environment())
    assert done.returncode == 0, done.stderr
    assert "nginx@sha256:0ff is named by its digest" in done.stdout
    assert "left to the nodes" in done.stdout
    assert fakes.calls("kind") == []
