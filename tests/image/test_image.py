"""The image: what is in it, and that kproxy does its work in a container with no more rights than it needs."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from kproxy import __version__
from tests.image.conftest import NodeContainer, Start
from tests.image.docker import CONFINED, docker, succeed
from tests.image.node import API_PORT, PODS
from tests.lab.waiting import eventually

FIRST, SECOND = PODS
LEAVE_SYSCTLS = (
    "--conntrack-max-per-core=0",
    "--conntrack-tcp-timeout-established=0s",
    "--conntrack-tcp-timeout-close-wait=0s",
)


def in_the_network_of(node: NodeContainer) -> list[str]:
    shared = [f"--network=container:{node.container.id}", f"--volume={node.directory}:/node:ro"]
    return [option for option in CONFINED if not option.startswith("--network")] + shared


def kproxy(image: str, node: NodeContainer, *arguments: str, more: tuple[str, ...] = ()) -> CompletedProcess[str]:
    """Run it to its end on the node, with the node's manifests."""
    flags = ("--manifests=/node/objects.json", "--hostname-override=node-1")
    return docker("run", "--rm", *in_the_network_of(node), *more, image, *flags, *arguments)


def test_make_image_prints_the_size_and_what_it_consists_of(built: str) -> None:
    size = re.search(r"([\d.]+) MB  in all", built)
    assert size, built
    assert float(size[1]) < 100
    for part in ("Python", "iptables", "kproxy", "Python package kubernetes"):
        assert re.search(rf"[\d.]+ MB  {part}\n", built), part


@pytest.mark.parametrize("command", ["kproxy", "kube-proxy"])
def test_both_commands_say_their_version(image: str, command: str) -> None:
    done = docker("run", "--rm", *CONFINED, f"--entrypoint=/usr/local/bin/{command}", image, "--version")

    assert succeed(done).splitlines()[0] == f"kproxy {__version__}"


def test_the_labels_say_what_it_is(image: str) -> None:
    labels = json.loads(succeed(docker("image", "inspect", "--format={{json .Config.Labels}}", image)))

    assert labels["org.opencontainers.image.title"] == "kproxy"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_there_is_no_shell_no_compiler_no_package_tool_and_no_setuid(image: str) -> None:
    program = """
import os, shutil
from pathlib import Path
unwanted = "sh bash dash busybox perl gcc cc ld apt-get dpkg pip".split()
print([name for name in unwanted if shutil.which(name)])
files = (Path(directory, name) for directory, _, names in os.walk("/usr") for name in names)
print([str(file) for file in files if file.lstat().st_mode & 0o6000])
"""
    done = docker("run", "--rm", *CONFINED, "--entrypoint=python3", image, "-c", program)

    assert succeed(done) == "[]\n[]\n"


def test_what_kproxy_loads_and_runs_is_there(image: str) -> None:
    program = """
import kproxy.api.client, kproxy.cli.run, iptc, pyroute2
import ssl, subprocess
for command in "iptables-nft-save", "ip6tables-nft-restore", "iptables-legacy-restore", "ip6tables-legacy-save":
    print(subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout, end="")
print(len(ssl.create_default_context().get_ca_certs()) > 10)
"""
    done = docker("run", "--rm", *CONFINED, "--entrypoint=python3", image, "-W", "ignore", "-c", program)

    assert [re.sub(r" v[0-9.]+", "", line) for line in succeed(done).splitlines()] == [
        "iptables-nft-save (nf_tables)",
        "ip6tables-nft-restore (nf_tables)",
        "iptables-restore (legacy)",
        "ip6tables-save (legacy)",
        "True",
    ]


def test_a_dry_run_shows_what_would_be_and_does_nothing(image: str, node: NodeContainer) -> None:
    done = kproxy(image, node, "--dry-run")

    assert done.returncode == 1, done.stderr
    assert "ip map services: 10.96.0.10 . tcp . 80" in done.stdout
    assert node.connect() == "Connection refused"


@pytest.mark.parametrize(
    "flags",
    [
        ("--proxy-mode=nftables",),
        ("--proxy-mode=iptables", "--iptables-localhost-nodeports=false"),  # a sysctl otherwise
    ],
)
def test_a_sync_with_net_admin_alone(image: str, node: NodeContainer, flags: tuple[str, ...]) -> None:
    assert node.connect() == "Connection refused"

    succeed(kproxy(image, node, *flags, "--once"))

    assert node.connect() == FIRST
    again = kproxy(image, node, *flags, "--dry-run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to change" in again.stdout


def test_legacy_iptables_with_net_raw_too(image: str, node: NodeContainer) -> None:
    """The first sync goes through iptables-restore, a small change through python-iptables."""
    succeed(
        node.container.exec("iptables-legacy", "--table=mangle", "--new-chain=KUBE-IPTABLES-HINT")
    )  # as kubelet does
    legacy = ("--cap-add=NET_RAW", "--tmpfs=/run")  # on a node: its /run/xtables.lock

    succeed(kproxy(image, node, "--proxy-mode=iptables", "--once", more=legacy))

    assert node.connect() == FIRST
    assert "KUBE-SVC-" in succeed(node.container.exec("iptables-legacy-save", "--table=nat"))
    node.has(SECOND)
    changed = kproxy(image, node, "--proxy-mode=iptables", "--once", more=legacy)
    assert changed.returncode == 0
    assert "python-iptables" not in changed.stderr  # it would say that it cannot be used
    assert node.connect() == SECOND


def test_the_running_proxy_follows_and_ends_at_once(image: str, node: NodeContainer, start: Start) -> None:
    flags = ["--manifests=/node/objects.json", "--hostname-override=node-1", *LEAVE_SYSCTLS]
    proxy = start(in_the_network_of(node), flags)
    eventually(lambda: node.connect() == FIRST, "the first pod is reached")

    node.has(SECOND)

    eventually(lambda: node.connect() == SECOND, "the second pod is reached")
    health = proxy.exec(
        "python3", "-c", "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:10256/healthz').status)"
    )
    assert succeed(health).strip() == "200"
    assert proxy.stop() == 128 + 15
    assert node.connect() == SECOND


def test_with_the_service_account_of_a_pod(
    image: str, node: NodeContainer, start: Start, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    account = tmp_path_factory.mktemp("account")
    (account / "ca.crt").write_bytes((certificate / "tls.crt").read_bytes())
    (account / "token").write_text("a-token")
    (account / "namespace").write_text("kube-system")
    pod = [
        f"--volume={account}:/var/run/secrets/kubernetes.io/serviceaccount:ro",
        *("--env=KUBERNETES_SERVICE_HOST=127.0.0.1", f"--env=KUBERNETES_SERVICE_PORT={API_PORT}"),
    ]

    start([*in_the_network_of(node), *pod], ["--hostname-override=node-1", *LEAVE_SYSCTLS])

    eventually(lambda: node.connect() == FIRST, "the pod that the API server names is reached")


def test_with_a_kubeconfig_that_has_its_certificate_within(image: str, node: NodeContainer, certificate: Path) -> None:
    """The kubernetes package puts such a certificate into a temporary file."""
    authority = b64encode((certificate / "tls.crt").read_bytes()).decode()
    cluster = {"server": f"https://127.0.0.1:{API_PORT}", "certificate-authority-data": authority}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "a-token"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (node.directory / "kubeconfig").write_text(json.dumps(kubeconfig))
    flags = ("--kubeconfig=/node/kubeconfig", "--hostname-override=node-1")

    succeed(docker("run", "--rm", *in_the_network_of(node), "--tmpfs=/tmp", image, *flags, "--once"))

    assert node.connect() == FIRST
