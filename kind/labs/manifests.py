"""The objects that the labs create."""

from __future__ import annotations

import os
from typing import Any

Object = dict[str, Any]

NGINX = os.environ.get("E2E_NGINX_IMAGE") or "nginx"
HTTPD = os.environ.get("E2E_HTTPD_IMAGE") or "httpd"
CLIENT = os.environ.get("E2E_CLIENT_IMAGE") or "busybox"
LABEL = {"kproxy.dev/e2e": "true"}

UNREADY = "/tmp/unready"  # noqa: S108 - in a pod of ours
DRAIN_SECONDS = 5


def namespace(name: str) -> Object:
    """A lab's namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": LABEL}}


def server(name: str, image: str, app: str) -> Object:
    """A web server on port 80, with a readiness probe that fails while it has the file UNREADY."""
    spec = _spec(_server(image), seconds_to_end=1)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": app}}, "spec": spec}


def deployment(name: str, image: str, replicas: int) -> Object:
    """The same server several times. Each serves for a while after it is told to end, until all nodes know."""
    labels = {"app": name}
    drain = {"preStop": {"exec": {"command": ["sleep", str(DRAIN_SECONDS)]}}}
    pod = _spec(_server(image) | {"lifecycle": drain}, seconds_to_end=DRAIN_SECONDS + 5)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def client() -> Object:
    """A pod to look from."""
    container = _container("client", CLIENT) | {"command": ["sleep", "86400"]}
    spec = _spec(container, seconds_to_end=0)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client"}, "spec": spec}


def service(name: str, app: str = "", ports: list[Object] | None = None, **spec: Any) -> Object:
    """A Service of port 80; without `app` it selects nothing."""
    if app:
        spec["selector"] = {"app": app}
    if spec.get("type") != "ExternalName":
        spec["ports"] = ports or [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _spec(container: Object, *, seconds_to_end: int) -> Object:
    return {
        "containers": [container],
        "terminationGracePeriodSeconds": seconds_to_end,
        "enableServiceLinks": False,
    }


def _server(image: str) -> Object:
    probe = {"exec": {"command": ["test", "!", "-e", UNREADY]}, "periodSeconds": 1, "failureThreshold": 1}
    ports = [{"containerPort": 80, "protocol": "TCP"}]
    return _container("server", image) | {"ports": ports, "readinessProbe": probe}


def _container(name: str, image: str) -> Object:
    return {"name": name, "image": image, "imagePullPolicy": "IfNotPresent"}
