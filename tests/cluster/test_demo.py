"""The demo runs as users run it, tells what it saw, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab.proxy_process import REPOSITORY
from tests.lab.waiting import eventually


def start_demo() -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "tests.demo")
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def descendants(pid: int) -> set[int]:
    """Processes below one, as far as they still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        if parent == pid:
            child = int(stat.parent.name)
            found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_every_step_of_the_demo_holds():
    demo = start_demo()
    text, _ = demo.communicate(timeout=120)

    assert demo.returncode == 0, text
    assert re.search(r"^all \d+ steps held", text, re.MULTILINE), text
    assert "✗" not in text
    assert "\033[" not in text  # colours are for terminals


def test_without_namespaces_the_demo_says_so_in_one_line():
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$0" -m tests.demo'
    command = ("unshare", "--user", "--map-root-user", "sh", "-c", forbid, sys.executable)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"demo: no network namespaces here: .*No space left on device\n", done.stderr)


def test_an_interrupted_demo_cleans_up():
    interrupt_and_look(signal.SIGINT, 130)


def test_a_killed_demo_leaves_no_process():
    interrupt_and_look(signal.SIGKILL, -signal.SIGKILL)


def interrupt_and_look(how: signal.Signals, status: int) -> None:
    demo = start_demo()
    assert demo.stdout is not None
    with demo, demo.stdout:
        eventually(lambda: len(kproxies := descendants(demo.pid)) >= 3 and kproxies, "the kproxies run", seconds=30)
        children = descendants(demo.pid)
        os.kill(demo.pid, how)
        assert demo.wait(30) == status
    eventually(lambda: not alive(children), "every process is gone")
