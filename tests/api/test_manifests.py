"""Manifests: what is read of them, and what is refused in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import msgspec
import pytest
from structlog.typing import EventDict

from kproxy.api.errors import ManifestError
from kproxy.api.manifests import ManifestSource
from kproxy.api.objects import EndpointSlice, Node, Object, Service, ServiceCIDR
from tests.api.conftest import endpoint_slice, service

WEB = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  clusterIP: 10.96.0.10
  ports: [{port: 80}]
"""
WEB_SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.0.5]}]
ports: [{port: 8080}]
"""


def load(path: Path) -> dict[str, Object]:
    return {f"{item.metadata.namespace}/{item.metadata.name}": item for item in ManifestSource(path).load()}


def written(path: Path, text: str) -> Path:
    path.write_text(dedent(text))
    return path


def refused(path: Path) -> list[str]:
    with pytest.raises(ManifestError) as raised:
        ManifestSource(path).load()
    assert str(raised.value) == "\n".join(raised.value.errors)
    return [error.replace(f"{path}/", "").replace(f"{path.parent}/", "") for error in raised.value.errors]


def spec_refused(tmp_path: Path, spec: str) -> list[str]:
    """Errors of a Service with this spec, without file, document and object."""
    path = written(tmp_path / "a.yaml", f"apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {spec}\n")
    prefix = "a.yaml: document 1 (Service default/web): "
    errors = refused(path)
    assert all(error.startswith(prefix) for error in errors)
    return [error.removeprefix(prefix) for error in errors]


def slice_refused(tmp_path: Path, body: str) -> list[str]:
    header = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\n"
    prefix = "a.yaml: document 1 (EndpointSlice default/web-1): "
    return [error.removeprefix(prefix) for error in refused(written(tmp_path / "a.yaml", header + body))]


def test_a_file_with_several_documents(tmp_path: Path):
    found = load(written(tmp_path / "all.yaml", f"---\n{WEB}---\n---\n{WEB_SLICE}"))

    assert set(found) == {"default/web", "default/web-1"}
    assert isinstance(found["default/web"], Service)
    assert isinstance(found["default/web-1"], EndpointSlice)


def test_the_output_of_kubectl_get_with_status_and_managed_fields(tmp_path: Path):
    path = written(
        tmp_path / "kubectl.yaml",
        """\
        apiVersion: v1
        items:
        - apiVersion: v1
          kind: Service
          metadata:
            annotations:
              kubectl.kubernetes.io/last-applied-configuration: |
                {"apiVersion":"v1","kind":"Service"}
            creationTimestamp: "2026-01-02T03:04:05Z"
            labels: {app: web}
            managedFields:
            - apiVersion: v1
              fieldsType: FieldsV1
              fieldsV1: {f:spec: {f:ports: {.: {}}}}
              manager: kubectl
              operation: Update
              time: "2026-01-02T03:04:05Z"
            name: web
            namespace: shop
            resourceVersion: "1234"
            uid: 6f0c2b9e-6f8e-4b56-9d19-0c4f1d9b0001
          spec:
            allocateLoadBalancerNodePorts: true
            clusterIP: 10.96.0.10
            clusterIPs: [10.96.0.10]
            externalTrafficPolicy: Local
            healthCheckNodePort: 31000
            internalTrafficPolicy: Cluster
            ipFamilies: [IPv4]
            ipFamilyPolicy: SingleStack
            ports:
            - {name: http, nodePort: 30080, port: 80, protocol: TCP, targetPort: 8080}
            selector: {app: web}
            sessionAffinity: ClientIP
            sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
            type: LoadBalancer
          status:
            loadBalancer:
              ingress:
              - {ip: 192.0.2.1, ipMode: VIP}
        kind: List
        metadata: {resourceVersion: ""}
        """,
    )

    item = load(path)["shop/web"]
    assert isinstance(item, Service)
    assert item.metadata.creation_timestamp == "2026-01-02T03:04:05Z"
    assert item.spec.ports[0].node_port == 30080
    assert item.spec.session_affinity_config.client_ip.timeout_seconds == 600
    assert item.status.load_balancer.ingress[0].ip == "192.0.2.1"


def test_lists_of_one_kind_whose_items_do_not_repeat_it(tmp_path: Path):
    untyped = {k: v for k, v in endpoint_slice().items() if k not in ("kind", "apiVersion")}
    slices = {"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1", "items": [untyped]}
    (tmp_path / "slices.json").write_bytes(msgspec.json.encode(slices))
    empty = {"kind": "ServiceList", "apiVersion": "v1", "items": None}
    (tmp_path / "services.json").write_bytes(msgspec.json.encode(empty))

    assert set(load(tmp_path)) == {"default/web-1"}


def test_json_with_several_documents(tmp_path: Path):
    text = b"\n".join(msgspec.json.encode(service(name)) for name in ("one", "two"))
    (tmp_path / "services.json").write_bytes(text)

    assert set(load(tmp_path / "services.json")) == {"default/one", "default/two"}


def test_all_four_kinds(tmp_path: Path):
    path = written(
        tmp_path / "cluster.yml",
        f"""\
