"""kind/up and kind/takeover with the real kubectl: manifests are applied, kproxy runs as they say, packets flow."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kind.fakes import Fakes
from tests.kind.kubernetes import SYSTEM, Kubernetes
from tests.kind.resources import CONFIG_MAPS, DAEMON_SETS
from tests.lab.apiserver_store import Key
from tests.lab.cluster import API_ADDRESS, Cluster
from tests.lab.cluster_objects import service
from tests.lab.waiting import eventually

KIND = Path(__file__).resolve().parents[2] / "kind"
ADDRESS = "10.96.0.80"
CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
clusterCIDR: 10.244.0.0/16
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
conntrack:
  maxPerCore: 0
iptables:
  minSyncPeriod: 10s
"""  # kproxy plays it, and would mend every second what differs from its configuration; kube-proxy does when it syncs
KUBECONFIG = f"""\
apiVersion: v1
kind: Config
clusters:
- cluster:
    certificate-authority: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt
    server: http://{API_ADDRESS}:6443
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
users:
- name: default
  user:
    tokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token
"""

# kube-proxy in nftables mode, as far as a hand-over notices: it removes what is left of iptables mode first, and has
# rules of its own when it knows the Services.
NFTABLES = """\
for table in nat filter mangle; do iptables-nft -t $table -F; iptables-nft -t $table -X; done
sleep 1
nft -f - <<END
table ip kube-proxy {{
    chain services {{ ip daddr {address} tcp dport 80 dnat to {pod}:80; }}
    chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
    chain nat-output {{ type nat hook output priority -100; jump services; }}
}}
END
exec sleep infinity
"""

Object = dict[str, Any]

pytestmark = [
    pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on this machine"),
    pytest.mark.skipif("KUBEBUILDER_ASSETS" in os.environ, reason="a real API server alone runs no pods"),
]


@pytest.fixture
def nodes() -> int:
    """How many nodes; a test that is not about several takes one, for each has its kproxy to start."""
    return 2


one_node = pytest.mark.parametrize("nodes", [1])


@pytest.fixture
def kubernetes(tmp_path: Path, nodes: int) -> Iterator[Kubernetes]:
    """The nodes of a kind cluster named kproxy, and a Service with a pod on the first."""
    directory = tmp_path / "kubernetes"
    directory.mkdir()
    with Cluster(nodes) as cluster, Kubernetes(cluster, directory) as kubernetes:
        for node in cluster.nodes:
            cluster.api.patch("Node", node.name, {"spec": {"providerID": f"kind://docker/kproxy/{node.name}"}})
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            cluster.api.patch("Node", node.name, {"status": ready})
        config_map(kubernetes, "kube-public", "cluster-info", kubeconfig=KUBECONFIG)
        joined = "networking:\n  podSubnet: 10.244.0.0/16\n  serviceSubnet: 10.96.0.0/16\n"
        config_map(kubernetes, SYSTEM, "kubeadm-config", ClusterConfiguration=joined)
        cluster.run_pod("web-1", cluster.nodes[0], {"app": "web"})
        cluster.apply(service("web", ADDRESS))
        yield kubernetes


def config_map(kubernetes: Kubernetes, namespace: str, name: str, **data: str) -> None:
    files = {key.replace("_", "."): text for key, text in data.items()}
    kubernetes.store.put(CONFIG_MAPS, {"metadata": {"name": name, "namespace": namespace}, "data": files})


def configure_kube_proxy(kubernetes: Kubernetes, mode: str, setting: str = "") -> None:
    written = f"{CONFIG.format(mode=mode)}{setting}\n"
    config_map(kubernetes, SYSTEM, "kube-proxy", config_conf=written, kubeconfig_conf=KUBECONFIG)


