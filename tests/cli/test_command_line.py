"""What a user of the command line sees: answers, errors in one line each, exit codes."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import kproxy
from tests.lab.apiserver_faults import OnRequest
from tests.lab.proxy_process import kproxy_command, kproxy_environment
from tests.reconcile.objects import WEB_IP, endpoints, port, refused, service, services, web
from tests.reconcile.one_node import OneNode

ESTABLISHED = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
NOWHERE = "--master=http://127.0.0.1:1"


def test_version_and_help_need_no_machine():
    version = run("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert re.fullmatch(rf"kproxy {re.escape(kproxy.__version__)}\nKubernetes v1\.\d+\.\d+\n", version.stdout)
    text = run("--help")
    assert (text.returncode, text.stderr) == (0, "")
    for flag in ("--dry-run", "--manifests", "--once", "--cleanup", "--proxy-mode"):
        assert flag in text.stdout


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dryrun"], "unknown flag: --dryrun (did you mean --dry-run?)"),
        (["start"], 'unexpected argument "start"'),
        (["--once", "--cleanup"], "--cleanup and --once cannot be combined"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_makes_no_sense_is_refused_in_one_line(flags: list[str], complaint: str):
    done = run(*flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == f"kproxy: {complaint}"
    assert "Traceback" not in done.stderr


def test_a_dry_run_that_makes_no_sense_failed():
    assert run("--dry-run=true", "--nonsense").returncode == 2


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        kproxy_command(flags), env=kproxy_environment(), capture_output=True, text=True, timeout=30, check=False
    )


# Manifests


def test_everything_that_is_wrong_with_manifests_is_named(here: OneNode):
    broken = service("web", WEB_IP, ports=[port(80) | {"port": "eighty"}])
    path = here.manifests(broken, endpoints("web", "10.0.0.300"))
    before = here.generation()

    done = here.kproxy("--dry-run", f"--manifests={path}")

    assert (done.returncode, done.stdout) == (2, "")
    assert "document 1 (Service default/web): spec.ports[0].port: Expected" in done.stderr
    assert "document 2 (EndpointSlice default/web-1): endpoints[0].addresses[0]: Expected an IP address" in done.stderr
    for line in done.stderr.splitlines():
        assert str(path) in line
    assert here.kproxy("--once", f"--manifests={path}").returncode == 1
    assert here.generation() == before


def test_manifests_that_do_not_exist(here: OneNode):
    done = here.kproxy("--dry-run", f"--manifests={here.folder}/nothing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"kproxy: {here.folder}/nothing.yaml: No such file or directory\n"


# The API server


def test_an_api_server_that_cannot_be_reached_is_given_up(here: OneNode):
    done = here.kproxy("--dry-run", NOWHERE)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("kproxy: gave up after 10 s without a list of EndpointSlice, Node, Service, ServiceCIDR: ")
    assert line.endswith("Connection refused")
    assert "http://127.0.0.1:1/" in line


def test_no_way_to_an_api_server_is_known(here: OneNode):
    done = here.kproxy("--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "--kubeconfig" in line


def test_an_impatient_user_ends_the_wait_without_a_traceback(here: OneNode):
    process = here.host.namespace.start(
        kproxy_command(["--dry-run", "-v=4", NOWHERE]), env=kproxy_environment(), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process.stderr as said:
        first = said.readline()
        process.send_signal(signal.SIGINT)
        rest = said.read()
    assert process.wait(5) == 130
    assert "Connection refused" in first
    assert "Traceback" not in rest


def test_the_objects_come_from_the_api_server(here: OneNode):
    here.api.put_all(web())
    done = here.kproxy("--dry-run", *here.api.client_flags())
    assert (done.returncode, done.stderr) == (1, "")
    assert "Service default/web" in done.stdout


# Output


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_a_reader_that_has_seen_enough_is_no_error(here: OneNode, reader: str):
    path = here.manifests(*web(), *services(300))  # more than a pipe holds
    for flags in (["--dry-run", f"--manifests={path}"], ["--help"]):
        script = f'{{ "$@"; echo "exit $?" >&2; }} | {reader}'
        done = here.kproxy(*flags, through=("bash", "-c", script, "bash"))
        assert done.stdout.count("\n") == (reader != "true")
        assert re.fullmatch(r"exit [012]\n", done.stderr)


def test_write_config_to_writes_the_whole_configuration_and_leaves_the_kernel_alone(here: OneNode):
    path = here.folder / "config.yaml"
    before = here.generation()
    done = here.kproxy(f"--write-config-to={path}", "--cluster-cidr=10.0.0.0/8", "--manifests=/etc/manifests")
    assert (done.returncode, done.stdout) == (0, "")
    written = path.read_text()
    assert "kind: KubeProxyConfiguration" in written
    assert "clusterCIDR: 10.0.0.0/8" in written
    assert here.generation() == before
    again = here.folder / "again.yaml"
    assert here.kproxy(f"--config={path}", f"--write-config-to={again}").returncode == 0
    assert again.read_text() == written


def test_write_config_to_names_what_a_file_cannot_say(here: OneNode):
    path = here.folder / "config.yaml"
    done = here.kproxy(f"--write-config-to={path}", "--healthz-port=0", "--metrics-bind-address=192.0.2.1")
    assert done.returncode == 0
    assert "a file cannot set healthzBindAddress to zero or nothing" in done.stderr
    assert "metricsBindAddress" not in done.stderr


@pytest.mark.parametrize(
    "source", [["--kubeconfig=/nonexistent"], ["--manifests=/nonexistent"]], ids=["API server", "manifests"]
)
def test_a_start_without_a_way_to_the_objects_changes_no_kernel_setting(here: OneNode, source: list[str]):
    before = here.host.exec("cat", ESTABLISHED)
    done = here.kproxy(*source, "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=2222s")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("kproxy: ")
    assert "/nonexistent: " in done.stderr
    assert here.host.exec("cat", ESTABLISHED) == before


@pytest.mark.parametrize("place", ["missing/config.yaml", ""])
def test_a_configuration_that_cannot_be_written(here: OneNode, place: str):
    path = Path(here.folder, place)
    done = here.kproxy(f"--write-config-to={path}")
    assert done.returncode == 1
    assert re.fullmatch(rf"kproxy: {re.escape(str(path))}: (No such file or directory|Is a directory)\n", done.stderr)


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_proxy_within_a_second_and_the_rules_stay(here: OneNode, number: int, status: int):
    here.api.put_all(web())
    proxy = here.started()
    before = here.generation()

    begin = time.monotonic()
    assert proxy.stop(number) == status
    assert time.monotonic() - begin < 1

    assert here.generation() == before
    assert "10.96.0.10 . tcp . 80" in here.nft("list map ip kproxy services")
    assert "Traceback" not in proxy.log.read_text()


def test_a_signal_ends_the_proxy_even_when_the_api_server_says_nothing(here: OneNode):
    here.api.put_all([*web(), *refused()])
    proxy = here.started()
    here.api.faults.add(OnRequest.HANG, times=None)
    here.api.put(refused("other", "10.96.0.67")[0])  # whose Event nobody takes

    begin = time.monotonic()
    assert proxy.stop() == 143
    assert time.monotonic() - begin < 3
