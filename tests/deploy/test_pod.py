"""The pod as the manifests describe it, on a node with a real kernel, against an API server with TLS and tokens."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from tests.deploy.container import Container
from tests.deploy.manifests import PLACEHOLDER, overlay, pod_spec, the
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_faults import OnRequest
from tests.lab.cluster_objects import port, service
from tests.lab.host import Host
from tests.lab.proxy_process import METRICS_PORT
from tests.lab.waiting import eventually

TOKEN = "token-of-the-service-account"
NODE_IP, CLUSTER_IP = "192.0.2.11", "10.96.0.10"
KUBEADMS_CONFIGURATION = Path(__file__).parents[1] / "config/kubeadm.conf"
LEFT_ALONE = {
    "conntrack": {"maxPerCore": 0},  # the table's size is the machine's
    "oomScoreAdj": int(Path("/proc/self/oom_score_adj").read_text()),  # the kubelet's part
}
FILLED_IN = {"clusterCIDR": "10.244.0.0/16"}  # as kubeadm does
START_SECONDS = 20.0


class Pod:
    """kproxy's pod on a node, as an overlay has it, with the API server filled in, and what else is set."""

    def __init__(self, name: str, node: Host, api: ApiServer, authority: str, folder: Path, **settings: str) -> None:
        self.node = node
        objects = overlay(name)
        self.role = the("ClusterRole", objects)
        spec = pod_spec(objects)
        self.grace_seconds = spec["terminationGracePeriodSeconds"]
        (first,), (self.container,) = spec["initContainers"], spec["containers"]
        if name == "replace-kube-proxy":
            kubeconfig = the("ConfigMap", overlay("nftables"))["data"]["kubeconfig.conf"]  # kubeadm's is the same
            config = KUBEADMS_CONFIGURATION.read_text()
        else:
            kubeconfig, config = (the("ConfigMap", objects)["data"][key] for key in ("kubeconfig.conf", "config.conf"))
        files = {
            "config.conf": yaml.safe_dump(yaml.safe_load(config) | LEFT_ALONE | FILLED_IN | settings),
            "kubeconfig.conf": kubeconfig.replace(PLACEHOLDER, api.url),
        }
        account = {"ca.crt": authority, "token": TOKEN}
        make = partial(Container, node, spec, config=files, account=account)
        self.sysctls = make(first, log=folder / "sysctls.log")
        self.kproxy = make(self.container, log=folder / "kproxy.log")

    def start(self) -> None:
        """Start it as the kubelet does: the init container, when it has ended kproxy."""
        self.sysctls.start()
        assert self.sysctls.wait(START_SECONDS) == 0, self.sysctls.log.read_text()
        self.kproxy.start()

    def probe(self, name: str) -> int:
        """The HTTP status that a probe of the kubelet gets, on the node."""
        get = self.container[name]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        return self.node.get(f"http://{get.get('host', NODE_IP)}:{ports[get['port']]}{get['path']}").status

    def wait_until_ready(self) -> None:
        """Wait for the readiness probe. Raises AssertionError with the log."""

        def ready() -> bool:
            if not self.kproxy.running:
                raise AssertionError("kproxy has ended")
            return self.probe("readinessProbe") == 200

        try:
            eventually(ready, "the pod is ready", seconds=START_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.kproxy.log.read_text()}") from None

    def complaints(self) -> list[str]:
        """What both containers have warned of."""
        records = [json.loads(line) for line in self.kproxy.log.read_text().splitlines()]
        before = [line for line in self.sysctls.log.read_text().splitlines() if "[info " not in line]
        return before + [record["msg"] for record in records if record["level"] != "info"]


MakePod = Callable[..., Pod]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    made = folder / "server.crt", folder / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-out", made[0], "-keyout", made[1]], check=True, capture_output=True)
    return made


@pytest.fixture
def node() -> Iterator[Host]:
    """A node with the usual address; ClusterIPs have a route, so that it can speak to them itself."""
    host = Host("node-1")
    host.configure(f"addr add {NODE_IP}/24 dev lo", "route add 10.96.0.0/12 dev lo")
    yield host
    host.close()


