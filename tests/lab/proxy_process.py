"""A kproxy process on a node of the cluster lab."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.host import Host
from tests.lab.waiting import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
HEALTHZ_PORT = 10256
METRICS_PORT = 10249
_STOP_SECONDS = 10.0
_SETPRIV = shutil.which("setpriv") or "setpriv"


def kproxy_command(flags: Sequence[str]) -> tuple[str, ...]:
    """kproxy as a user starts it."""
    return (sys.executable, "-m", "kproxy", *flags)


def kproxy_environment() -> dict[str, str]:
    """The environment in which that finds this repository's kproxy."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


class ProxyProcess:
    """`python -m kproxy` in a node's namespace, as users start it. It dies with the thread that holds the namespace,
    so nothing of a killed test run is left behind. The log goes to a file."""

    def __init__(self, node: Host, flags: Sequence[str], log: Path) -> None:
        self._node, self.log = node, log
        self._command = kproxy_command(flags)
        self._process: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number. It must have been started."""
        assert self._process
        return self._process.pid

    def start(self, **environment: str) -> None:
        """Start it, with this in its environment; returns at once."""
        with self.log.open("ab") as log:
            self._process = self._node.namespace.start(
                (_SETPRIV, "--pdeathsig", "KILL", *self._command),
                env=kproxy_environment() | {"PYTHONFAULTHANDLER": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it; returns its exit status. Rules stay, as they do when a proxy's pod is replaced."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal_number)
        try:
            return process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # so that the log tells where each thread is
            process.wait()
            raise

    def wait_until_synced(self, *, seconds: float = 30.0) -> None:
        """Wait until it has programmed the kernel. Raises AssertionError with the end of the log otherwise."""

        def synced() -> bool:
            if not self.running:
                raise AssertionError(f"kproxy on {self._node} has ended")
            return self.metric("kubeproxy_sync_proxy_rules_last_timestamp_seconds") > 0

        try:
            eventually(synced, f"kproxy on {self._node} has synced", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_end()}") from None

    def scrape(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        text = self._node.get(f"http://127.0.0.1:{METRICS_PORT}/metrics").text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def metric(self, name: str) -> float:
        """The smallest sample of a metric over its labels; 0 if there is none."""
        samples = [value for sample, value in self.scrape().items() if sample.partition("{")[0] == name]
        return min(samples, default=0.0)

    def log_end(self, lines: int = 25) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
