"""What `kubectl apply -k deploy/overlays/…` sends: valid, of one piece, and with no more rights than are needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from kproxy.config.validation import KUBERNETES_VERSION
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    PLACEHOLDER,
    UNPATCHED,
    Object,
    from_the_files,
    overlay,
    pod_spec,
    rendered,
    the,
)

OLDEST_KUBERNETES = "1.29"  # kube-proxy has nftables mode since then
SELECTING = {"app.kubernetes.io/name": "kproxy"}


@pytest.fixture(params=OVERLAYS)
def objects(request) -> list[Object]:
    return overlay(request.param)


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, KUBERNETES_VERSION])
def test_the_api_server_knows_every_field(objects: list[Object], version: str):
    for item in objects:
        kubernetes_validate.validate(item, version, strict=True)


def test_where_nothing_is_patched_the_files_alone_say_what_is_sent():
    def by_kind(objects: list[Object]) -> list[Object]:
        return sorted(objects, key=lambda item: item["kind"])

    assert by_kind(from_the_files(UNPATCHED)) == by_kind(rendered(f"overlays/{UNPATCHED}"))


def test_the_validation_finds_a_field_that_does_not_exist():
    daemon_set = yaml.safe_load((DEPLOY / "base/daemonset.yaml").read_text())
    daemon_set["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="readyProbe"):
        kubernetes_validate.validate(daemon_set, KUBERNETES_VERSION, strict=True)


def test_everything_is_in_kube_system_and_named_kproxy(objects: list[Object]):
    for item in objects:
        of_the_cluster = item["kind"] in ("ClusterRole", "ClusterRoleBinding")
        assert item["metadata"].get("namespace") == (None if of_the_cluster else "kube-system")
        assert item["metadata"]["name"] == "kproxy"
        assert item["metadata"]["labels"].items() >= SELECTING.items()


def test_selectors_find_the_pods(objects: list[Object]):
    daemon_set = the("DaemonSet", objects)
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]

    assert labels == {**SELECTING, "k8s-app": "kproxy"}
    assert daemon_set["spec"]["selector"]["matchLabels"] == SELECTING
    assert the("Service", objects)["spec"]["selector"] == SELECTING


def test_the_pods_use_the_account_that_the_role_is_bound_to(objects: list[Object]):
    account = the("ServiceAccount", objects)["metadata"]
    binding = the("ClusterRoleBinding", objects)

    assert pod_spec(objects)["serviceAccountName"] == account["name"]
    subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    assert binding["subjects"] == [subject]
    assert binding["roleRef"]["name"] == the("ClusterRole", objects)["metadata"]["name"]


def test_the_role_names_neither_secrets_nor_pods_nor_everything(objects: list[Object]):
    for rule in the("ClusterRole", objects)["rules"]:
        assert not {"*", "secrets", "pods", "configmaps"} & {*rule["resources"], *rule["verbs"], *rule["apiGroups"]}
        assert rule["resources"] == ["events"] or rule["verbs"] == ["list", "watch"]


def test_kproxy_runs_on_every_linux_node_whatever_its_state(objects: list[Object]):
    spec = pod_spec(objects)

    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["hostNetwork"] is True
    assert spec["dnsPolicy"] == "Default"  # of the node: cluster DNS is behind a Service


def test_the_capabilities_are_those_that_the_mode_needs():
    def added(name: str) -> list[str]:
        (container,) = pod_spec(overlay(name))["containers"]
        return container["securityContext"]["capabilities"]["add"]

    assert {name: added(name) for name in OVERLAYS} == {
        "nftables": ["NET_ADMIN"],
        "iptables": ["NET_ADMIN", "NET_RAW"],
        "ipvs": ["NET_ADMIN", "NET_RAW"],
        "replace-kube-proxy": ["NET_ADMIN", "NET_RAW"],
    }


def test_only_the_container_that_ends_is_privileged(objects: list[Object]):
    spec = pod_spec(objects)
    (settings,), (container,) = spec["initContainers"], spec["containers"]
    security = container["securityContext"]

    assert settings["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}
    assert "--init-only" in settings["args"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert "privileged" not in security
    # Another user than root would have none of the capabilities.
    assert spec["securityContext"] == {"runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}}
    assert not {"hostPID", "hostIPC", "hostUsers"} & spec.keys()


def test_every_mount_has_its_volume_and_every_volume_its_mount(objects: list[Object]):
    spec = pod_spec(objects)
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounted = [mount for one in spec["initContainers"] + spec["containers"] for mount in one["volumeMounts"]]

    assert {mount["name"] for mount in mounted} == volumes
    for mount in mounted:
        assert mount.get("readOnly") or mount["name"] in ("xtables-lock", "tmp")


def test_an_update_takes_the_old_pod_away_first_and_waits_for_the_new_one(objects: list[Object]):
    daemon_set = the("DaemonSet", objects)["spec"]

    # Two at once would fight over ports and tables.
    assert daemon_set["updateStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": "10%"}
    assert daemon_set["minReadySeconds"] > 0
    assert "readinessProbe" in daemon_set["template"]["spec"]["containers"][0]


def test_the_kustomization_that_the_readme_shows_sets_image_and_configuration(tmp_path: Path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    here = shown.replace("../kproxy/deploy", os.path.relpath(DEPLOY, tmp_path))
    assert here != shown
    (tmp_path / "kustomization.yaml").write_text(here)
    for name in ("config.conf", "kubeconfig.conf"):
        (tmp_path / name).write_text(f"own {name}")

    objects = rendered(tmp_path)

    spec = pod_spec(objects)
    images = {container["image"] for container in spec["initContainers"] + spec["containers"]}
    assert images == {"registry.example/net/kproxy:v0.1.0"}
    assert the("ConfigMap", objects)["metadata"]["name"] == "kproxy"
    assert the("ConfigMap", objects)["data"] == {name: f"own {name}" for name in ("config.conf", "kubeconfig.conf")}


def test_the_readme_names_what_is_there():
    text = (DEPLOY / "README.md").read_text()

    assert f'sed "s|{PLACEHOLDER}|' in text
    assert {path.name for path in (DEPLOY / "overlays").iterdir()} == set(OVERLAYS)
    for name in OVERLAYS:
        assert f"| `overlays/{name}` |" in text
    for target in re.findall(r"\]\(([^)#]+)[)#]", text):
        assert (DEPLOY / target).exists(), target


def test_prometheus_finds_the_metrics_port_with_and_without_its_operator(objects: list[Object]):
    (container,) = pod_spec(objects)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = the("Service", objects)
    monitor = the("PodMonitor", rendered("monitoring"))

    (service_port,) = service["spec"]["ports"]
    assert ports[service_port["targetPort"]] == service_port["port"] == 10249
    assert service["metadata"]["annotations"]["prometheus.io/port"] == "10249"
    assert service["spec"]["clusterIP"] == "None"
    # The schema of this kind is not Kubernetes' own; this is what it requires.
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["namespace"] == "kube-system"
    assert monitor["spec"]["selector"]["matchLabels"] == SELECTING
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in ports


def test_no_overlay_needs_the_prometheus_operator(objects: list[Object]):
    assert "PodMonitor" not in {item["kind"] for item in objects}
