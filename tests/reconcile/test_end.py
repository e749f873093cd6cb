"""How a proxy ends, and starts itself anew: at any moment, and soon."""

from __future__ import annotations

import base64
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.proxy_process import HEALTHZ_PORT, METRICS_PORT, kproxy_command, kproxy_environment
from tests.lab.waiting import eventually
from tests.reconcile.objects import CONFIGURATION, NODE, web
from tests.reconcile.one_node import OneNode

SOON = 8.0  # seconds; what is waited for in vain would take 30 or more
_BEFORE = ("setpriv", "--pdeathsig", "KILL")
_FIRST_OF_ITS_CONTAINER = (*_BEFORE, "unshare", "--pid", "--mount-proc", "--fork", "--kill-child")


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def kubeconfig(folder: Path, server: str, **user: object) -> Path:
    path = folder / "kubeconfig"
    said = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "here", "user": user}],
    }
    path.write_text(json.dumps(said))
    return path


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_process_of_a_container_ends_also_while_it_starts(here: OneNode, number: int, status: int) -> None:
    """The kernel keeps from it any signal that it does not handle."""
    begun = here.folder / "begun"
    plugin = program(here.folder, "plugin", f"touch {begun}; exec sleep 60")
    exec_plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    flags = [
        f"--hostname-override={NODE}",
        f"--kubeconfig={kubeconfig(here.folder, here.api.url, exec=exec_plugin)}",
        "--oom-score-adj=0",
    ]
    process = here.host.namespace.start(
        (*_FIRST_OF_ITS_CONTAINER, *kproxy_command(flags)), env=kproxy_environment(), stderr=subprocess.DEVNULL
    )
    try:
        eventually(begun.exists, "it waits for the plugin")
        os.kill(child_of(process), number)
        assert process.wait(SOON) == status
    finally:
        process.kill()
        process.wait()


