"""Run the demo: exit status 0 if every step held, 1 if not, 2 if this machine cannot run it, 130 after Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

from tests.demo.report import Report
from tests.demo.walk import PICTURE, Walk
from tests.lab.cluster import Cluster
from tests.lab.namespaces import CommandError

TOOLS = {"ip": "iproute2", "setpriv": "util-linux", "nft": "nftables"}


def main() -> int:
    """The demo from its first line to its exit status."""
    if os.geteuid() != 0:
        become_root_of_a_user_namespace()
    if missing := [f"{tool} (package {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]:
        return refuse(f"not installed: {', '.join(missing)}")
    report = Report()
    signal.signal(signal.SIGTERM, _interrupt)
    begin = time.monotonic()
    try:
        with open_cluster() as cluster:
            report.line(PICTURE)
            walk = Walk(cluster, report)
            for step in walk.steps():
                step()
                if not walk.possible:
                    report.line("   kproxy does not run on every node: there is nothing more to show")
                    break
        return 0 if report.summary(time.monotonic() - begin) else 1
    except KeyboardInterrupt:
        report.line("\ninterrupted; every process is ended and every namespace is gone")
        return 130


def open_cluster() -> Cluster:
    """The cluster, or an exit with one line that says why there is none."""
    try:
        return Cluster()
    except (OSError, CommandError) as error:
        sys.exit(refuse(f"no network namespaces here: {str(error).strip().splitlines()[-1]}"))


def become_root_of_a_user_namespace() -> None:
    """Start again as root of a user namespace; return only if there is none to be had."""
    wrap = ("unshare", "--user", "--map-root-user", "--net", "--mount")
    if not shutil.which("unshare"):
        sys.exit(refuse("not installed: unshare (package util-linux)"))
    tried = subprocess.run((*wrap, "true"), capture_output=True, text=True, check=False)
    if tried.returncode:
        sys.exit(refuse(f"needs root, or user namespaces for everybody ({tried.stderr.strip()}): try `sudo make demo`"))
    os.execvp("unshare", (*wrap, sys.executable, "-m", "tests.demo"))


def refuse(reason: str) -> int:
    """Say in one line why there is no demo."""
    print(f"demo: {reason}", file=sys.stderr)
    return 2


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
