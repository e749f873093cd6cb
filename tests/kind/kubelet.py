"""The pods of the cluster lab as a kubelet runs them: a sandbox for commands, probes, and a slow end.

An image is a name here: "nginx…" and "httpd…" are web servers that say so, anything else serves nothing. Commands in a
pod are this machine's own, in the pod's network namespace, with a /tmp and a resolv.conf of its own.
"""

from __future__ import annotations

import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.kind.dns import DOMAIN
from tests.kind.resources import PODS
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_store import ApiError, Key
from tests.lab.cluster import Cluster, Node, Pod

Object = dict[str, Any]

DNS_ADDRESS = "10.96.0.10"
_PAGES = {"nginx": "Welcome to nginx!", "httpd": "It works!"}
_PROBE_SECONDS = 0.2
_COMMAND_SECONDS = 120
_SANDBOX = """\
mount --make-rprivate / && mount --bind "$1" /etc/resolv.conf && mount -t tmpfs tmpfs /tmp && echo ready &&
exec sleep infinity
"""


class RunningPod:
    """A pod of the lab, its object's key and its sandbox."""

    def __init__(self, lab_pod: Pod, namespace: str, spec: Object, resolv_conf: Path) -> None:
        self.lab_pod, self.namespace, self.spec = lab_pod, namespace, spec
        self.ended = threading.Event()
        command = ("setpriv", "--pdeathsig", "KILL", "unshare", "-m", "sh", "-c", _SANDBOX, "sh", str(resolv_conf))
        self._sandbox = lab_pod.namespace.start(command, stdout=subprocess.PIPE)
        assert self._sandbox.stdout is not None
        assert self._sandbox.stdout.readline() == "ready\n", "a pod's sandbox cannot be made"

    @property
    def key(self) -> Key:
        """The object's key."""
        return Key(self.namespace, self.lab_pod.name)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the pod to its end."""
        inside = ("nsenter", "-t", str(self._sandbox.pid), "-m", "-n", "--")
        return subprocess.run((*inside, *command), capture_output=True, timeout=_COMMAND_SECONDS, check=False)

    def close(self) -> None:
        """End everything in the sandbox."""
        self.ended.set()
        self._sandbox.kill()
        self._sandbox.wait()
        assert self._sandbox.stdout is not None
        self._sandbox.stdout.close()


class Kubelet:
    """Runs the pods of all nodes and keeps their status. Methods are called under no lock and take one."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        assert isinstance(cluster.api, ApiServer)
        self._cluster = cluster
        self._store = cluster.api.store
        self._directory = directory
        self._running: dict[Key, RunningPod] = {}
        self._lock = threading.RLock()
        self._started = 0
        self._threads = ExitStack()

    def close(self) -> None:
        """End every pod."""
        for pod in list(self._running.values()):
            self._end(pod)
        self._threads.close()

    def start(self, namespace: str, written: Object) -> None:
        """Run a pod that was created, and say in its status what has become of it."""
        name, spec = written["metadata"]["name"], written["spec"]
        with self._lock:
            node = self._cluster.nodes[self._started % len(self._cluster.nodes)]
            self._started += 1
            pod = self._pod(namespace, name, written, node)
        self._probe(pod)
        if "readinessProbe" in spec["containers"][0]:
            thread = threading.Thread(target=self._keep_probing, args=(pod,), name=f"probe-{name}", daemon=True)
            thread.start()
            self._threads.callback(thread.join)

    def terminate(self, namespace: str, name: str) -> None:
        """Begin the end of a pod: its endpoint is terminating, its preStop command runs, then it goes."""
        pod = self._running[Key(namespace, name)]
        with self._lock:
            self._cluster.terminate(pod.lab_pod)
        hook = pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if hook:
            pod.run(hook)
        self._end(pod)

    def kill(self, namespace: str) -> None:
        """End every pod of a namespace at once."""
        for pod in [pod for pod in self._running.values() if pod.namespace == namespace]:
            self._end(pod)

    def run(self, namespace: str, name: str, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        """Run a command in a pod."""
        return self._running[Key(namespace, name)].run(command)

    def ready_addresses(self, labels: dict[str, str]) -> list[str]:
        """The addresses of the ready pods with some labels."""
        with self._lock:
            pods = [pod for pod in self._cluster.pods if labels.items() <= pod.labels.items()]
            return [pod.ipv4 for pod in pods if pod.ready and not pod.terminating]

    def services_changed(self) -> None:
        """Bring the EndpointSlices up to date."""
        with self._lock:
            self._cluster.apply()

    def _pod(self, namespace: str, name: str, written: Object, node: Node) -> RunningPod:
        image = written["spec"]["containers"][0]["image"]
        page = next((text for kind, text in _PAGES.items() if kind in image), "")
        labels = written["metadata"].get("labels") or {}
        lab_pod = self._cluster.run_pod(name, node, labels, says=page, tcp=(80,) if page else (), ready=False)
        resolv_conf = self._directory / f"{namespace}.resolv.conf"
        search = f"{namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}"
        resolv_conf.write_text(f"search {search}\nnameserver {DNS_ADDRESS}\noptions ndots:5\n")
        pod = RunningPod(lab_pod, namespace, written["spec"], resolv_conf)
        self._running[pod.key] = pod
        return pod

    def _keep_probing(self, pod: RunningPod) -> None:
        while not pod.ended.wait(_PROBE_SECONDS):
            self._probe(pod)

    def _probe(self, pod: RunningPod) -> None:
        probe = pod.spec["containers"][0].get("readinessProbe")
        ready = probe is None or pod.run(probe["exec"]["command"]).returncode == 0
        with self._lock:
            if pod.ended.is_set():
                return
            if ready != pod.lab_pod.ready:
                self._cluster.set_ready(pod.lab_pod, ready)
            status = {
                "phase": "Running",
                "hostIP": pod.lab_pod.node.ipv4,
                "podIP": pod.lab_pod.ipv4,
                "podIPs": [{"ip": pod.lab_pod.ipv4}],
                "conditions": [{"type": "Ready", "status": str(ready)}],
            }
            try:
                change = {"spec": {"nodeName": pod.lab_pod.node.name}, "status": status}
                self._store.patch(PODS, pod.key, change)
            except ApiError:
                pass  # deleted meanwhile

    def _end(self, pod: RunningPod) -> None:
        with self._lock:
            if self._running.pop(pod.key, None) is None:
                return
            pod.close()
            self._cluster.remove_pod(pod.lab_pod)
            try:
                self._store.delete(PODS, pod.key)
            except ApiError:
                pass  # its namespace went first
