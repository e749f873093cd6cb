"""Where the API server is, who we are to it, and whom we trust."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.typing import EventDict

from kproxy.api.client import RateLimit, connect
from kproxy.api.errors import ApiConfigError, ApiError
from kproxy.api.server import ApiServerSource
from tests.api.conftest import Follow, service
from tests.api.recorder import Recorder
from tests.lab.apiserver import ApiServer
from tests.lab.apiserver_faults import Answer


def kubeconfig(path: Path, cluster: dict[str, Any], user: dict[str, Any] | None = None) -> str:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "it", "user": "me"}}],
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "me", "user": user or {}}],
    }
    path.write_bytes(msgspec.json.encode(content))
    return str(path)


def authority(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate authority: its certificate and key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    openssl("req", "-x509", *EC_KEY, "-keyout", key, "-out", cert, "-subj", f"/CN={name}", "-days", "2")
    return cert, key


EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt and what it has signed: server.crt for 127.0.0.1 with server.key; and another-ca.crt."""
    folder = tmp_path_factory.mktemp("certificates")
    ca, ca_key = authority(folder, "ca")
    authority(folder, "another-ca")
    names = folder / "names"
    names.write_text("subjectAltName=IP:127.0.0.1\n")
    request, key, cert = folder / "server.csr", folder / "server.key", folder / "server.crt"
    openssl("req", *EC_KEY, "-keyout", key, "-out", request, "-subj", "/CN=server")
    openssl(
        "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", cert, "-days", "2",
        "-extfile", names,
    )  # fmt: skip
    return folder


