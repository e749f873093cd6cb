"""The connection to an API server: where it is, who we are, and requests.

Configuration and authentication are the `kubernetes` package's (kubeconfig, service account, exec plugins, token
rotation), and so is the urllib3 pool that it builds. Bodies stay bytes. Importing this module costs about 30 MB, so
import it only where a live API server is used.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlencode, urlsplit

import msgspec
import structlog
import urllib3
import yaml
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader
from kubernetes.config.kube_config import load_kube_config
from urllib3.util.ssl_ import create_urllib3_context

from kproxy import __version__
from kproxy.api.decode import STATUS
from kproxy.api.errors import ApiConfigError, ApiError, CredentialsError, SilentError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_SECONDS = 10.0
LONGEST_LINE = 64 << 20  # bytes; etcd holds objects of 1.5 MB, so a longer event is not one
_log = structlog.get_logger(__name__)
# What the kubernetes package lets through when a configuration file is not what it expects.
_CONFIGURATION_ERRORS = (ConfigException, yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError)


class RateLimit:
    """A token bucket: `burst` requests at once, `qps` a second on average. A negative `qps` means no limit."""

    def __init__(self, qps: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._qps = qps
        self._burst = max(burst, 1)
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(self._burst)
        self._at = clock()

    def reserve(self) -> float:
        """Take a place. Returns the seconds to wait for it."""
        if self._qps < 0:
            return 0.0
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._qps) - 1
            self._at = now
            return max(0.0, -self._tokens / self._qps)


class Response:
    """An answer whose body has not been read. Every method raises ApiError where the connection fails."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, request: str) -> None:
        self._raw = raw
        self._request = request
        self.status = raw.status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def read(self) -> bytes:
        """The whole body."""
        with _errors_of(self._request):
            return self._raw.read()

    def lines(self) -> Iterator[bytes]:
        """Lines of the body as they arrive, without those that are empty."""
        rest = bytearray()
        while piece := self._piece():
            searched = len(rest)
            rest += piece
            start = 0
            while (end := rest.find(b"\n", max(start, searched))) >= 0:
                if end > start:
                    yield bytes(memoryview(rest)[start:end])
                start = end + 1
            del rest[:start]
            if len(rest) > LONGEST_LINE:
                raise ApiError(f"{self._request}: a line is longer than {LONGEST_LINE >> 20} MB")
        if rest:
            yield bytes(rest)

    def _piece(self) -> bytes:
        with _errors_of(self._request):
            return self._raw.read1(1 << 16)

    def allow_silence(self, seconds: float) -> None:
        """Change how long the server may be silent from now on."""
        connection = self._raw.connection
        sock = getattr(connection, "sock", None)  # None where the server closes after this answer
        if sock is not None:
            sock.settimeout(seconds)

    def shutdown(self) -> None:
        """End the reading, from any thread: whoever reads sees the end of the body or an ApiError."""
        try:
            self._raw.shutdown()
        except (OSError, RuntimeError, ValueError):
            pass  # it has just ended by itself


class _Session(NamedTuple):
    server: str
    configuration: Configuration
    pool: urllib3.PoolManager


Answered = Callable[[str, str, str, float], None]  # method, host, status ("<error>": none came), seconds until it began


class Connection:
    """Requests to one API server, from any thread. Redirects are refused; credentials are renewed when they expire.

    `answered` is told of every answer, in the thread that asked.
    """

    def __init__(
        self,
        load: Callable[[], tuple[str, Configuration]],
        *,
        qps: float = 5.0,
        burst: int = 10,
        answered: Answered | None = None,
    ) -> None:
        self._load = load
        self._answered = answered
        self._reads = RateLimit(qps, burst)
        self._writes = RateLimit(qps, burst)  # of its own: no Event holds up a watch
        self._lock = threading.Lock()
        self._session = self._open_session()

    @property
    def server(self) -> str:
        """URL of the server."""
        return self._session.server

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        read_seconds: float = 60.0,
        limited: bool = True,
    ) -> Response:
        """Send a request; use the answer in a `with` statement. Raises ApiError for anything but a 2xx.

        `read_seconds` is the longest silence. Only `limited` requests count for the rate limit.
        """
        if limited and (delay := (self._reads if method == "GET" else self._writes).reserve()):
            time.sleep(delay)
        session = self._session
        try:
            return self._send(session, method, path, query or {}, body, read_seconds)
        except CredentialsError:
            session = self._renewed(session)
        return self._send(session, method, path, query or {}, body, read_seconds)

    def post(self, path: str, body: bytes) -> int:
        """Create an object. Returns the HTTP status, 0 where no answer came."""
        try:
            with self.request("POST", path, body=body, read_seconds=10.0) as response:
                response.read()
                return response.status
        except ApiError as error:
            return error.status

    def _send(
        self,
        session: _Session,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None,
        read_seconds: float,
    ) -> Response:
        request = f"{'WATCH' if 'watch' in query else method} {session.server}{path}"  # for messages
        headers = {"Accept": "application/json", "User-Agent": f"kproxy/{__version__}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with self._lock:  # the hook may read a file or run a plugin: once, not once a thread
            try:
                token = session.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
            except _CONFIGURATION_ERRORS as error:
                raise CredentialsError(f"{request}: no credentials: {_reason(error)}") from error
        if token:
            headers["Authorization"] = token.strip()
        began, status = time.monotonic(), "<error>"
        try:
            with _errors_of(request):
                raw = session.pool.urlopen(
                    method,
                    f"{session.server}{path}?{urlencode(query)}" if query else session.server + path,
                    body=body,
                    headers=headers,
                    timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds),
                    redirect=False,
                    retries=False,
                    preload_content=False,
                )
            status = str(raw.status)
        finally:
            if self._answered:
                self._answered(method, urlsplit(session.server).netloc, status, time.monotonic() - began)
        if 200 <= raw.status < 300:
            return Response(raw, request)
        with raw, _errors_of(request):
            raise _refusal(raw, request)

    def _renewed(self, refused: _Session) -> _Session:
        """A session with credentials read anew, unless another thread has already done it."""
        with self._lock:
            if self._session is refused:
                try:
                    self._session = self._open_session()
                except ApiConfigError as error:
                    raise ApiError(f"{refused.server}: credentials cannot be renewed: {error}") from error
                _log.info("credentials of the API server read anew", server=refused.server)
            return self._session

    def _open_session(self) -> _Session:
        server, configuration = self._load()
        pool = RESTClientObject(configuration).pool_manager
        # Python 3.13 refuses authorities without certain extensions, which Go, and so every other client, takes.
        context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        pool.connection_pool_kw["ssl_context"] = context
        return _Session(server, configuration, pool)