---
{WEB}---
{WEB_SLICE}---
apiVersion: v1
kind: Node
metadata: {{name: worker.example, namespace: ignored}}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {{name: kubernetes}}
spec: {{cidrs: [10.96.0.0/12]}}
""",
    )

    found = load(path)
    assert isinstance(found["/worker.example"], Node)
    assert isinstance(found["/kubernetes"], ServiceCIDR)
    assert len(found) == 4


def test_a_directory_is_read_without_its_subdirectories_hidden_and_other_files(tmp_path: Path):
    written(tmp_path / "a.yaml", WEB)
    written(tmp_path / "b.yml", WEB_SLICE)
    (tmp_path / "c.json").write_bytes(msgspec.json.encode(service("from-json")))
    for name in (".a.yaml", "a.yaml~", "README.md", "#a.yaml#"):
        written(tmp_path / name, "not: [a manifest")
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub" / "d.yaml", "not: [a manifest")
    (tmp_path / "directory.yaml").mkdir()

    assert set(load(tmp_path)) == {"default/web", "default/web-1", "default/from-json"}


def test_what_an_api_server_would_fill_in(tmp_path: Path):
    path = written(
        tmp_path / "a.yaml",
        """\
        apiVersion: v1
        kind: Service
        metadata: {name: web}
        spec: {clusterIPs: [10.96.0.10, "fd00::10"], ports: [{port: 80}]}
        ---
        apiVersion: discovery.k8s.io/v1
        kind: EndpointSlice
        metadata: {name: web-1}
        addressType: IPv4
        endpoints: null
        ports: [{port: 8080}]
        """,
    )

    found = load(path)
    web, piece = found["default/web"], found["default/web-1"]
    assert isinstance(web, Service)
    assert isinstance(piece, EndpointSlice)
    assert (web.spec.type, web.spec.cluster_ip, web.spec.ip_families) == ("ClusterIP", "10.96.0.10", ["IPv4", "IPv6"])
    assert web.spec.ports[0].protocol == "TCP"
    assert (piece.ports[0].name, piece.ports[0].protocol) == ("", "TCP")


def test_unquoted_words_numbers_and_times_are_what_kubernetes_takes_them_for(tmp_path: Path):
    path = written(
        tmp_path / "a.yaml",
        """\
        apiVersion: v1
        kind: Service
        metadata:
          name: on
          creationTimestamp: 2026-01-02T03:04:05Z
          labels: {a: on, b: yes, c: 010, d: 1_000, e: 12:30:45, f: 2026-01-02, g: 0x1F, h: off, i: n}
        spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
        """,
    )

    [item] = load(path).values()
    assert item.metadata.name == "on"
    assert item.metadata.creation_timestamp == "2026-01-02T03:04:05Z"
    assert list(item.metadata.labels.values()) == [
        "on", "yes", "010", "1_000", "12:30:45", "2026-01-02", "0x1F", "off", "n",
    ]  # fmt: skip


def test_anchors_and_merges(tmp_path: Path):
    path = written(
        tmp_path / "a.yaml",
        """\
        apiVersion: v1
        kind: Service
        metadata: {name: web}
        spec:
          clusterIP: 10.96.0.10
          ports:
          - &http {name: http, port: 80}
          - {<<: *http, name: alt, port: 8080}
        """,
    )

    [item] = load(path).values()
    assert [port.name for port in item.spec.ports] == ["http", "alt"]


def test_other_kinds_are_left_alone_and_named_once(tmp_path: Path, logs: list[EventDict]):
    other = "apiVersion: {}\nkind: {}\nmetadata: {{name: x}}\n"
    documents = [
        WEB,
        other.format("apps/v1", "Deployment"),
        other.format("apps/v1", "Deployment"),
        other.format("serving.knative.dev/v1", "Service"),
        "apiVersion: v1\nkind: PodList\nitems: []\n",
    ]

    found = load(written(tmp_path / "a.yaml", "---\n".join(documents)))

    assert set(found) == {"default/web"}
    told = {(entry["kind"], entry["count"]) for entry in logs if entry["log_level"] == "debug"}
    assert told == {("apps/v1 Deployment", 2), ("serving.knative.dev/v1 Service", 1), ("v1 PodList", 1)}


def test_services_that_another_proxy_serves_and_headless_ones_are_left_out(tmp_path: Path):
    foreign = service("foreign")
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}
    headless = service("headless", clusterIP="None", ports=[])
    (tmp_path / "a.json").write_bytes(b"".join(msgspec.json.encode(each) for each in (foreign, headless, service())))

    assert set(load(tmp_path)) == {"default/web"}


def test_what_only_an_api_server_allocates_is_noted(tmp_path: Path, logs: list[EventDict]):
    path = written(tmp_path / "a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n")
    path.write_text(path.read_text() + "spec: {type: NodePort, ports: [{port: 80}]}\n")

    load(path)

    where = f"{path}: document 1 (Service default/web): spec."
    assert [entry["note"] for entry in logs if entry["log_level"] == "warning"] == [
        f"{where}clusterIP: not given, and only an API server allocates one, so this Service is not served",
        f"{where}ports[0].nodePort: not given, and only an API server allocates one",
    ]


def test_every_error_of_every_file_is_named_with_document_object_and_field(tmp_path: Path):
    written(
        tmp_path / "services.yaml",
        f"""\
{WEB}---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop, labels: {{tier: 1}}}}
spec:
  clusterIP: 10.96.0.11
  ports: [{{port: "80"}}, {{name: x, nodePort: [1]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: far, namespace: shop}}
spec:
  clusterIP: 10.96.0.12
  ports: [{{port: 65536}}]
""",
    )
    written(tmp_path / "slices.yaml", WEB_SLICE.replace("IPv4", "IPv5"))

    assert refused(tmp_path) == [
        "services.yaml: document 2 (Service shop/web): metadata.labels[tier]: Expected str, got int",
        "services.yaml: document 2 (Service shop/web): spec.ports[0].port: Expected int, got str",
        "services.yaml: document 2 (Service shop/web): spec.ports[1].port: Required",
        "services.yaml: document 2 (Service shop/web): spec.ports[1].nodePort: Expected int, got array",
        "services.yaml: document 3 (Service shop/far): spec.ports[0].port: Expected int <= 65535",
        "slices.yaml: document 1 (EndpointSlice default/web-1): addressType: Expected IPv4, IPv6 or FQDN, got 'IPv5'",
    ]


@pytest.mark.parametrize(
    ("spec", "errors"),
    [
        ("{clusterIP: 10.96.0.10}", ["spec.ports: Required"]),
        ("{clusterIP: 10.96.0.10, ports: [{port: 0}]}", ["spec.ports[0].port: Expected int >= 1"]),
        ("{clusterIP: 10.96.0.10, ports: [{port: 080}]}", ["spec.ports[0].port: Expected int, got str"]),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80, nodePort: 70000}]}",
            ["spec.ports[0].nodePort: Expected int <= 65535"],
        ),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80, protocol: tcp}]}",
            ["spec.ports[0].protocol: Expected TCP, UDP or SCTP, got 'tcp'"],
        ),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80}, {port: 81, name: b}]}",
            ["spec.ports[0].name: Required where there is more than one port"],
        ),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80, name: a, nodePort: 30}, {port: 80, name: a, nodePort: 30}]}",
            [
                "spec.ports[1].name: the same as spec.ports[0].name",
                "spec.ports[1].port: the same as spec.ports[0].port",
                "spec.ports[1].nodePort: the same as spec.ports[0].nodePort",
            ],
        ),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80, name: HTTP}]}",
            ["spec.ports[0].name: Expected at most 63 lower case letters, digits and '-', got 'HTTP'"],
        ),
        ("{clusterIP: 10.96.0, ports: [{port: 80}]}", ["spec.clusterIP: Expected an IP address, got '10.96.0'"]),
        (
            "{clusterIP: 10.96.0.10, clusterIPs: [10.96.0.11, x], ports: [{port: 80}]}",
            [
                "spec.clusterIPs[1]: Expected an IP address, got 'x'",
                "spec.clusterIPs[0]: Expected '10.96.0.10', which is spec.clusterIP, got '10.96.0.11'",
            ],
        ),
        (
            "{clusterIP: 10.96.0.10, externalIPs: [fe80::1%eth0], ports: [{port: 80}]}",
            ["spec.externalIPs[0]: Expected an IP address, got 'fe80::1%eth0'"],
        ),
        (
            "{type: External, clusterIP: 10.96.0.10, ports: [{port: 80}]}",
            ["spec.type: Expected ClusterIP, NodePort, LoadBalancer or ExternalName, got 'External'"],
        ),
        (
            "{clusterIP: 10.96.0.10, ports: [{port: 80}], ipFamilies: [ipv4]}",
            ["spec.ipFamilies[0]: Expected IPv4 or IPv6, got 'ipv4'"],
        ),
        (
            """{clusterIP: 10.96.0.10, ports: [{port: 80}],
            sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}}""",
            ["spec.sessionAffinityConfig.clientIP.timeoutSeconds: Expected int <= 86400"],
        ),
        (
            """{clusterIP: 10.96.0.10, ports: [{port: 80}],
            sessionAffinity: Cookie, internalTrafficPolicy: local, externalTrafficPolicy: local}""",
            [
                "spec.sessionAffinity: Expected None or ClientIP, got 'Cookie'",
                "spec.externalTrafficPolicy: Expected Cluster or Local, got 'local'",
                "spec.internalTrafficPolicy: Expected Cluster or Local, got 'local'",
            ],
        ),
    ],
)
def test_services_that_an_api_server_would_refuse(tmp_path: Path, spec: str, errors: list[str]):
    assert spec_refused(tmp_path, spec) == errors


@pytest.mark.parametrize(
    "spec",
    [
        "{clusterIP: 010.096.000.010, ports: [{port: 80}]}",
        "{clusterIP: 10.96.0.10, ports: [{port: 53, name: tcp}, {port: 53, name: udp, protocol: UDP}]}",
        "{clusterIP: 10.96.0.10, ports: [{port: 80}], loadBalancerSourceRanges: [not-a-cidr]}",
        "{type: ExternalName, externalName: example.org}",
    ],
    ids=["leading zeros", "one port in two protocols", "CIDRs are left to the routing", "external name"],
)
def test_services_that_are_taken(tmp_path: Path, spec: str):
    path = written(tmp_path / "a.yaml", f"apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {spec}\n")

    assert set(load(path)) == {"default/web"}


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ("endpoints: []", ["addressType: Required"]),
        ("addressType: IPv4\nendpoints: [{}]", ["endpoints[0].addresses: Required"]),
        (
            "addressType: IPv4\nendpoints: [{addresses: [10.0.0.1]}, {addresses: ['fd00::1']}]",
            ["endpoints[1].addresses[0]: Expected an IPv4 address, got 'fd00::1'"],
        ),
        (
            "addressType: IPv6\nendpoints: [{addresses: [10.0.0.300]}]",
            ["endpoints[0].addresses[0]: Expected an IP address, got '10.0.0.300'"],
        ),
        (
            "addressType: IPv4\nports: [{port: 70000, protocol: ICMP}]",
            [
                "ports[0].port: Expected int <= 65535",
                "ports[0].protocol: Expected TCP, UDP or SCTP, got 'ICMP'",
            ],
        ),
    ],
)
def test_slices_that_an_api_server_would_refuse(tmp_path: Path, body: str, errors: list[str]):
    assert slice_refused(tmp_path, body) == errors


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("metadata: {name: web}", "document 1: kind: Required"),
        ("kind: Service", "document 1: apiVersion: Required"),
        ("- a", "document 1: Expected an object, got list"),
        ("hello", 'document 1: Expected an object, got "hello"'),
        (f"{WEB}---\nkind: [", "document 2: line 9, column 1: did not find expected node content"),
        ("kind: Service\nkind: Node", "document 1: line 2, column 1: the key 'kind' is there twice"),
        ("kind: 'Service", "document 1: line 1, column 15: found unexpected end of stream"),
        (
            "apiVersion: v1\nkind: Service\nmetadata: &m {name: *m}",
            "document 1 (Service without a name): metadata.name: Expected str, got object",
        ),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: web-1}",
            "document 1 (EndpointSlice default/web-1): apiVersion: Expected discovery.k8s.io/v1, got discovery",
        ),
        ("apiVersion: v1\nkind: Service\nspec: {}", "document 1 (Service without a name): metadata: Required"),
        ("apiVersion: v1\nkind: Node\nmetadata: {}", "document 1 (Node without a name): metadata.name: Required"),
        (
            "apiVersion: v1\nkind: Node\nmetadata: {name: A}",
            "document 1 (Node A): metadata.name: Expected at most 253 lower case letters, digits, '-' and '.', got 'A'",
        ),
        (
            "apiVersion: v1\nkind: List\nitems: [{kind: Service, apiVersion: v1, metadata: {name: a}, spec: []}]",
            "document 1, item 1 (Service default/a): spec: Expected object, got array",
        ),
        ("a: !!int foo", "document 1: a value cannot be read: invalid literal for int() with base 10: 'foo'"),
        ("a: !!bool foo", "document 1: a value cannot be read: KeyError: 'foo'"),
        ("a: !!timestamp foo", "document 1: a value cannot be read: AttributeError: "),
        ("a: !!set [b]", "document 1: a value cannot be read: TypeError: "),
        ("a: !!float " + "1:" * 400 + "1", "document 1: a value cannot be read: OverflowError: "),
        ("a: " + "9" * 5000, "document 1: a value cannot be read: Exceeds the limit (4300 digits)"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path: Path, text: str, error: str):
    assert refused(written(tmp_path / "a.yaml", text))[0].startswith(f"a.yaml: {error}")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"kind": "Service",\n "metadata" {}}', "document 1: line 2, column 13: Expecting ':' delimiter"),
        ('{"kind": "Service", "kind": "Node"}', "document 1: the key 'kind' is there twice"),
        ("[1]", "document 1: Expected an object, got list"),
        ("[" * 100_000, "document 1: nested too deeply"),
        ("[" + "9" * 5000 + "]", "document 1: a value cannot be read: Exceeds the limit (4300 digits)"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, text: str, error: str):
    assert refused(written(tmp_path / "a.json", text))[0].startswith(f"a.json: {error}")


def test_a_byte_order_mark_is_skipped(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + msgspec.json.encode(service()))

    assert set(load(tmp_path)) == {"default/web"}


def test_a_file_that_is_not_utf_8(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"kind: \xff")

    assert refused(tmp_path / "a.yaml") == ["a.yaml: byte 6: not UTF-8"]


def test_one_object_twice_in_a_file_and_in_two_files(tmp_path: Path):
    written(tmp_path / "a.yaml", f"{WEB}---\n{WEB}")
    assert refused(tmp_path) == ["a.yaml: document 2 (Service default/web): already in document 1"]

    written(tmp_path / "a.yaml", WEB)
    written(tmp_path / "b.yaml", WEB_SLICE + "---\n" + WEB.replace(", namespace: default", ""))
    with pytest.raises(ManifestError) as raised:
        ManifestSource(tmp_path).load()
    assert raised.value.errors == (
        f"{tmp_path}/b.yaml: document 2 (Service default/web): already in {tmp_path}/a.yaml",
    )


def test_a_path_that_does_not_exist(tmp_path: Path):
    assert refused(tmp_path / "nothing.yaml") == ["nothing.yaml: No such file or directory"]


def test_an_empty_directory_and_an_empty_file_have_no_objects(tmp_path: Path):
    assert ManifestSource(tmp_path).load() == []
    assert ManifestSource(written(tmp_path / "a.yaml", "# nothing yet\n")).load() == []


def test_loading_manifests_does_not_need_the_client_of_the_api_server(tmp_path: Path):
    path = written(tmp_path / "a.yaml", WEB)
    code = (
        "import sys; from kproxy.api.manifests import ManifestSource; import kproxy.api.server;"
        f"print(len(ManifestSource({str(path)!r}).load()), 'kubernetes' in sys.modules, 'urllib3' in sys.modules)"
    )

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert printed.stdout == "1 False False\n", printed.stderr
