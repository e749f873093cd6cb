"""The configuration in deploy/ is one that kproxy takes without a word, with one thing left to fill in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kproxy.cli.invocation import Action, Invocation, parse
from kproxy.config.v1alpha1 import ProxyMode
from tests.deploy.manifests import DEPLOY, OVERLAYS, OWN_CONFIGURATION, PLACEHOLDER, Object, overlay, pod_spec, the

KUBE_PROXYS_CONFIGURATION = Path(__file__).parents[1] / "config/kubeadm.conf"


def invocation(container: Object, configuration: str, folder: Path) -> Invocation:
    """A container's command line as kproxy reads it, with the configuration file in a folder."""
    (folder / "config.conf").write_text(configuration)
    config_volume = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    arguments = [argument.replace("$(NODE_NAME)", "node-1") for argument in container["args"]]
    return parse([argument.replace(config_volume, str(folder)) for argument in arguments])


@pytest.mark.parametrize("mode", OWN_CONFIGURATION)
def test_the_file_of_each_overlay_is_accepted_without_warnings(mode: str):
    asked = parse([f"--config={DEPLOY}/overlays/{mode}/config.conf"])

    assert asked.configuration.mode is ProxyMode(mode)
    assert asked.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert asked.warnings == ()


@pytest.mark.parametrize("mode", OWN_CONFIGURATION)
def test_the_oom_score_is_what_the_kubelet_gives_to_node_critical_pods(mode: str):
    # Anything lower would need CAP_SYS_RESOURCE.
    assert parse([f"--config={DEPLOY}/overlays/{mode}/config.conf"]).configuration.oom_score_adj == -997
    assert pod_spec(overlay(mode))["priorityClassName"] == "system-node-critical"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_containers_command_lines_mean_to_set_up_and_to_run(name: str, tmp_path: Path):
    objects = overlay(name)
    replacing = name == "replace-kube-proxy"
    text = KUBE_PROXYS_CONFIGURATION.read_text() if replacing else the("ConfigMap", objects)["data"]["config.conf"]
    (settings,), (container,) = pod_spec(objects)["initContainers"], pod_spec(objects)["containers"]

    first, then = invocation(settings, text, tmp_path), invocation(container, text, tmp_path)

    assert (first.action, then.action) == (Action.INIT_ONLY, Action.RUN)
    assert then.configuration.hostname_override == "node-1"
    assert first.warnings == then.warnings == ()


@pytest.mark.parametrize("name", OWN_CONFIGURATION)
def test_the_files_that_the_configuration_names_are_in_the_config_map(name: str):
    objects = overlay(name)
    (volume,) = (volume for volume in pod_spec(objects)["volumes"] if volume["name"] == "config")
    config_map = the("ConfigMap", objects)

    assert volume["configMap"] == {"name": config_map["metadata"]["name"]}
    assert config_map["data"].keys() == {"config.conf", "kubeconfig.conf"}
    assert "/var/lib/kube-proxy/kubeconfig.conf" in config_map["data"]["config.conf"]


@pytest.mark.parametrize("name", OWN_CONFIGURATION)
def test_the_api_server_is_the_one_thing_to_fill_in(name: str):
    everything = yaml.safe_dump_all(overlay(name), width=1000)
    kubeconfig = yaml.safe_load(the("ConfigMap", overlay(name))["data"]["kubeconfig.conf"])

    assert everything.count(PLACEHOLDER) == everything.count(".invalid") == 1
    assert kubeconfig["clusters"][0]["cluster"]["server"] == PLACEHOLDER


def test_in_the_place_of_kube_proxy_its_own_config_map_is_used_and_nothing_is_left_to_fill_in():
    objects = overlay("replace-kube-proxy")
    (volume,) = (volume for volume in pod_spec(objects)["volumes"] if volume["name"] == "config")

    assert volume["configMap"] == {"name": "kube-proxy"}
    assert "ConfigMap" not in {item["kind"] for item in objects}
    # kube-proxy's file names its kubeconfig by the path at which kube-proxy has it mounted.
    named = yaml.safe_load(KUBE_PROXYS_CONFIGURATION.read_text())["clientConnection"]["kubeconfig"]
    (container,) = pod_spec(objects)["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "config")
    assert named == f"{mount['mountPath']}/kubeconfig.conf"


@pytest.mark.parametrize("name", OWN_CONFIGURATION)
def test_probes_and_metrics_ports_are_where_the_configuration_serves_them(name: str, tmp_path: Path):
    objects = overlay(name)
    (container,) = pod_spec(objects)["containers"]
    asked = invocation(container, the("ConfigMap", objects)["data"]["config.conf"], tmp_path)

    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    # Every address of the node, for Prometheus and load balancers come from elsewhere.
    assert asked.configuration.healthz_bind_address == f"0.0.0.0:{ports['healthz']}"
    assert asked.configuration.metrics_bind_address == f"0.0.0.0:{ports['metrics']}"
    probes = [container[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")]
    assert {(probe["host"], probe["port"]) for probe in probes} == {("127.0.0.1", "healthz")}
