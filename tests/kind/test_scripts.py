"""The scripts of kind/ by themselves: what they refuse, and how they call kind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kind.fakes import Fakes

KIND = Path(__file__).resolve().parents[2] / "kind"
SCRIPTS = ("up", "down", "takeover", "load")


def run(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KIND / script, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on this machine")
def test_shellcheck_finds_nothing() -> None:
    files = [KIND / name for name in (*SCRIPTS, "common.sh")]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("script", "arguments", "tools"),
    [
        ("up", (), ("docker or podman", "kind", "kubectl", "python3", "make")),
        ("down", (), ("docker or podman", "kind")),
        ("takeover", (), ("kubectl", "python3")),
        ("load", ("kproxy", "nginx"), ("docker or podman", "kind")),
    ],
)
def test_all_that_is_missing_is_named_at_once(
    script: str, arguments: tuple[str, ...], tools: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "readlink").symlink_to(shutil.which("readlink") or "")  # every system has it
    done = run(script, *arguments, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: missing on this machine:\n")
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]] == list(tools)


def test_a_docker_without_daemon_is_told_from_a_missing_one(fakes: Fakes) -> None:
    fakes.has_no_daemon()
    done = run("up", env=fakes.environment())
    assert done.returncode == 1
    assert "docker is there but does not answer. Is its daemon running" in done.stderr
    assert fakes.calls("kind") == []


@pytest.mark.parametrize("arguments", [("--mode", "userspace"), ("--mode=",), ("--mode",)])
@pytest.mark.parametrize("script", ["up", "takeover"])
def test_unknown_modes_are_refused(script: str, arguments: tuple[str, ...], fakes: Fakes) -> None:
    done = run(script, *arguments, env=fakes.environment())
    assert done.returncode == 1
    assert "must be nftables, iptables or ipvs" in done.stderr
    assert fakes.calls("kind") == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_arguments_are_refused(script: str, fakes: Fakes) -> None:
    done = run(script, "--frob", env=fakes.environment())
    assert done.returncode == 1
    assert f"usage: kind/{script}" in done.stderr


def test_a_configuration_that_does_not_exist_is_refused(fakes: Fakes) -> None:
    done = run("up", env=fakes.environment(KIND_CONFIG="/nonexistent/cluster.yaml"))
    assert done.returncode == 1
    assert "KIND_CONFIG=/nonexistent/cluster.yaml: there is no such file" in done.stderr
    assert fakes.calls("make") == []


def test_down_removes_the_named_cluster_and_only_if_it_is_there(fakes: Fakes) -> None:
    fakes.has_clusters("kproxy", "mine")
    done = run("down", env=fakes.environment(KIND_CLUSTER_NAME="mine"))
    assert done.returncode == 0, done.stderr
    assert fakes.calls("kind") == ["kind delete cluster --name mine"]

    done = run("down", env=fakes.environment(KIND_CLUSTER_NAME="yours"))
    assert done.returncode == 0
    assert done.stdout == "there is no cluster yours\n"
    assert len(fakes.calls("kind")) == 1


@pytest.mark.parametrize("name", ["k.*", "-v"])
def test_a_clusters_name_is_no_pattern_and_no_option(name: str, fakes: Fakes) -> None:
    fakes.has_clusters("kproxy")
    done = run("down", env=fakes.environment(KIND_CLUSTER_NAME=name))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"there is no cluster {name}\n", "")

    fakes.has_clusters("kproxy", name)
    done = run("down", env=fakes.environment(KIND_CLUSTER_NAME=name))
    assert done.returncode == 0, done.stderr
    assert fakes.calls("kind") == [f"kind delete cluster --name {name}"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_within_their_directory_and_through_a_link(script: str, fakes: Fakes, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(KIND / script)
    for command in (["sh", script, "--frob"], [link, "--frob"]):
        done = subprocess.run(
            command, cwd=KIND, env=fakes.environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert f"usage: kind/{script}" in done.stderr


def test_load_brings_what_is_here_and_leaves_the_rest_to_the_nodes(fakes: Fakes) -> None:
    fakes.has_images("nginx", "registry.test/kproxy:1")
    done = run("load", "kproxy", "nginx", "httpd", "registry.test/kproxy:1", env=fakes.environment())
    assert done.returncode == 0, done.stderr
    assert fakes.calls("kind") == [
        "kind load docker-image --name kproxy nginx",
        "kind load docker-image --name kproxy registry.test/kproxy:1",
    ]
    assert "httpd is not on this machine: left to the nodes" in done.stdout