@pytest.fixture
def api(node: Host, certificate: tuple[Path, Path]) -> Iterator[ApiServer]:
    """An API server that knows the service account's token, with one Service whose endpoint is on the node."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    listen = partial(node.namespace.run, socket.create_server)
    server = ApiServer(tls=context, tokens={TOKEN}, listen=lambda address, number: listen((address, number)))
    server.stream_lists = "refuse"  # so that it lists, too
    server.put_all(
        [
            {
                "kind": "Node",
                "metadata": {"name": node.name},
                "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
            },
            service("web", CLUSTER_IP, ports=[port(80)]),
            {
                "kind": "EndpointSlice",
                "metadata": {
                    "name": "web-1",
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": "web"},
                },
                "addressType": "IPv4",
                "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
                "endpoints": [{"addresses": [NODE_IP], "nodeName": node.name}],
            },
        ]
    )
    with server:
        yield server


@pytest.fixture
def endpoint(node: Host) -> Iterator[socket.socket]:
    """What listens behind the Service."""
    with node.namespace.run(socket.create_server, (NODE_IP, 8080)) as listener:
        yield listener


@pytest.fixture
def make_pod(node: Host, api: ApiServer, certificate: tuple[Path, Path], tmp_path: Path) -> Iterator[MakePod]:
    """Makes pods of an overlay, which end with the test."""
    made: list[Pod] = []

    def make(name: str, **settings: str) -> Pod:
        made.append(Pod(name, node, api, certificate[0].read_text(), tmp_path, **settings))
        return made[-1]

    yield make
    for pod in made:
        pod.sysctls.kill()
        pod.kproxy.kill()


@pytest.fixture(params=["nftables", "iptables with nft", "iptables with legacy", "replace-kube-proxy"])
def pod(request, node: Host, make_pod: MakePod) -> Pod:
    """The pod of an overlay, on a node whose kubelet uses one or the other variant of iptables where that matters."""
    name, _, variant = request.param.partition(" with ")
    if variant:
        node.exec(f"iptables-{variant}", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
    return make_pod(name)


def test_the_pod_is_ready_when_its_services_work_and_not_before(pod: Pod, api: ApiServer, endpoint: socket.socket):
    api.faults.add(OnRequest.HANG, resource="endpointslices", times=None)
    pod.start()
    eventually(lambda: pod.probe("livenessProbe") == 200, "the pod is alive", seconds=START_SECONDS)
    assert pod.probe("readinessProbe") == 503

    api.faults.clear()

    pod.wait_until_ready()
    pod.node.connect(CLUSTER_IP, 80).close()


def test_all_that_the_pod_asks_of_the_api_server_is_allowed_and_all_that_is_allowed_is_asked(pod: Pod, api: ApiServer):
    pod.start()
    pod.wait_until_ready()
    eventually(lambda: api.objects("Event"), "the pod has told that it starts")

    asked = {permission(request) for request in api.requests}

    allowed = {
        (group, resource, verb)
        for rule in pod.role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert asked == allowed


def test_the_pod_ends_in_its_grace_period_and_its_services_go_on(pod: Pod, endpoint: socket.socket):
    pod.start()
    pod.wait_until_ready()

    pod.kproxy.terminate()

    assert pod.kproxy.wait(pod.grace_seconds) == 128 + signal.SIGTERM
    pod.node.connect(CLUSTER_IP, 80).close()


def test_a_pod_with_everything_filled_in_has_nothing_to_complain_of(pod: Pod):
    pod.start()
    pod.wait_until_ready()

    assert pod.complaints() == []


@pytest.mark.parametrize(("configured", "runs"), [("", "nftables"), ("nftables", "nftables"), ("iptables", "iptables")])
def test_in_the_place_of_kube_proxy_the_mode_is_the_one_that_it_was_to_have(
    configured: str, runs: str, make_pod: MakePod, endpoint: socket.socket
):
    pod = make_pod("replace-kube-proxy", mode=configured)

    pod.start()
    pod.wait_until_ready()

    assert pod.node.get(f"http://127.0.0.1:{METRICS_PORT}/proxyMode").text == runs
    pod.node.connect(CLUSTER_IP, 80).close()


@pytest.mark.parametrize(
    "setting",
    [{"healthzBindAddress": address} for address in ("", "127.0.0.1", "127.0.0.1:10256", "0.0.0.0:10256", "[::]:10256")]
    + [{"bindAddress": "::"}],
    ids=str,
)
def test_in_the_place_of_kube_proxy_the_probes_find_the_addresses_that_its_configuration_may_have(
    setting: dict[str, str], make_pod: MakePod
):
    pod = make_pod("replace-kube-proxy", **setting)

    pod.start()
    pod.wait_until_ready()

    assert pod.probe("livenessProbe") == 200


@pytest.mark.parametrize(
    ("pod", "variant"),
    [(f"replace-kube-proxy with {variant}", variant) for variant in ("nft", "legacy")],
    indirect=["pod"],
)
def test_in_the_place_of_kube_proxy_the_pod_removes_what_that_left_and_nothing_else(pod: Pod, variant: str):
    node, nat = pod.node, (f"iptables-{variant}", "-t", "nat")
    for arguments in ("-N KUBE-SERVICES", "-A PREROUTING -j KUBE-SERVICES", "-N OTHERS", "-A PREROUTING -j OTHERS"):
        node.exec(*nat, *arguments.split())

    pod.start()
    pod.wait_until_ready()

    def rules() -> str:
        return node.exec(*nat, "-S")

    eventually(lambda: "KUBE-SERVICES" not in rules(), "kube-proxy's rules have gone")
    assert "-A PREROUTING -j OTHERS" in rules()


@contextmanager
def kube_proxy_has_its_ports(node: Host) -> Iterator[None]:
    """Something that answers at kube-proxy's ports as it does since 1.28: it is alive, and knows no /readyz."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/livez", "/healthz") else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ExitStack() as until_it_ends:
        for port_number in (10249, 10256):
            server = node.namespace.run(HTTPServer, ("0.0.0.0", port_number), Answers)
            until_it_ends.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            until_it_ends.callback(thread.join)
            until_it_ends.callback(server.shutdown)
        yield


