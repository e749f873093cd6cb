"""The cluster lab as kubectl sees it: what an API server, its controllers and the kubelets do for the labs of kind/e2e.

It serves the lab's API stand-in to kubectl on the loopback device, with more kinds of objects, with the defaults and
allocations of Services, and with pods that run: see `kubelet` and `daemon_sets`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, parse_qsl, urlsplit

from tests.kind import websocket
from tests.kind.daemon_sets import DaemonSets
from tests.kind.dns import Dns
from tests.kind.kubelet import DNS_ADDRESS, Kubelet
from tests.kind.resources import (
    DAEMON_SETS,
    DEPLOYMENTS,
    NAMESPACES,
    OURS,
    PODS,
    SERVED,
    SERVICE_ACCOUNTS,
    SERVICES,
    SLICES,
    discovery,
    openapi,
    openapi_paths,
)
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_http import Handler, Target
from tests.lab.apiserver_store import ApiError, Key, Object, Table, merge_patch
from tests.lab.cluster import Cluster
from tests.lab.cluster_objects import port, service
from tests.lab.waiting import eventually

_PATH = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<part>status|exec|log))?)?"
)
SYSTEM = "kube-system"
_NODE_PORTS = 31000


class Kubernetes:
    """Serves kubectl until it is closed; `kubeconfig` says where."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        assert isinstance(cluster.api, ApiServer), "a real API server has no pods that run"
        self.cluster = cluster
        self.api = cluster.api
        self.store = cluster.api.store
        self.kubeconfig = directory / "kubeconfig"
        self.kubelet = Kubelet(cluster, directory)
        self._directory = directory
        self._closing = ExitStack()
        self._numbers = count(10)
        self._background: list[threading.Thread] = []
        for resource in OURS:
            self.store.tables[resource] = Table()

    def __enter__(self) -> Self:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(KubectlHandler, self), bind_and_activate=True)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        self._closing.callback(thread.join)
        self._closing.callback(server.server_close)
        self._closing.callback(server.shutdown)
        self._write_kubeconfig(server.server_address[1])
        for namespace in ("default", SYSTEM, "kube-public"):
            self.create_namespace({"metadata": {"name": namespace}})
        self._run_dns()
        self.daemon_sets = DaemonSets(self.cluster, self._directory)
        self._closing.callback(self.daemon_sets.close)
        self._closing.callback(self._join)
        self._closing.callback(self.kubelet.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def environment(self) -> dict[str, str]:
        """The environment in which kubectl finds it."""
        return {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "NO_PROXY": "*",
            "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "true",  # the default since 1.31
        }

    def deploy_kproxy(self) -> None:
        """kproxy on every node, with the flags of the lab, in a DaemonSet; all have synced when this returns."""
        flags = [flag.replace(self.cluster.nodes[0].name, "$(NODE_NAME)") for flag in self._flags()]
        labels = {"app.kubernetes.io/name": "kproxy"}
        container = {"name": "kproxy", "args": flags, "volumeMounts": [], "readinessProbe": {}}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": []}}
        metadata = {"name": "kproxy", "namespace": SYSTEM}
        new = {"metadata": metadata, "spec": {"selector": {"matchLabels": labels}, "template": template}}
        self.daemon_sets.created(self.store.create(DAEMON_SETS, new))
        key = Key(SYSTEM, "kproxy")
        nodes = len(self.cluster.nodes)
        eventually(lambda: self.store.get(DAEMON_SETS, key)["status"]["numberReady"] == nodes, "kproxy is ready")

    def _flags(self) -> list[str]:
        """The lab's flags without the node's own addresses, which are not the same everywhere."""
        flags = self.cluster.proxy_flags(self.cluster.nodes[0])
        return [flag for flag in flags if not flag.startswith("--nodeport-addresses")]

    # What writes bring about

    def create_namespace(self, new: Object) -> Object:
        """A namespace has a service account from the start."""
        created = self.store.create(NAMESPACES, new)
        self.store.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": new["metadata"]["name"]}})
        return created

    def delete_namespace(self, name: str) -> None:
        """Everything in it goes; pods and slices by those who look after them."""
        for resource in SERVED:
            if resource.namespaced and resource not in (PODS, SLICES):
                for key in [key for key in self.store.tables[resource].objects if key.namespace == name]:
                    self.store.delete(resource, key)
        self.kubelet.kill(name)
        self.kubelet.services_changed()
        self.store.delete(NAMESPACES, Key("", name))

    def created(self, target: Target, written: Object) -> None:
        """Run what was created."""
        namespace = written["metadata"].get("namespace", "")
        if target.resource == PODS:
            self._in_background(self.kubelet.start, namespace, written)
        elif target.resource == DAEMON_SETS:
            self.daemon_sets.created(written)
        elif target.resource == DEPLOYMENTS:
            for _ in range(written["spec"]["replicas"]):
                self._replica(namespace, written)

    def delete_pod(self, key: Key) -> Object:
        """A pod begins to end; its Deployment makes another at once."""
        gone = self.store.patch(PODS, key, {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
        self._in_background(self.kubelet.terminate, key.namespace, key.name)
        for owner in gone["metadata"].get("ownerReferences", ()):
            self._replica(key.namespace, self.store.get(DEPLOYMENTS, Key(key.namespace, owner["name"])))
        return gone

    def _replica(self, namespace: str, deployment: Object) -> None:
        name = deployment["metadata"]["name"]
        template = deployment["spec"]["template"]
        metadata = {
            **template["metadata"],
            "name": f"{name}-{next(self._numbers)}",
            "namespace": namespace,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": name}],
        }
        pod = self.store.create(PODS, {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}})
        self._in_background(self.kubelet.start, namespace, pod)

    def completed(self, new: Object) -> Object:
        """A Service with the defaults and allocations of the API server."""
        spec = new["spec"]
        spec.setdefault("type", "ClusterIP")
        if spec["type"] == "ExternalName":
            return new
        spec.setdefault("sessionAffinity", "None")
        if spec["sessionAffinity"] == "ClientIP":
            spec.setdefault("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": 10800}})
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("ipFamilies", ["IPv4"])
        if not spec.get("clusterIP"):
            spec["clusterIP"] = f"10.96.1.{next(self._numbers)}"
        spec["clusterIPs"] = [spec["clusterIP"]]
        outside = spec["type"] in ("NodePort", "LoadBalancer")
        if outside:
            spec.setdefault("externalTrafficPolicy", "Cluster")
        for each in spec["ports"]:
            if not outside:
                each.pop("nodePort", None)
            elif not each.get("nodePort"):
                each["nodePort"] = _NODE_PORTS + next(self._numbers)
        if spec["type"] == "LoadBalancer":
            for ingress in (new.get("status") or {}).get("loadBalancer", {}).get("ingress", ()):
                ingress.setdefault("ipMode", "VIP")
        return new

    # Commands in pods

    def exec(self, namespace: str, name: str, command: list[str]) -> tuple[bytes, bytes, int]:
        """What a command in a pod prints on both streams, and its exit status."""
        if namespace == SYSTEM:
            return self.daemon_sets.run(name, command)
        ran = self.kubelet.run(namespace, name, command)
        return ran.stdout, ran.stderr, ran.returncode

    def _run_dns(self) -> None:
        pod = self.cluster.run_pod("coredns", self.cluster.nodes[0], {"k8s-app": "kube-dns"}, tcp=())
        sock = pod.socket("0.0.0.0", socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", 53))
        dns = Dns(self.api, sock, self.kubelet.ready_addresses)
        self._closing.callback(dns.close)
        spec = {"selector": {"k8s-app": "kube-dns"}}
        dns_service = service("kube-dns", DNS_ADDRESS, ports=[port(53, target=53, protocol="UDP", name="dns")], **spec)
        self.cluster.apply(dns_service)

    def _write_kubeconfig(self, port_number: int) -> None:
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": f"http://127.0.0.1:{port_number}"}}],
            "users": [{"name": "lab", "user": {}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _in_background(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._background.append(thread)
        thread.start()

    def _join(self) -> None:
        for thread in self._background:
            thread.join(30)


class KubectlHandler(Handler):
    """One connection of kubectl. The requests themselves are the stand-in's."""

    def __init__(self, kubernetes: Kubernetes, request: Any, peer: object, _: object) -> None:
        self._kubernetes = kubernetes
        super().__init__(request, peer, kubernetes.api)  # type: ignore[arg-type]

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            if url.path == "/version":
                self._send(200, {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
            elif url.path == "/openapi/v3":
                self._send(200, openapi_paths("/openapi/v3"))
            elif url.path.startswith("/openapi/v3/"):
                self._send(200, openapi(url.path.removeprefix("/openapi/v3/")))
            elif (found := discovery(url.path)) is not None:
                self._send(200, found)
            else:
                self._answer(url.path, query, body)
        except ApiError as error:
            self._send(error.code, error.status())

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> None:
        target, part = _find(path)
        verb = self._verb(target, query)
        if part == "exec":
            self._exec(target)
        elif part == "log":
            log = self._kubernetes.daemon_sets.log(target.name) if target.namespace == SYSTEM else ""
            self._send(200, log.encode())
        elif verb == "watch":
            self._watch(target, query)
        elif verb == "list":
            self._list(target, query)
        else:
            code, answer = self._write(target, verb, body)
            self._send(code, answer)
        if target.resource == SERVICES and verb in ("create", "patch", "delete"):
            self._kubernetes.kubelet.services_changed()

    def _write(self, target: Target, verb: str, body: bytes) -> tuple[int, Object]:
        kubernetes, store = self._kubernetes, self.store
        match target.resource, verb:
            case resource, "create" if resource == NAMESPACES:
                return 201, kubernetes.create_namespace(json.loads(body))
            case resource, "delete" if resource == NAMESPACES:
                store.get(NAMESPACES, target.key)
                kubernetes.delete_namespace(target.name)
                return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
            case resource, "delete" if resource == PODS:
                return 200, kubernetes.delete_pod(target.key)
            case resource, "delete" if resource == DAEMON_SETS:
                kubernetes.daemon_sets.deleted(target.key)
                return 200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
            case resource, "patch" if resource in OURS:
                patched = store.patch(resource, target.key, _without_lists(json.loads(body)))
                if resource == DAEMON_SETS:
                    kubernetes.daemon_sets.restarted(target.key, patched)
                return 200, patched
            case resource, "create" if resource == PODS:
                body = json.dumps({**json.loads(body), "status": {"phase": "Pending"}}).encode()
            case resource, "create" if resource == SERVICES:
                body = json.dumps(kubernetes.completed(json.loads(body))).encode()
            case resource, "patch" if resource == SERVICES:
                changed = kubernetes.completed(merge_patch(store.get(SERVICES, target.key), json.loads(body)))
                return 200, store.replace(SERVICES, changed)
        code, answer = self._single(target, verb, body)
        if verb == "create":
            kubernetes.created(target, answer)
        return code, answer

    def _exec(self, target: Target) -> None:
        if not websocket.accept(self):
            raise ApiError(400, "BadRequest", "the stand-in speaks WebSocket only")
        command = parse_qs(urlsplit(self.path).query)["command"]
        result = self._kubernetes.exec(target.namespace or "", target.name, command)
        websocket.send_result(self.wfile, *result)


def _without_lists(patch: Object) -> Object:
    """A merge patch for kubectl's strategic patches: those of `apply` carry the whole object, others have no lists."""
    applied = patch.get("metadata", {}).get("annotations", {}).get("kubectl.kubernetes.io/last-applied-configuration")
    if applied is None:
        return patch
    return {**json.loads(applied), "metadata": patch["metadata"]}


def _find(path: str) -> tuple[Target, str]:
    if found := _PATH.fullmatch(path):
        for resource in SERVED:
            if (resource.root, resource.plural) == (found["root"], found["plural"]):
                part = found["part"] or ""
                return Target(resource, found["namespace"], found["name"] or "", part == "status"), part
    raise ApiError(404, "NotFound", "the server could not find the requested resource")
