"""A running proxy follows its configuration file, as an editor, a ConfigMap volume or kubeadm change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.proxy_process import METRICS_PORT, ProxyProcess
from tests.lab.waiting import eventually
from tests.reconcile.objects import CONFIGURATION, web
from tests.reconcile.one_node import OneNode

ESTABLISHED = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"


class ConfigMap:
    """A volume as kubelet makes it: the files are links to a link that is swapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0
        folder.mkdir()
        (folder / "config.conf").symlink_to("..data/config.conf")

    def say(self, text: str) -> None:
        self._version += 1
        version = self.folder / f"..{self._version}"
        version.mkdir()
        (version / "config.conf").write_text(text)
        draft = self.folder / "..data_tmp"
        draft.symlink_to(version.name)
        draft.rename(self.folder / "..data")


def config(here: OneNode, **fields: Any) -> str:
    own = {"apiVersion": "kproxy.dev/v1alpha1", "kind": "KproxyConfiguration"}
    own["manifests"] = str(here.folder / "cluster.yaml")
    return "\n---\n".join(map(json.dumps, ({**CONFIGURATION, **fields}, own)))


def in_force(here: OneNode, field: str) -> Any:
    text = here.host.get(f"http://127.0.0.1:{METRICS_PORT}/configz").text
    return json.loads(text)["kubeproxy.config.k8s.io"][field]


@pytest.fixture
def volume(tmp_path: Path) -> ConfigMap:
    return ConfigMap(tmp_path / "volume")


@pytest.fixture
def running(here: OneNode, volume: ConfigMap) -> ProxyProcess:
    here.manifests(*web())
    volume.say(config(here, clusterCIDR="10.244.0.0/16"))
    return here.started(f"--config={volume.folder / 'config.conf'}", source=())


def test_a_changed_configuration_is_taken_over_without_a_pause_in_the_rules(
    here: OneNode, volume: ConfigMap, running: ProxyProcess
) -> None:
    pid = running.pid
    assert "10.244.0.0/16" in here.ruleset
    volume.say(config(here, clusterCIDR="10.99.0.0/16"))

    eventually(lambda: in_force(here, "clusterCIDR") == "10.99.0.0/16", "the new configuration is in force")
    running.wait_until_synced()
    assert "10.99.0.0/16" in here.ruleset
    assert "10.244.0.0/16" not in here.ruleset
    assert running.pid == pid
    assert running.running
    assert "the configuration file has changed; starting again" in running.log.read_text()


def test_an_invalid_configuration_is_reported_and_the_last_good_one_stays(
    here: OneNode, volume: ConfigMap, running: ProxyProcess
) -> None:
    volume.say(config(here, clusterCIDR="10.99.0.0/33", conntrack={"maxPerCore": -1}))
    eventually(lambda: running.metric("kproxy_configuration_rejected") == 1, "the rejection is in the metrics")
    told = running.log.read_text()
    assert "clusterCIDR" in told
    assert "conntrack.maxPerCore" in told
    assert in_force(here, "clusterCIDR") == "10.244.0.0/16"

    volume.say(config(here, clusterCIDR="10.244.0.0/16"))
    eventually(lambda: "the configuration file is in order again" in running.log.read_text(), "it is said")
    assert running.metric("kproxy_configuration_rejected") == 0
    assert running.log.read_text().count('"starting"') == 1


def test_a_mode_that_this_machine_cannot_do_is_no_reason_to_end(
    here: OneNode, volume: ConfigMap, tmp_path: Path
) -> None:
    """Without the programs of iptables."""
    here.manifests(*web())
    volume.say(config(here))
    made = here.proxy(f"--config={volume.folder / 'config.conf'}", source=())
    made.start(PATH=str(tmp_path))
    made.wait_until_synced()
    volume.say(config(here, mode="iptables"))
    eventually(lambda: "install iptables" in made.log.read_text(), "what is missing is told")
    assert in_force(here, "mode") == "nftables"
    assert made.running


@pytest.mark.parametrize(
    "text", ['clusterCIDR: "\x01"', "mode: " + "[" * 3000, "x: !!bool foo"], ids=["control", "deep", "tag"]
)
def test_after_a_file_that_is_no_yaml_the_next_change_is_taken(
    here: OneNode, volume: ConfigMap, running: ProxyProcess, text: str
) -> None:
    volume.say(text)
    eventually(lambda: running.metric("kproxy_configuration_rejected") == 1, "the rejection is in the metrics")
    assert "Traceback" not in running.log.read_text()

    volume.say(config(here, clusterCIDR="10.99.0.0/16"))
    eventually(lambda: in_force(here, "clusterCIDR") == "10.99.0.0/16", "the next configuration is in force")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mode": "ipvs", "ipvs": {"scheduler": "nonsense"}}, "ipvs mode"),
        ({"conntrack": {"maxPerCore": 0, "min": 0, "udpTimeout": "2562047h"}}, "nf_conntrack_udp_timeout"),
    ],
    ids=["mode", "sysctl"],
)
def test_of_a_change_that_cannot_be_had_nothing_is_done(
    here: OneNode, volume: ConfigMap, running: ProxyProcess, fields: dict[str, Any], reason: str
) -> None:
    before = here.host.exec("cat", ESTABLISHED)
    conntrack = {"maxPerCore": 0, "tcpEstablishedTimeout": "2222s"} | fields.get("conntrack", {})
    volume.say(config(here, **fields | {"conntrack": conntrack}))

    eventually(lambda: running.metric("kproxy_configuration_rejected") == 1, "the rejection is in the metrics")
    assert reason in running.log.read_text()
    assert here.host.exec("cat", ESTABLISHED) == before
    assert in_force(here, "mode") == "nftables"


def test_a_change_to_an_api_server_that_is_not_known_is_no_reason_to_end(
    here: OneNode, volume: ConfigMap, running: ProxyProcess
) -> None:
    volume.say(json.dumps(CONFIGURATION | {"clientConnection": {"kubeconfig": "/nonexistent"}}))
    eventually(lambda: "kubeconfig /nonexistent: no such file" in running.log.read_text(), "what is missing is told")
    assert running.metric("kproxy_configuration_rejected") == 1
    assert running.running


def test_an_error_that_nobody_thought_of_does_not_end_the_following(
    here: OneNode, volume: ConfigMap, running: ProxyProcess
) -> None:
    """As that of the library that reads kubeconfigs, where a value is not what its tag says."""
    kubeconfig = here.folder / "kubeconfig"
    kubeconfig.write_text('!!int ""')
    volume.say(json.dumps(CONFIGURATION | {"clientConnection": {"kubeconfig": str(kubeconfig)}}))
    eventually(lambda: running.metric("kproxy_configuration_rejected") == 1, "the rejection is in the metrics")
    assert "IndexError" in running.log.read_text()

    volume.say(config(here, clusterCIDR="10.99.0.0/16"))
    eventually(lambda: in_force(here, "clusterCIDR") == "10.99.0.0/16", "the next configuration is in force")


def test_what_only_looks_different_changes_nothing(here: OneNode, volume: ConfigMap, running: ProxyProcess) -> None:
    volume.say("# a comment\n" + config(here, clusterCIDR="10.244.0.0/16"))
    volume.say(config(here, clusterCIDR="10.99.0.0/16"))
    eventually(lambda: in_force(here, "clusterCIDR") == "10.99.0.0/16", "the second change is in force")
    assert running.log.read_text().count("starting again") == 1
