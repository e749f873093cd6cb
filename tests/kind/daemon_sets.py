"""DaemonSets of the cluster lab: kproxy as its manifests deploy it, a process on every node.

kube-proxy is played by kproxy, for in iptables mode both write the same rules, or by the command of a container. What a
kubelet would mount is written to a directory, and that takes the place of the mount path in arguments and files.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.kind.resources import CONFIG_MAPS, DAEMON_SETS, PODS
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_store import ApiError, Key
from tests.lab.cluster import Cluster, Node
from tests.lab.proxy_process import ProxyProcess, kproxy_command, kproxy_environment

Object = dict[str, Any]

_SECRETS = "/var/run/secrets/kubernetes.io/serviceaccount"
_READY_URL = "http://127.0.0.1:10256/readyz"
_POLL_SECONDS = 0.2


class _Daemon:
    """The process of a DaemonSet on a node."""

    def __init__(self, node: Node, container: Object, process: ProxyProcess, mounts: dict[str, Path]) -> None:
        self.node, self.process, self._mounts = node, process, mounts
        self._probed = "readinessProbe" in container
        self.version = 0  # of the template that it was started with

    def here(self, text: str) -> str:
        """A text with the paths of this machine in it."""
        return mapped(text, self._mounts)

    @property
    def ready(self) -> bool:
        """Whether its readiness probe, if it has one, is answered well."""
        try:
            return self.process.running and (not self._probed or self.node.get(_READY_URL).status == 200)
        except OSError:
            return False


class _Program(ProxyProcess):
    """A program of this machine in the place of kproxy."""

    def __init__(self, node: Node, command: Sequence[str], log: Path) -> None:
        super().__init__(node, (), log)
        self._command = tuple(command)


class DaemonSets:
    """Runs the DaemonSets that are created, until they are deleted."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        assert isinstance(cluster.api, ApiServer)
        self._cluster, self._directory = cluster, directory
        self._store = cluster.api.store
        self._daemons: dict[str, list[_Daemon]] = {}
        self._versions: Counter[str] = Counter()  # of the templates
        self._lock = threading.RLock()
        self._rolling = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="daemonsets", daemon=True)
        self._thread.start()
        self._closing = ExitStack()

    def close(self) -> None:
        """End all processes."""
        self._closed.set()
        self._thread.join()
        self._closing.close()
        for daemons in self._daemons.values():
            for daemon in daemons:
                daemon.process.stop()

    def created(self, written: Object) -> None:
        """Run it on every node."""
        name, namespace = written["metadata"]["name"], written["metadata"]["namespace"]
        template = written["spec"]["template"]
        with self._lock:
            self._versions[name] = 0
            self._daemons[name] = self._started(Key(namespace, name), template, self._cluster.nodes)
            self._show(Key(namespace, name))

    def restarted(self, key: Key, written: Object) -> None:
        """Replace its processes one after the other, by what it says now."""
        with self._lock:
            self._versions[key.name] += 1
            version = self._versions[key.name]
            self._show(key)
        arguments = (key, written["spec"]["template"], version)
        thread = threading.Thread(target=self._roll, args=arguments, daemon=True)
        thread.start()
        self._closing.callback(thread.join)

    def deleted(self, key: Key) -> None:
        """End its processes."""
        with self._lock:
            for daemon in self._daemons.pop(key.name, ()):
                daemon.process.stop()
                self._store.delete(PODS, Key(key.namespace, f"{key.name}-{daemon.node.name}"))
            self._store.delete(DAEMON_SETS, key)

    def processes(self, name: str) -> list[ProxyProcess]:
        """Its processes."""
        with self._lock:
            return [daemon.process for daemon in self._daemons[name]]

    def freeze(self, name: str) -> None:
        """End its processes while its pods stay: nobody follows any more."""
        with self._lock:
            for daemon in self._daemons[name]:
                daemon.process.stop()

    def run(self, pod: str, command: list[str]) -> tuple[bytes, bytes, int]:
        """A command in a pod: kproxy, or a program of the node."""
        daemon = self._of(pod)
        if command[0] == "kproxy":
            command = list(kproxy_command([daemon.here(flag) for flag in command[1:]]))
        done = daemon.node.namespace.command(*command, env=kproxy_environment(), check=False)
        return done.stdout.encode(), done.stderr.encode(), done.returncode

    def log(self, pod: str) -> str:
        """The end of a pod's log."""
        return self._of(pod).process.log_end()

    def _of(self, pod: str) -> _Daemon:
        with self._lock:
            return next(d for name, daemons in self._daemons.items() for d in daemons if pod == f"{name}-{d.node.name}")

    def _started(self, key: Key, template: Object, nodes: Sequence[Node]) -> list[_Daemon]:
        """A pod on each of some nodes, whose process has been started."""
        mounts = self._mount(key.namespace, template["spec"])
        with ThreadPoolExecutor() as pool:
            daemons = list(pool.map(lambda node: self._daemon(key.name, node, template["spec"], mounts), nodes))
        for daemon in daemons:
            metadata = {**template["metadata"], "name": f"{key.name}-{daemon.node.name}", "namespace": key.namespace}
            spec = {**template["spec"], "nodeName": daemon.node.name}
            self._store.put(PODS, {"metadata": metadata, "spec": spec, "status": {"phase": "Running"}})
        return daemons

    def _daemon(self, name: str, node: Node, spec: Object, mounts: dict[str, Path]) -> _Daemon:
        def flags(container: Object) -> list[str]:
            return [mapped(flag.replace("$(NODE_NAME)", node.name), mounts) for flag in container["args"]]

        for container in spec.get("initContainers", ()):
            node.namespace.command(*kproxy_command(flags(container)), env=kproxy_environment())
        container = spec["containers"][0]
        log = self._directory / f"{name}-{node.name}.log"
        if "command" in container:
            process: ProxyProcess = _Program(node, container["command"], log)
        else:
            process = ProxyProcess(node, flags(container), log)
        process.start()
        return _Daemon(node, container, process, mounts)

    def _mount(self, namespace: str, spec: Object) -> dict[str, Path]:
        """Write the ConfigMaps that are mounted, and a service account. The directories by mount path."""
        names = {volume["name"]: volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}
        paths = {m["mountPath"]: names[m["name"]] for m in spec["containers"][0]["volumeMounts"] if m["name"] in names}
        mounts = {path: self._directory / f"mount-{name}" for path, name in paths.items()}
        mounts[_SECRETS] = self._directory / "mount-secrets"
        files = {_SECRETS: {"token": "lab", "ca.crt": "none"}}
        for path, name in paths.items():
            files[path] = self._store.get(CONFIG_MAPS, Key(namespace, name))["data"]
        for path, directory in mounts.items():
            directory.mkdir(exist_ok=True)
            for name, text in files[path].items():
                (directory / name).write_text(mapped(text, mounts))
        return mounts

    def _roll(self, key: Key, template: Object, version: int) -> None:
        """One node after the other, until there is a newer template."""
        with self._rolling:
            for position, node in enumerate(self._cluster.nodes):
                with self._lock:
                    if key.name not in self._daemons or self._versions[key.name] != version:
                        return
                    self._daemons[key.name][position].process.stop()
                    [daemon] = self._started(key, template, [node])
                    daemon.version = version
                    self._daemons[key.name][position] = daemon
                while daemon.process.running and not daemon.ready and not self._closed.wait(_POLL_SECONDS):
                    pass

    def _follow(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            with self._lock:
                for key in list(self._store.tables[DAEMON_SETS].objects):
                    if key.name in self._daemons:
                        self._show(key)

    def _show(self, key: Key) -> None:
        daemons = self._daemons[key.name]
        ready = sum(daemon.ready for daemon in daemons)
        counts = {"desiredNumberScheduled": len(daemons), "currentNumberScheduled": len(daemons)}
        counts |= {"updatedNumberScheduled": sum(daemon.version == self._versions[key.name] for daemon in daemons)}
        counts |= {"numberReady": ready, "numberAvailable": ready}
        try:
            self._store.patch(DAEMON_SETS, key, {"status": counts})
        except ApiError:
            pass  # deleted meanwhile


def mapped(text: str, mounts: dict[str, Path]) -> str:
    """A text with directories in the place of mount paths."""
    for path, directory in mounts.items():
        text = text.replace(path, str(directory))
    return text