def run_kube_proxy(kubernetes: Kubernetes, mode: str) -> None:
    """kube-proxy as kubeadm sets it up."""
    configure_kube_proxy(kubernetes, mode)
    labels = {"k8s-app": "kube-proxy"}
    container: Object = {
        "name": "kube-proxy",
        "image": "registry.k8s.io/kube-proxy:v1.36.0",
        "args": ["--config=/var/lib/kube-proxy/config.conf", "--hostname-override=$(NODE_NAME)"],
        "volumeMounts": [{"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"}],
    }
    if mode == "nftables":
        pod = kubernetes.cluster.pods[-1].ipv4
        container["command"] = ["sh", "-c", NFTABLES.format(address=ADDRESS, pod=pod)]
    volumes = [{"name": "kube-proxy", "configMap": {"name": "kube-proxy"}}]
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container], "volumes": volumes}}
    strategy = {"type": "RollingUpdate"}
    spec = {"selector": {"matchLabels": labels}, "template": template, "updateStrategy": strategy}
    new = {"metadata": {"name": "kube-proxy", "namespace": SYSTEM, "labels": labels}, "spec": spec}
    kubernetes.daemon_sets.created(kubernetes.store.create(DAEMON_SETS, new))
    eventually(lambda: answers(kubernetes), "the Service works with kube-proxy", seconds=30)


def answers(kubernetes: Kubernetes) -> bool:
    return all(node.get(f"http://{ADDRESS}/", timeout=1).pod == "web-1" for node in kubernetes.cluster.nodes)


def run(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KIND / script, *arguments], env=env, capture_output=True, text=True, timeout=200, check=False
    )


@contextmanager
def traffic(kubernetes: Kubernetes) -> Iterator[Counter[str]]:
    """One connection after the other to the Service from the last node, and what became of them."""
    outcomes: Counter[str] = Counter()
    over = threading.Event()
    node = kubernetes.cluster.nodes[-1]

    def ask() -> None:
        while not over.wait(0.01):
            try:
                outcomes[node.get(f"http://{ADDRESS}/", timeout=2).pod] += 1
            except OSError as error:
                outcomes[str(error)] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        thread.join()


def daemon_sets(kubernetes: Kubernetes) -> set[str]:
    return {key.name for key in kubernetes.store.tables[DAEMON_SETS].objects}


def capabilities(kubernetes: Kubernetes) -> list[str]:
    template = kubernetes.store.get(DAEMON_SETS, Key(SYSTEM, "kproxy"))["spec"]["template"]
    added: list[str] = template["spec"]["containers"][0]["securityContext"]["capabilities"]["add"]
    return added


def ruleset(kubernetes: Kubernetes) -> str:
    node = kubernetes.cluster.nodes[-1]
    return node.exec("iptables-save") + node.exec("nft", "list", "tables")


def assert_kube_proxy_is_back(kubernetes: Kubernetes) -> None:
    assert daemon_sets(kubernetes) == {"kube-proxy"}
    assert "table ip kproxy" not in ruleset(kubernetes)
    for gone in "kproxy", "kproxy-takeover":
        assert Key(SYSTEM, gone) not in kubernetes.store.tables[CONFIG_MAPS].objects


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def environment(kubernetes: Kubernetes, fakes: Fakes, **more: str) -> dict[str, str]:
    return kubernetes.environment() | fakes.environment(**more)