def test_beside_kube_proxy_the_pod_does_its_work_and_is_ready_when_that_has_gone(
    make_pod: MakePod, node: Host, endpoint: socket.socket
):
    pod = make_pod("replace-kube-proxy")

    def works() -> bool:
        try:
            node.connect(CLUSTER_IP, 80).close()
        except OSError:
            return False
        return True

    with kube_proxy_has_its_ports(node):
        pod.start()
        eventually(works, "the Service works", seconds=START_SECONDS)
        assert (pod.probe("livenessProbe"), pod.probe("readinessProbe")) == (200, 404)

    pod.wait_until_ready()
    assert pod.kproxy.running
    assert node.get(f"http://127.0.0.1:{METRICS_PORT}/proxyMode").status == 200


def test_the_init_container_writes_what_kproxy_could_not(pod: Pod):
    established = "net/netfilter/nf_conntrack_tcp_timeout_established"
    pod.node.sysctls({established: 1000})

    pod.kproxy.start()
    assert pod.kproxy.wait(START_SECONDS) == 1
    assert established in pod.kproxy.log.read_text()

    pod.start()
    pod.wait_until_ready()
    assert pod.node.exec("cat", f"/proc/sys/{established}").strip() == "86400"


def permission(request) -> tuple[str, str, str]:
    """What a role must allow for a request: API group, resource and verb."""
    match request.path.strip("/").split("/"):
        case ["api", _, *rest]:
            group = ""
        case ["apis", group, _, *rest]:
            pass
        case _:
            raise AssertionError(f"not a request for objects: {request.path}")
    resource = rest[2] if rest[0] == "namespaces" else rest[0]
    if request.method == "GET":
        return group, resource, "watch" if request.query.get("watch") in ("1", "true") else "list"
    return group, resource, {"POST": "create"}[request.method]
