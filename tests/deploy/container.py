"""A container as a pod specification describes it, made of the kernel's own parts and without an image.

From the specification come the command line, the environment, the mounts, the capabilities, and that the root file
system is read-only; from the container runtime, that /proc/sys and /sys are read-only unless it is privileged. The
programs are those of this machine. What a container runtime does beyond that (seccomp, cgroups) is left out.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.manifests import Object
from tests.lab.host import Host
from tests.lab.proxy_process import REPOSITORY, kproxy_command, kproxy_environment

Content = Mapping[str, str]  # of a directory: file name → text
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

# The machine's own /run and /var/lib are hidden, so nothing of it is touched and every mount point can be made.
_NEW_ROOT = """
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
"""
_READ_ONLY_ROOT = """
awk '{print $2}' /proc/mounts | grep -vE '^/(proc|sys|dev)(/|$)' | while read -r at; do
    mount -o remount,bind,ro "$at" 2>/dev/null || :
done
if touch /tmp/written /run/written 2>/dev/null; then echo "the root file system is not read-only" >&2; exit 99; fi
"""
_UNPRIVILEGED = """
mount --bind /proc/sys /proc/sys
for at in /proc/sys /sys; do mount -o remount,bind,ro $at; done
"""


class Container:
    """A container of a pod on a node. `config` is what the pod's ConfigMap holds, `account` its service account."""

    def __init__(self, node: Host, pod: Object, container: Object, *, config: Content, account: Content, log: Path):
        self._node, self._spec, self.log = node, container, log
        self._volumes = {volume["name"]: volume for volume in pod["volumes"]}
        self._config, self._account = config, account
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it; returns at once. What it prints goes to the log."""
        script = ["set -e", _NEW_ROOT, *self._mounts()]
        security = self._spec["securityContext"]
        if security.get("readOnlyRootFilesystem"):
            script.append(_READ_ONLY_ROOT)
        script += self._empty_directories()
        limits = ["--pdeathsig=KILL"]
        if not security.get("privileged"):
            script.append(_UNPRIVILEGED)
            allowed = ",".join(["-all", *(f"+{name.lower()}" for name in security["capabilities"]["add"])])
            limits += [f"--bounding-set={allowed}", "--inh-caps=-all"]
            if security["allowPrivilegeEscalation"] is False:
                limits.append("--no-new-privs")
        script.append(f"exec setpriv {shlex.join(limits)} {shlex.join(self._command())}")
        with self.log.open("ab") as log:
            self._process = self._node.namespace.start(
                ("unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join(script)),
                env=kproxy_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Its exit status, when it has ended by itself. Raises subprocess.TimeoutExpired."""
        assert self._process, "it has not been started"
        return self._process.wait(seconds)

    def terminate(self) -> None:
        """Send SIGTERM, as the kubelet does."""
        assert self._process, "it has not been started"
        self._process.terminate()

    def kill(self) -> None:
        """End it for certain."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _command(self) -> tuple[str, ...]:
        # spec.nodeName is the only thing that the pods take from their surroundings
        values = {variable["name"]: self._node.name for variable in self._spec.get("env", ())}
        arguments = self._spec["args"]
        for name, value in values.items():
            arguments = [argument.replace(f"$({name})", value) for argument in arguments]
        return kproxy_command(arguments)

    def _mounts(self) -> list[str]:
        lines = _files(SERVICE_ACCOUNT, self._account)
        for at, volume in self._mounted():
            if "configMap" in volume:
                lines += _files(at, self._config)
            elif "hostPath" in volume:
                assert volume["hostPath"]["type"] == "FileOrCreate"
                lines.append(f": >{at}; mount --bind {at} {at}")
        return lines

    def _empty_directories(self) -> list[str]:
        """They may hide this repository or its Python, which an image would have elsewhere; these come back."""
        lines = []
        for at in (at for at, volume in self._mounted() if "emptyDir" in volume):
            hidden = [shlex.quote(path) for path in (sys.prefix, str(REPOSITORY)) if Path(path).is_relative_to(at)]
            lines += [f"exec {number}<{path}" for number, path in enumerate(hidden, 7)]
            lines.append(f"mount -t tmpfs none {at}")
            for number, path in enumerate(hidden, 7):
                lines += [
                    f"mkdir -p {path}",
                    f"mount --no-canonicalize --bind /proc/self/fd/{number} {path}",
                    f"exec {number}<&-",
                ]
        return lines

    def _mounted(self) -> list[tuple[str, Object]]:
        return [(shlex.quote(mount["mountPath"]), self._volumes[mount["name"]]) for mount in self._spec["volumeMounts"]]


def _files(at: str, content: Content) -> list[str]:
    """Shell lines that fill a directory."""
    lines = [f"mkdir -p {at}"]
    lines += [f"printf %s {shlex.quote(text)} >{shlex.quote(f'{at}/{name}')}" for name, text in content.items()]
    return lines