@one_node
def test_up_goes_from_nothing_to_a_cluster_that_works(kubernetes: Kubernetes, fakes: Fakes) -> None:
    fakes.has_images("kindest/node:v1.35.0", "kindest/node:v1.36.1")
    done = run("up", env=environment(kubernetes, fakes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert fakes.calls("make") == [f"make -C {KIND.parent} image IMAGE=kproxy:dev ENGINE=docker"]
    assert fakes.calls("kind") == [
        f"kind create cluster --name kproxy --config {KIND}/cluster.yaml --image kindest/node:v1.36.1",
        "kind load docker-image --name kproxy kproxy:dev",
    ]
    assert "nftables mode, node node-1: nothing to change" in done.stdout
    assert answers(kubernetes)


@one_node
def test_up_again_changes_the_mode_and_honours_the_variables(
    kubernetes: Kubernetes, fakes: Fakes, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n- role: control-plane\n  image: mine:1\n"
    )
    by_digest = "registry.test:5000/kproxy:1@sha256:c0ffee"
    fakes.has_images("registry.test:5000/kproxy:1", by_digest, "kindest/node:v1.36.1")
    settings = {"KPROXY_IMAGE": "registry.test:5000/kproxy:1", "KIND_CONFIG": str(config)}

    done = run("up", "--mode=iptables", env=environment(kubernetes, fakes, **settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iptables mode, node node-1: nothing to change" in done.stdout
    assert "KUBE-SERVICES" in ruleset(kubernetes)
    assert answers(kubernetes)

    settings["KPROXY_IMAGE"] = by_digest
    done = run("up", "--mode=nftables", env=environment(kubernetes, fakes, **settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cluster kproxy exists: kproxy goes there" in done.stdout
    assert "nftables mode, node node-1: nothing to change" in done.stdout
    assert "KUBE-SERVICES" not in ruleset(kubernetes)
    assert answers(kubernetes)

    assert fakes.calls("make") == []
    load = "kind load docker-image --name kproxy registry.test:5000/kproxy:1"
    create = f"kind create cluster --name kproxy --config {config}"
    by_tag = "registry.test:5000/kproxy:sha256-c0ffee"
    assert fakes.calls("kind") == [
        create,
        load,
        "kind export kubeconfig --name kproxy",
        f"kind load docker-image --name kproxy {by_tag}",
    ]
    spec = kubernetes.store.get(DAEMON_SETS, Key(SYSTEM, "kproxy"))["spec"]["template"]["spec"]
    images = {container["image"] for container in spec["containers"] + spec["initContainers"]}
    assert images == {by_tag}


@one_node
def test_up_and_the_way_back_lose_no_connection_where_the_configuration_has_kube_proxy(
    kubernetes: Kubernetes, fakes: Fakes
) -> None:
    run_kube_proxy(kubernetes, "iptables")
    fakes.has_images("kproxy:dev")
    with traffic(kubernetes) as outcomes:
        done = run("up", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "using the image kproxy:dev of this machine" in done.stdout
        assert "this cluster runs kube-proxy: taking over from it" in done.stdout
        assert "nftables mode, node node-1: nothing to change" in done.stdout
        assert daemon_sets(kubernetes) == {"kproxy"}
        assert capabilities(kubernetes) == ["NET_ADMIN", "NET_RAW"]  # it must see legacy iptables
        assert "KUBE-SERVICES" not in ruleset(kubernetes)
        before = outcomes.total()

        done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert_kube_proxy_is_back(kubernetes)
        assert "KUBE-SERVICES" in ruleset(kubernetes)
    assert set(outcomes) == {"web-1"}
    assert 20 < before < outcomes.total()


def test_takeover_and_the_way_back_lose_no_connection_in_kube_proxys_mode(kubernetes: Kubernetes, fakes: Fakes) -> None:
    run_kube_proxy(kubernetes, "iptables")
    fakes.has_images("kproxy:dev")
    with traffic(kubernetes) as outcomes:
        done = run("takeover", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "iptables mode, node node-2: nothing to change" in done.stdout
        assert "kproxy has taken over on every node" in done.stdout
        assert daemon_sets(kubernetes) == {"kproxy"}
        assert "KUBE-SERVICES" in ruleset(kubernetes)
        before = outcomes.total()

        done = run("takeover", env=environment(kubernetes, fakes))  # as if it had been interrupted
        assert done.returncode == 0, done.stdout + done.stderr
        assert "kube-proxy has gone already" in done.stdout

        done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "changes to kube-proxy's configuration" not in done.stdout
        assert_kube_proxy_is_back(kubernetes)
        assert "KUBE-SERVICES" in ruleset(kubernetes)
    assert set(outcomes) == {"web-1"}
    assert 20 < before < outcomes.total()


@one_node
def test_the_way_back_leaves_nothing_that_kube_proxy_would_tear_down(kubernetes: Kubernetes, fakes: Fakes) -> None:
    run_kube_proxy(kubernetes, "nftables")
    fakes.has_images("kproxy:dev")
    with traffic(kubernetes) as outcomes:
        done = run("takeover", "--mode", "iptables", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "KUBE-SERVICES" in ruleset(kubernetes)
        assert "table ip kube-proxy" not in ruleset(kubernetes)

        done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "kproxy's mode is iptables, kube-proxy's nftables: kproxy changes" in done.stdout
        assert "nftables mode, node node-1: " in done.stdout
        assert_kube_proxy_is_back(kubernetes)
        assert answers(kubernetes)
        assert "KUBE-SERVICES" not in ruleset(kubernetes)
        assert "table ip kube-proxy" in ruleset(kubernetes)
    assert set(outcomes) == {"web-1"}


@one_node
def test_the_way_back_from_ipvs_mode_goes_by_iptables_mode(kubernetes: Kubernetes, fakes: Fakes) -> None:
    """By what the configurations say: few kernels of test machines have IPVS."""
    run_kube_proxy(kubernetes, "iptables")
    fakes.has_images("kproxy:dev")
    assert run("takeover", "--mode", "iptables", env=environment(kubernetes, fakes)).returncode == 0
    ipvs = {"data": {"config.conf": 'mode: "ipvs" # instead of iptables\n'}}
    kubernetes.store.patch(CONFIG_MAPS, Key(SYSTEM, "kproxy"), ipvs)

    configure_kube_proxy(kubernetes, "iptables", "healthzBindAddress: 0.0.0.0:10300")
    done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
    assert done.returncode == 1
    assert "0.0.0.0:10300; the probes of kproxy's pods ask 127.0.0.1:10256. Nothing has been changed" in done.stderr
    configure_kube_proxy(kubernetes, "iptables")

    done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kproxy's mode is ipvs, kube-proxy's iptables: kproxy changes" in done.stdout
    assert "iptables mode, node node-1: nothing to change" in done.stdout
    assert_kube_proxy_is_back(kubernetes)
    assert answers(kubernetes)


@one_node
def test_takeover_refuses_settings_with_which_kproxy_would_never_be_ready(kubernetes: Kubernetes, fakes: Fakes) -> None:
    run_kube_proxy(kubernetes, "iptables")
    for setting, because in (
        (
            'healthzBindAddress: "0.0.0.0:10300" # ours',
            "0.0.0.0:10300; the probes of kproxy's pods ask 127.0.0.1:10256",
        ),
        ("healthzBindAddress: 192.0.2.1", "192.0.2.1; the probes of kproxy's pods ask 127.0.0.1:10256"),
        ("bindAddressHardFail: true", "kproxy would end while kube-proxy has the ports"),
    ):
        configure_kube_proxy(kubernetes, "iptables", setting)
        done = run("takeover", env=environment(kubernetes, fakes))
        assert done.returncode == 1
        assert because in done.stderr
        assert "Nothing has been changed" in done.stderr
        assert daemon_sets(kubernetes) == {"kube-proxy"}
        assert Key(SYSTEM, "kproxy-takeover") not in kubernetes.store.tables[CONFIG_MAPS].objects


def test_takeover_refuses_what_it_cannot_do(kubernetes: Kubernetes, fakes: Fakes) -> None:
    done = run("takeover", env=environment(kubernetes, fakes))
    assert done.returncode == 1
    assert "there is no kube-proxy to take over from" in done.stderr
    done = run("takeover", "--rollback", env=environment(kubernetes, fakes))
    assert done.returncode == 1
    assert "nothing to go back to" in done.stderr
    assert daemon_sets(kubernetes) == set()
