"""Docker for the tests of the image: the daemon, the base image, containers.

Where no daemon answers, but beside the repository there is a script that makes base images, a daemon is started for the
time of the tests, without bridge, forwarding and packet filter rules of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.lab.waiting import eventually

BASE = "debian:bookworm-slim"
REPOSITORY = Path(__file__).parents[2]
_LOCAL_BASE = REPOSITORY.parent / "shared/tools/local-base-image"
_PID_FILE = Path("/var/run/docker.pid")
_QUIET_DAEMON = ("dockerd", "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")

# What a pod of kproxy is given: see the Dockerfile.
CONFINED = (
    "--network=none",
    "--cap-drop=ALL",
    "--cap-add=NET_ADMIN",
    "--security-opt=no-new-privileges",
    "--read-only",
)


class UnavailableError(Exception):
    """There is nothing to build or run an image with; the message says why."""


def docker(*words: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a docker command, whatever its exit status."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=seconds)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed. Raises AssertionError with its complaint if it failed."""
    assert done.returncode == 0, f"{done.args}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def daemon_with_base() -> Iterator[None]:
    """A daemon that has the base image; one that is started for this is ended again. Raises UnavailableError."""
    if _answers():
        _get_base()
        yield
        return
    if not _LOCAL_BASE.exists() or os.geteuid() != 0:
        raise UnavailableError("no docker daemon answers")
    with _quiet_daemon() if shutil.which("dockerd") else _installed_daemon():
        _get_base()
        yield


@contextmanager
def _quiet_daemon() -> Iterator[None]:
    with Path("/var/log/dockerd.log").open("ab") as log:
        daemon = subprocess.Popen(_QUIET_DAEMON, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        eventually(lambda: _answers() or daemon.poll() is not None, "the docker daemon answers", seconds=30)
        if daemon.poll() is not None:
            raise UnavailableError(f"dockerd cannot run here (exit status {daemon.returncode}): see {log.name}")
        yield
    finally:
        daemon.terminate()
        daemon.wait(30)


@contextmanager
def _installed_daemon() -> Iterator[None]:
    """What the script installs, and starts, with the base image."""
    try:
        yield
    finally:
        if _PID_FILE.exists():
            os.kill(int(_PID_FILE.read_text()), signal.SIGTERM)
            eventually(lambda: not _PID_FILE.exists(), "the docker daemon ends", seconds=30)


def _answers() -> bool:
    return shutil.which("docker") is not None and docker("info").returncode == 0


def _get_base() -> None:
    if _answers() and docker("image", "inspect", BASE).returncode == 0:
        return
    way = [str(_LOCAL_BASE), "bookworm"] if _LOCAL_BASE.exists() else ["docker", "pull", "--quiet", BASE]
    try:
        done = subprocess.run(way, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{BASE} cannot be had: {way[0]} took more than 300 s") from error
    if done.returncode:
        raise UnavailableError(f"{BASE} cannot be had: {done.stderr.strip()}")


class Container:
    """A container that runs until it is removed."""

    def __init__(self, image: str, options: Sequence[str], arguments: Sequence[str]) -> None:
        self.id = succeed(docker("run", "--detach", *options, image, *arguments)).strip()

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in it."""
        return docker("exec", self.id, *command)

    def output(self) -> str:
        """What it has printed so far."""
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    def stop(self) -> int:
        """Ask it to end as kubelet does; returns its exit status."""
        succeed(docker("stop", "--time=10", self.id))
        return int(succeed(docker("inspect", "--format={{.State.ExitCode}}", self.id)))

    def remove(self) -> None:
        """End it, if it runs, and forget it."""
        docker("rm", "--force", "--volumes", self.id)