def config(here: OneNode, cidr: str, kubeconfig_path: Path | None = None) -> Path:
    """Write the configuration file, at once."""
    client = {"kubeconfig": str(kubeconfig_path)} if kubeconfig_path else {}
    draft = here.folder / "draft"
    draft.write_text(json.dumps({**CONFIGURATION, "clusterCIDR": cidr, "clientConnection": client}))
    return draft.rename(here.folder / "config.conf")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends, the first for reading."""
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, 4096)
    for end in ends:
        os.set_blocking(end, False)
    yield ends
    for end in ends:
        os.close(end)


def read_all(end: int) -> str:
    said = b""
    try:
        while piece := os.read(end, 1 << 16):
            said += piece
    except BlockingIOError:
        pass
    return said.decode(errors="replace")


def test_a_signal_ends_also_a_proxy_that_is_about_to_start_itself_anew(here: OneNode, pipe: tuple[int, int]) -> None:
    here.api.put_all(web())
    path = config(here, "10.244.0.0/16")
    command = kproxy_command([f"--config={path}", *here.api.client_flags()])
    theirs = os.open(f"/proc/self/fd/{pipe[1]}", os.O_WRONLY)  # which waits where it is full
    process = here.host.namespace.start((*_BEFORE, *command), env=kproxy_environment(), stderr=theirs)
    os.close(theirs)
    try:
        eventually(lambda: here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 200, "it has synced")
        said = read_all(pipe[0])
        try:
            while os.write(pipe[1], b"\n"):
                pass
        except BlockingIOError:
            pass
        config(here, "10.99.0.0/16")
        system_call = Path(f"/proc/{process.pid}/syscall")
        eventually(lambda: system_call.read_text().split()[1:2] == ["0x2"], "it cannot tell")  # waits to write there
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        while process.poll() is None and time.monotonic() < begin + SOON:
            said += read_all(pipe[0])
        said += read_all(pipe[0])
        assert "starting again" in said
        assert process.poll() == 143
    finally:
        process.kill()
        process.wait()


def test_a_signal_that_the_main_thread_does_not_get_ends_the_proxy(here: OneNode) -> None:
    here.api.put_all(web())
    proxy = here.started()
    another = max(int(task.name) for task in Path(f"/proc/{proxy.pid}/task").iterdir())
    assert ctypes.CDLL(None, use_errno=True).tgkill(proxy.pid, another, signal.SIGTERM) == 0
    assert proxy.stop(0) == 143  # it has got its signal


def test_a_signal_waits_for_what_a_proxy_becomes(here: OneNode) -> None:
    """Until it has handlers again, the first process of a container would get none."""
    here.api.put_all(web())
    gate, arrived, folder = here.folder / "gate", here.folder / "arrived", here.folder / "python"
    folder.mkdir()
    stop = (
        f"if os.path.exists({str(gate)!r}):\n    open({str(arrived)!r}, 'w').close()\n    open({str(gate)!r}).read()\n"
    )
    (folder / "sitecustomize.py").write_text(f"import os\n{stop}")
    command = kproxy_command([f"--config={config(here, '10.244.0.0/16')}", *here.api.client_flags()])
    environment = kproxy_environment()
    environment["PYTHONPATH"] += f":{folder}"
    process = here.host.namespace.start(
        (*_FIRST_OF_ITS_CONTAINER, *command), env=environment, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 200, "it has synced")
        os.mkfifo(gate)
        config(here, "10.99.0.0/16")
        eventually(arrived.exists, "it starts anew")
        os.kill(child_of(process), signal.SIGTERM)
        gate.write_text("go on")
        assert process.wait(SOON) == 143
    finally:
        process.kill()
        process.wait()


def test_a_scrape_that_takes_its_time_does_not_hold_up_the_end(here: OneNode) -> None:
    here.api.put_all(web())
    begun = here.folder / "begun"
    programs = here.folder / "bin"
    programs.mkdir()
    slow = f'case "$*" in *--counters*) touch {begun}; exec sleep 30;; esac'
    program(programs, "iptables-nft-save", f'{slow}; exec {shutil.which("iptables-nft-save")} "$@"')
    proxy = here.proxy("--proxy-mode=iptables")
    proxy.start(PATH=f"{programs}:{os.environ['PATH']}")
    eventually(lambda: here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 200, "it has synced")
    with here.host.connect("127.0.0.1", METRICS_PORT) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(begun.exists, "the scrape has begun")
        begin = time.monotonic()
        assert proxy.stop() == 143
        assert time.monotonic() - begin < SOON


def test_a_proxy_of_which_a_thread_fails_ends(here: OneNode) -> None:
    """Half a proxy would look healthy."""
    here.api.put_all(web())
    flags = [f"--hostname-override={NODE}", "--conntrack-max-per-core=0", "--oom-score-adj=0", *here.api.client_flags()]
    fault = here.folder / "fault"
    os.mkfifo(fault)
    script = (
        "import sys, threading\n"
        "from kproxy.cli.main import main\n"
        f"threading.Thread(target=lambda: 1 / len(open({str(fault)!r}).read()), name='broken', daemon=True).start()\n"
        f"sys.exit(main({flags!r}))\n"
    )
    log = here.folder / "kproxy.log"
    with log.open("wb") as out:
        process = here.host.namespace.start(
            (*_BEFORE, sys.executable, "-c", script), env=kproxy_environment(), stderr=out
        )
    try:
        eventually(lambda: here.host.get(f"http://127.0.0.1:{HEALTHZ_PORT}/readyz").status == 200, "it has synced")
        fault.write_text("")
        assert process.wait(SOON) == 1
    finally:
        process.kill()
        process.wait()
    assert "ZeroDivisionError" in log.read_text()
    assert "kproxy: the thread broken has failed" in log.read_text()


def test_starting_anew_leaves_no_files_with_credentials(here: OneNode) -> None:
    """Such as those that are made of a kubeconfig which has the credentials themselves in it."""
    temporary = here.folder / "tmp"
    temporary.mkdir()
    data = {"client-key-data": base64.b64encode(b"a secret").decode()}
    nobody = kubeconfig(here.folder, "https://127.0.0.1:1", **data)
    proxy = here.proxy(f"--config={config(here, '10.244.0.0/16', nobody)}", source=())
    proxy.start(TMPDIR=str(temporary))
    in_force = f"http://127.0.0.1:{METRICS_PORT}/configz"
    eventually(lambda: "10.244.0.0/16" in here.host.get(in_force).text, "it runs")
    assert len(list(temporary.iterdir())) == 1

    config(here, "10.99.0.0/16", nobody)
    eventually(lambda: "10.99.0.0/16" in here.host.get(in_force).text, "it runs anew")

    assert len(list(temporary.iterdir())) == 1
    proxy.stop()
    assert list(temporary.iterdir()) == []
