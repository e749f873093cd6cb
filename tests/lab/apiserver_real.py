"""The real API server for the cluster lab: `etcd` and `kube-apiserver` from KUBEBUILDER_ASSETS (envtest's convention).

It offers what tests use of `ApiServer`; faults and compaction on demand are the stand-in's alone.
"""

from __future__ import annotations

import http.client
import json
import secrets
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.lab.apiserver_store import BY_KIND
from tests.lab.host import Host
from tests.lab.waiting import eventually

PORT = 6443
_START_SECONDS = 60.0

Object = dict[str, Any]


class RealApiServer:
    """The two processes in a host's namespace, with everything they keep below a directory."""

    def __init__(self, assets: Path, host: Host, directory: Path, service_cidrs: tuple[str, ...]) -> None:
        self._host, self._directory = host, directory
        self._token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[str]] = []
        self.url = f"https://{host.ipv4}:{PORT}"
        key = directory / "service-accounts.key"
        tokens = directory / "tokens.csv"
        self._etcd = (
            assets / "etcd",
            f"--data-dir={directory / 'etcd'}",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
        )
        self._apiserver = (
            assets / "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={host.ipv4}",
            f"--advertise-address={host.ipv4}",
            f"--secure-port={PORT}",
            f"--cert-dir={directory}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            f"--service-cluster-ip-range={','.join(service_cidrs)}",
        )
        host.exec("openssl", "genrsa", "-out", str(key), "2048")
        tokens.write_text(f'{self._token},lab,lab,"system:masters"\n')
        self._kubeconfig = directory / "kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(directory / "apiserver.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": {"token": self._token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        }
        self._kubeconfig.write_text(json.dumps(config))

    def __enter__(self) -> Self:
        self._start(self._etcd)
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        while self._processes:
            self._end(self._processes.pop())

    def client_flags(self) -> list[str]:
        """The flags with which a proxy finds it."""
        return [f"--kubeconfig={self._kubeconfig}"]

    def up(self) -> None:
        """Start the API server, for the first time or again; what is stored has stayed."""
        self._start(self._apiserver)
        eventually(lambda: self._request("GET", "/readyz")[0] == 200, "the API server is ready", seconds=_START_SECONDS)

    def down(self) -> None:
        """End the API server; etcd goes on."""
        self._end(self._processes.pop())

    def put(self, new: Object) -> Object:
        """Create or replace an object, and its status if it has one."""
        metadata = new["metadata"]
        path = self._path(new["kind"], metadata.get("namespace", "default"))
        typed = {"apiVersion": BY_KIND[new["kind"]].group_version, **new}
        code, stored = self._request("PUT", f"{path}/{metadata['name']}", self._with_version(path, typed))
        if code == 404:
            stored = self._checked("POST", path, typed)
        if "status" in new:
            change = {"status": new["status"]}
            stored = self._checked("PATCH", f"{path}/{metadata['name']}/status", change)
        return stored

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """An object."""
        return self._checked("GET", f"{self._path(kind, namespace)}/{name}")

    def patch(self, kind: str, name: str, change: Object, namespace: str = "default") -> Object:
        """Merge a change into an object."""
        return self._checked("PATCH", f"{self._path(kind, namespace)}/{name}", change)

    def delete(self, kind: str, name: str, namespace: str = "default") -> Object:
        """Remove an object."""
        return self._checked("DELETE", f"{self._path(kind, namespace)}/{name}")

    def objects(self, kind: str) -> list[Object]:
        """All objects of a kind."""
        resource = BY_KIND[kind]
        listed: list[Object] = self._checked("GET", f"{resource.root}/{resource.plural}")["items"]
        return listed

    def _with_version(self, path: str, new: Object) -> Object:
        code, present = self._request("GET", f"{path}/{new['metadata']['name']}")
        version = {"resourceVersion": present["metadata"]["resourceVersion"]} if code == 200 else {}
        return {**new, "metadata": {**new["metadata"], **version}}

    def _path(self, kind: str, namespace: str) -> str:
        resource = BY_KIND[kind]
        return f"{resource.root}/{f'namespaces/{namespace}/' if resource.namespaced else ''}{resource.plural}"

    def _checked(self, method: str, path: str, body: Object | None = None) -> Object:
        code, answer = self._request(method, path, body)
        if code >= 400:
            raise AssertionError(f"{method} {path}: {code} {answer.get('message', answer)}")
        return answer

    def _request(self, method: str, path: str, body: Object | None = None) -> tuple[int, Object]:
        tls = ssl.create_default_context(cafile=self._directory / "apiserver.crt")
        connection = http.client.HTTPSConnection(self._host.ipv4, PORT, context=tls)
        plain = self._host.connect(self._host.ipv4, PORT, timeout=10)
        connection.sock = tls.wrap_socket(plain, server_hostname=self._host.ipv4)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else {}
        finally:
            connection.close()

    def _start(self, command: tuple[object, ...]) -> None:
        log = (self._directory / f"{Path(str(command[0])).name}.log").open("ab")
        words = ("setpriv", "--pdeathsig", "KILL", *map(str, command))
        with log:
            self._processes.append(self._host.namespace.start(words, stdout=log, stderr=log))

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