@pytest.fixture
def tls_api(certificates: Path) -> Iterator[ApiServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    with ApiServer(tls=context) as server:
        server.put(service("web"))
        yield server


def get_services(connection: Any) -> bytes:
    with connection.request("GET", "/api/v1/services") as response:
        return response.read()


def test_master_alone_is_enough_and_needs_no_scheme(api: ApiServer):
    connection = connect(master=f"{api.address}:{api.port}")

    assert b'"ServiceList"' in get_services(connection)
    assert connection.server == api.url
    [request] = api.requests
    assert request.headers["User-Agent"].startswith("kproxy/")
    assert "Authorization" not in request.headers


def test_master_overrides_the_server_of_the_kubeconfig_but_not_its_credentials(api: ApiServer, tmp_path: Path):
    path = kubeconfig(tmp_path / "config", {"server": "http://127.0.0.1:1"}, {"token": "secret"})

    get_services(connect(path, api.url))

    assert api.requests[0].headers["Authorization"] == "Bearer secret"


def test_a_server_below_a_path_is_asked_there(api: ApiServer):
    with pytest.raises(ApiError, match="404 Not Found: the server could not find the requested resource") as raised:
        get_services(connect(master=f"{api.url}/k8s/cluster-1/"))

    assert raised.value.status == 404
    assert api.requests[0].path == "/k8s/cluster-1/api/v1/services"


def test_a_kubeconfig_with_a_certificate_authority_reads_over_tls(
    tls_api: ApiServer, follow: Follow, certificates: Path, tmp_path: Path
):
    # relative, as kubeadm writes it
    cluster = {"server": tls_api.url, "certificate-authority": "ca.crt"}
    (tmp_path / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())

    seen = follow(connect(kubeconfig(tmp_path / "config", cluster)))
    tls_api.put(service("later"))

    seen.until(lambda: seen.names() == {"default/web", "default/later"})


def test_stop_is_prompt_over_tls(tls_api: ApiServer, certificates: Path, tmp_path: Path, logs: list[EventDict]):
    cluster = {"server": tls_api.url, "certificate-authority": str(certificates / "ca.crt")}
    seen = Recorder()
    source = ApiServerSource(connect(kubeconfig(tmp_path / "config", cluster)), node_name="node-1")
    source.start(seen)
    seen.until(lambda: seen.complete)

    began = time.monotonic()
    source.stop()

    assert time.monotonic() - began < 0.9
    assert logs == []


@pytest.mark.parametrize("trusted", ["another-ca.crt", ""])
def test_a_server_whose_certificate_is_not_known_is_refused(
    tls_api: ApiServer, certificates: Path, tmp_path: Path, trusted: str
):
    cluster = {"server": tls_api.url} | ({"certificate-authority": str(certificates / trusted)} if trusted else {})
    connection = connect(kubeconfig(tmp_path / "config", cluster, {"token": "secret"}))

    with pytest.raises(ApiError, match=f"GET {tls_api.url}/api/v1/services: .*certificate verify failed"):
        get_services(connection)
    assert tls_api.requests == []


def test_a_server_that_has_the_name_of_another_is_refused(tls_api: ApiServer, certificates: Path, tmp_path: Path):
    cluster = {"server": f"https://localhost:{tls_api.port}", "certificate-authority": str(certificates / "ca.crt")}

    with pytest.raises(ApiError, match="certificate verify failed: Hostname mismatch"):
        get_services(connect(kubeconfig(tmp_path / "config", cluster)))


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_kubeconfig_that_asks_not_to_verify_is_obeyed_with_a_warning(
    tls_api: ApiServer, tmp_path: Path, logs: list[EventDict]
):
    cluster = {"server": tls_api.url, "insecure-skip-tls-verify": True}

    assert b'"ServiceList"' in get_services(connect(kubeconfig(tmp_path / "config", cluster)))

    assert [entry["event"] for entry in logs] == ["the kubeconfig says not to verify the API server's certificate"]


def test_a_certificate_authority_that_changes_on_disk_is_taken_up(
    tls_api: ApiServer, certificates: Path, tmp_path: Path
):
    ca = tmp_path / "ca.crt"
    ca.write_bytes((certificates / "another-ca.crt").read_bytes())
    connection = connect(kubeconfig(tmp_path / "config", {"server": tls_api.url, "certificate-authority": str(ca)}))
    with pytest.raises(ApiError):
        get_services(connection)

    ca.write_bytes((certificates / "ca.crt").read_bytes())

    assert b'"ServiceList"' in get_services(connection)


def service_account(folder: Path, certificates: Path, token: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
    (folder / "token").write_text(token)
    return folder


def test_without_flags_the_service_account_of_the_pod_is_used(tls_api: ApiServer, certificates: Path, tmp_path: Path):
    tls_api.tokens = {"from-the-pod"}
    environ = {"KUBERNETES_SERVICE_HOST": tls_api.address, "KUBERNETES_SERVICE_PORT": str(tls_api.port)}
    folder = service_account(tmp_path / "serviceaccount", certificates, "from-the-pod\n")

    connection = connect(service_account=folder, environ=environ)

    assert b'"ServiceList"' in get_services(connection)
    (folder / "token").write_text("rotated\n")
    tls_api.tokens = {"rotated"}
    assert b'"ServiceList"' in get_services(connection)


def test_a_token_file_that_rotates_is_read_again_when_the_server_refuses_the_old_one(
    api: ApiServer, follow: Follow, tmp_path: Path
):
    token = tmp_path / "token"
    token.write_text("first\n")
    api.tokens = {"first"}
    api.put(service("web"))
    connection = connect(kubeconfig(tmp_path / "config", {"server": api.url}, {"tokenFile": str(token)}), qps=-1)
    seen = follow(connection)
    assert seen.names() == {"default/web"}

    token.write_text("second\n")
    api.tokens = {"second"}
    api.down()
    api.put(service("later"))
    api.up()

    seen.until(lambda: seen.names() == {"default/web", "default/later"})
    assert not [complaint for complaint in seen.complaints() if "401 Unauthorized" in complaint]


def test_a_token_that_stays_refused_is_reported_and_tried_again(api: ApiServer, follow: Follow, tmp_path: Path):
    api.tokens = {"good"}
    token = tmp_path / "token"
    token.write_text("bad")
    connection = connect(kubeconfig(tmp_path / "config", {"server": api.url}, {"tokenFile": str(token)}), qps=-1)

    seen = follow(connection, wait=False)
    seen.until(lambda: seen.complaints())
    assert "401 Unauthorized: Unauthorized; trying again in" in seen.complaints()[0]
    token.write_text("good")

    seen.until(lambda: seen.complete)


def exec_plugin(path: Path, output: Path) -> dict[str, Any]:
    path.write_text(f"#!/bin/sh\necho run >> {path}.runs\ncat {output}\n")
    path.chmod(0o755)
    api_version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": api_version, "command": str(path), "interactiveMode": "Never"}}


def credential(token: str) -> bytes:
    return msgspec.json.encode(
        {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token}}
    )


def test_an_exec_plugin_is_run_once_and_again_when_its_token_is_refused(api: ApiServer, tmp_path: Path):
    output, plugin = tmp_path / "credential", tmp_path / "plugin"
    output.write_bytes(credential("first"))
    api.tokens = {"first"}
    connection = connect(kubeconfig(tmp_path / "config", {"server": api.url}, exec_plugin(plugin, output)))
    get_services(connection)
    get_services(connection)

    output.write_bytes(credential("second"))
    api.tokens = {"second"}
    get_services(connection)

    assert Path(f"{plugin}.runs").read_text() == "run\nrun\n"


def test_a_plugin_that_failed_at_first_is_run_again_when_we_are_taken_for_anonymous(api: ApiServer, tmp_path: Path):
    output, plugin = tmp_path / "credential", tmp_path / "plugin"
    connection = connect(kubeconfig(tmp_path / "config", {"server": api.url}, exec_plugin(plugin, output)))
    output.write_bytes(credential("late"))
    forbidden = b'{"kind":"Status","message":"services is forbidden: User \\"system:anonymous\\" cannot list"}'
    api.faults.add(Answer(403, body=forbidden))

    get_services(connection)

    assert [request.headers.get("Authorization") for request in api.requests] == [None, "Bearer late"]


def test_redirects_are_not_followed_with_our_token(api: ApiServer, tmp_path: Path):
    with ApiServer() as elsewhere:
        api.faults.add(Answer(307, (("Location", f"{elsewhere.url}/api/v1/services"),)))
        connection = connect(kubeconfig(tmp_path / "config", {"server": api.url}, {"token": "secret"}))

        with pytest.raises(ApiError, match=r"307 Temporary Redirect: redirects .* are not followed"):
            get_services(connection)
        assert elsewhere.requests == []


def test_posting_tells_the_status(api: ApiServer):
    event = {"kind": "Event", "metadata": {"name": "started", "namespace": "default"}, "reason": "Starting"}
    connection = connect(master=api.url)
    path = "/apis/events.k8s.io/v1/namespaces/default/events"

    assert connection.post(path, msgspec.json.encode(event)) == 201
    assert connection.post(path, msgspec.json.encode(event)) == 409
    assert [written["reason"] for written in api.objects("Event")] == ["Starting"]
    api.down()
    assert connection.post(path, b"{}") == 0


def test_requests_beyond_the_burst_wait_for_their_turn():
    now = 100.0
    limit = RateLimit(5.0, 10, clock=lambda: now)

    assert [limit.reserve() for _ in range(10)] == [0.0] * 10
    assert limit.reserve() == pytest.approx(0.2)
    assert limit.reserve() == pytest.approx(0.4)
    now += 60.0
    assert [limit.reserve() for _ in range(10)] == [0.0] * 10
    assert limit.reserve() == pytest.approx(0.2)


def test_a_negative_rate_is_no_limit():
    limit = RateLimit(-1.0, 10, clock=lambda: 0.0)

    assert {limit.reserve() for _ in range(100)} == {0.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Invalid kube-config. {path} file is empty"),
        ("- a\n- b\n", ""),
        ("{", ""),
        ('{"current-context": "x", "contexts": [], "clusters": []}', "Expected object with name x in {path}/contexts"),
    ],
    ids=["empty", "a list", "not YAML", "without its context"],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "config"
    path.write_text(content)

    with pytest.raises(ApiConfigError) as raised:
        connect(str(path))

    assert str(raised.value).startswith(f"kubeconfig {path}: ")
    assert "\n" not in str(raised.value)
    assert message.format(path=path) in str(raised.value)


def test_a_kubeconfig_that_is_not_there_is_named():
    with pytest.raises(ApiConfigError, match=r"^kubeconfig /nowhere/config: no such file$"):
        connect("/nowhere/config")


def test_without_any_way_to_a_server_it_is_said_what_was_tried(tmp_path: Path):
    with pytest.raises(ApiConfigError) as raised:
        connect(service_account=tmp_path, environ={})

    assert str(raised.value) == (
        "no API server: neither --kubeconfig nor --master is given, and this is not a pod with a service account in "
        f"{tmp_path} (Service host/port is not set)"
    )


@pytest.mark.parametrize("master", ["ftp://10.0.0.1", "http://", "10.0.0.1:port", "https://[::1"])
def test_a_master_that_is_not_a_url_is_refused(master: str):
    with pytest.raises(ApiConfigError, match=r"^--master: .* is not the URL of an API server$"):
        connect(master=master)


def test_a_kubeconfig_without_a_server_is_refused(tmp_path: Path):
    path = kubeconfig(tmp_path / "config", {"insecure-skip-tls-verify": False})

    with pytest.raises(ApiConfigError, match=f"^kubeconfig {path}: '' is not the URL of an API server$"):
        connect(path)


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(api: ApiServer):
    code = (
        f"from kproxy.api.client import connect; print(connect(master={api.url!r}).request('GET', '/version').status)"
    )
    environ = {**os.environ, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}

    asked = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)

    assert asked.stdout == "200\n", asked.stderr
