"""The manifests of deploy/, as `kubectl apply` would send them."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OWN_CONFIGURATION = ("nftables", "iptables", "ipvs")  # named after their modes
OVERLAYS = (*OWN_CONFIGURATION, "replace-kube-proxy")
UNPATCHED = "nftables"
PLACEHOLDER = "https://control-plane.invalid:6443"


def rendered(folder: str | Path) -> list[Object]:
    """Every object of a kustomization, by its path below deploy/ or an absolute one. Skips where kubectl is absent."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, and it is what puts base and overlay together")
    return list(yaml.safe_load_all(_kustomized(DEPLOY / folder)))


@cache
def _kustomized(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return done.stdout


def overlay(name: str) -> list[Object]:
    """Every object of an overlay. Skips where that takes kubectl and it is absent."""
    if shutil.which("kubectl") is None and name == UNPATCHED:
        return from_the_files(name)
    return rendered(f"overlays/{name}")


def from_the_files(name: str) -> list[Object]:
    """The same, for an overlay that patches nothing: the files of the base, and the ConfigMap made of its files."""
    base, folder = DEPLOY / "base", DEPLOY / "overlays" / name
    kustomization = yaml.safe_load((base / "kustomization.yaml").read_text())
    objects = [item for file in kustomization["resources"] for item in yaml.safe_load_all((base / file).read_text())]
    (generator,) = kustomization["configMapGenerator"]
    files = [base / "kubeconfig.conf", folder / "config.conf"]
    metadata = {key: generator[key] for key in ("name", "namespace")} | {"labels": generator["options"]["labels"]}
    data = {file.name: file.read_text() for file in files}
    return [*objects, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}]


def the(kind: str, objects: list[Object]) -> Object:
    """The one object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def pod_spec(objects: list[Object]) -> Object:
    """The specification of the DaemonSet's pods."""
    spec: Object = the("DaemonSet", objects)["spec"]["template"]["spec"]
    return spec