def connect(
    kubeconfig: str = "",
    master: str = "",
    *,
    qps: float = 5.0,
    burst: int = 10,
    answered: Answered | None = None,
    service_account: Path = SERVICE_ACCOUNT,
    environ: Mapping[str, str] = os.environ,
) -> Connection:
    """A connection as kube-proxy's flags ask for it; nothing is sent yet.

    `master` overrides the kubeconfig's server and is enough alone; with neither, the pod's service account is used.
    Raises ApiConfigError.
    """

    def load() -> tuple[str, Configuration]:
        if kubeconfig:
            configuration = _from_kubeconfig(kubeconfig)
        elif master:
            configuration = Configuration()
        else:
            configuration = _from_service_account(service_account, environ)
        server = _server_url(master or configuration.host, "--master" if master else f"kubeconfig {kubeconfig}")
        configuration.host = server
        if urlsplit(server).hostname in ("localhost", "127.0.0.1", "::1"):
            configuration.proxy = None  # as Go does: proxies of the environment are never asked for loopback
        if server.startswith("https") and not configuration.verify_ssl:
            _log.warning("the kubeconfig says not to verify the API server's certificate", server=server)
        return server, configuration

    return Connection(load, qps=qps or 5.0, burst=burst or 10, answered=answered)


def _from_kubeconfig(path: str) -> Configuration:
    if not Path(path).is_file():
        raise ApiConfigError(f"kubeconfig {path}: no such file")
    configuration = Configuration()
    configuration.host = ""
    try:
        load_kube_config(config_file=path, client_configuration=configuration, persist_config=False)
    except _CONFIGURATION_ERRORS as error:
        raise ApiConfigError(f"kubeconfig {path}: {_reason(error)}") from error
    return configuration


def _from_service_account(folder: Path, environ: Mapping[str, str]) -> Configuration:
    configuration = Configuration()
    loader = InClusterConfigLoader(str(folder / "token"), str(folder / "ca.crt"), environ=environ)
    try:
        loader.load_and_set(configuration)
    except _CONFIGURATION_ERRORS as error:
        raise ApiConfigError(
            f"no API server: neither --kubeconfig nor --master is given, and this is not a pod with a service account "
            f"in {folder} ({_reason(error).rstrip('.')})"
        ) from error
    return configuration


def _server_url(text: str, origin: str) -> str:
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ApiConfigError(f"{origin}: {text!r} is not the URL of an API server")
    return url


def _refusal(raw: urllib3.BaseHTTPResponse, request: str) -> ApiError:
    what = f"{request}: {raw.status} {raw.reason or ''}".rstrip()
    if 300 <= raw.status < 400:
        return ApiError(f"{what}: redirects (to {raw.headers.get('Location')}) are not followed", status=raw.status)
    body = raw.read(1 << 16)
    try:
        message = STATUS.decode(body).message
    except msgspec.DecodeError:
        message = body[:200].decode(errors="replace").strip()
    text = f"{what}: {message}" if message else what
    # A plugin that gave no token makes us anonymous, and anonymous users are forbidden, not unauthorized.
    if raw.status == 401 or (raw.status == 403 and "system:anonymous" in message):
        return CredentialsError(text, status=raw.status)
    after = raw.headers.get("Retry-After", "")
    return ApiError(text, status=raw.status, retry_after=float(after) if after.isdecimal() else None)


@contextmanager
def _errors_of(request: str) -> Iterator[None]:
    try:
        yield
    except ApiError:
        raise
    except urllib3.exceptions.ReadTimeoutError as error:
        raise SilentError(f"{request}: no word from the server") from error
    except urllib3.exceptions.SSLError as error:
        raise CredentialsError(f"{request}: {_reason(error)}") from error
    # ValueError and AttributeError: the response was shut down under the reader's feet
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
        raise ApiError(f"{request}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What lies at the bottom of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, IncompleteRead):
        return "the connection was cut"
    return " ".join(str(error).split()) or type(error).__name__
