"""kproxy on the nodes: its pods, what the kernel of a node holds, and the port of the host that leads to a node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.request
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from labs.kubectl import LabError, Object, get, run

NAMESPACE = "kube-system"
SELECTOR = "app.kubernetes.io/name=kproxy"
_LOAD = Path(__file__).resolve().parents[1] / "load"
_IMAGE_SECONDS = 600
_COUNTERS = re.compile(r"\[\d+:\d+\]|packets \d+ bytes \d+")  # their figures could look like a port
_HEXADECIMAL = re.compile(r"(?:\b([0-9A-F]{8})|\[([0-9a-f:]{39})\]):([0-9A-F]{4})\b")


class ProxyPod(NamedTuple):
    """A kproxy pod, and the flags that it runs with."""

    name: str
    node: str
    flags: tuple[str, ...]

    def dry_run(self, *more: str) -> tuple[str, str]:
        """What `kproxy --dry-run` prints on the node, and what it logs."""
        command = ("kproxy", *self.flags, "--dry-run", *more)
        done = run("-n", NAMESPACE, "exec", self.name, "-c", "kproxy", "--", *command)
        return done.stdout, done.stderr

    def log_end(self) -> str:
        """The last lines of its log."""
        return run("-n", NAMESPACE, "logs", self.name, "-c", "kproxy", "--tail=20").stdout


def proxy_pods() -> list[ProxyPod]:
    """kproxy's pods. Raises LabError where a node has none that runs."""
    daemonset = get("-n", NAMESPACE, "daemonset", "kproxy")
    pods = get("-n", NAMESPACE, "pods", "-l", SELECTOR)["items"]
    running = [
        pod for pod in pods if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
    ]
    wanted = daemonset["status"].get("desiredNumberScheduled", 0)
    if len(running) != wanted or not wanted:
        raise LabError(f"kproxy runs on {len(running)} nodes of {wanted}")
    return [_proxy_pod(pod) for pod in running]


def _proxy_pod(pod: Object) -> ProxyPod:
    node = pod["spec"]["nodeName"]
    container = next(c for c in pod["spec"]["containers"] if c["name"] == "kproxy")
    flags = tuple(flag.replace("$(NODE_NAME)", node) for flag in container.get("args", ()))
    return ProxyPod(pod["metadata"]["name"], node, flags)


class KindCluster(NamedTuple):
    """The containers that are the nodes of a kind cluster, where they run on this machine."""

    name: str
    engine: str
    nodes: tuple[str, ...]

    def load(self, images: list[str]) -> None:
        """Bring images that this machine has to the nodes. Raises LabError."""
        done = subprocess.run(
            (str(_LOAD), self.name, *images),
            env={**os.environ, "KIND_EXPERIMENTAL_PROVIDER": self.engine},
            capture_output=True,
            text=True,
            timeout=_IMAGE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise LabError(f"the images cannot be brought to the nodes: {done.stderr.strip() or done.stdout.strip()}")

    def named(self, node: str, words: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some addresses and ports that the rules of a node name."""
        rules = _COUNTERS.sub("", self._rules(node))
        return tuple(word for word in words if re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", rules))

    def unseen(self, words: tuple[str, ...]) -> str:
        """Why the rules of a node cannot be looked at, if they name none of the words that they should; else nothing.

        Images made before April 2024 have no tool for nftables mode (kind's pull request 3563).
        """
        blind = (node for node in self.nodes if not self.named(node, words) and not self._has_nft(node))
        return next((f"{node} has no nft" for node in blind), "")

    def _has_nft(self, node: str) -> bool:
        return bool(_output(self.engine, "exec", node, "nft", "--version"))

    def _rules(self, node: str) -> str:
        """Everything that the tools of the node image show of a node's kernel."""
        commands = ("nft list ruleset", "iptables-save", "ip6tables-save", "ip address", "cat /proc/net/ip_vs")
        shown = "\n".join(_output(self.engine, "exec", node, *command.split()) for command in commands)
        return _HEXADECIMAL.sub(_readable, shown)

    def published(self, node_port: int) -> str:
        """Where this machine answers for a node port, as host:port; nothing if it does not."""
        for node in self.nodes:
            for line in _output(self.engine, "port", node, f"{node_port}/tcp").splitlines():
                return f"localhost:{line.rpartition(':')[2]}"
        return ""


def kind_cluster() -> KindCluster | None:
    """The kind cluster that kubectl reaches, if it is one and its containers are here."""
    nodes = get("nodes")["items"]
    if not nodes:
        raise LabError("this cluster has no nodes")
    kind, _, rest = nodes[0]["spec"].get("providerID", "").partition("://")
    provider, _, names = rest.partition("/")
    if kind != "kind" or not shutil.which(provider) or not shutil.which("kind"):
        return None
    containers = tuple(node["metadata"]["name"] for node in nodes)
    if not _output(provider, "inspect", containers[0]):
        return None
    return KindCluster(names.partition("/")[0], provider, containers)


def answer_on_this_machine(address: str) -> bytes:
    """The page at http://<address>/, without any HTTP proxy. Raises LabError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{address}/", timeout=3) as answer:
            page: bytes = answer.read()
            return page
    except OSError as error:
        raise LabError(f"http://{address}/ from this machine: {error}") from error


def node_addresses(like: str) -> list[str]:
    """The InternalIP of every node in the family of an address: that of a Service, which need not have both."""
    return [
        address["address"]
        for node in get("nodes")["items"]
        for address in node["status"]["addresses"]
        if address["type"] == "InternalIP" and (":" in address["address"]) == (":" in like)
    ]


def _output(*command: str) -> str:
    """What a command prints if it succeeds: a node image may lack a tool, and a mode needs none of the others'."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode else done.stdout


def _readable(found: re.Match[str]) -> str:
    """An address and a port of /proc/net/ip_vs: the node image has none of the tools that show them otherwise."""
    address = IPv4Address(int(found[1], 16)) if found[1] else IPv6Address(found[2])
    return f"{address} port {int(found[3], 16)}"
