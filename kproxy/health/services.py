"""Health check node ports: load balancers learn here which nodes have endpoints of a Service (reference: 6.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus

import msgspec
import structlog

from kproxy.http import message
from kproxy.http.address import ListenAddress, Network
from kproxy.http.message import Handler, Request, Response
from kproxy.http.server import HttpServer, Listener
from kproxy.model import Family, ServiceName

log = structlog.get_logger(__name__)

ListenFailed = Callable[[ServiceName, int, OSError], None]


class _Check(msgspec.Struct):
    """A Service's open health check port."""

    port: int
    hosts: tuple[str, ...]
    listeners: list[Listener]
    local_endpoints: int = 0


class ServiceHealthChecks:
    """One HTTP endpoint for each Service of one family that has a health check node port.

    `addresses` tells the node's addresses to listen on, None for all of the family; where they have changed, the ports
    are opened anew. `proxy_healthy` is asked at each request. `listen_failed` is told of every failed attempt to open
    a port: the Service goes without until the next `sync_services`, the others are not affected.
    """

    def __init__(
        self,
        server: HttpServer,
        family: Family,
        addresses: Callable[[], Sequence[str] | None],
        *,
        proxy_healthy: Callable[[], bool],
        listen_failed: ListenFailed,
    ) -> None:
        self._server = server
        self._network: Network = "tcp4" if family is Family.IPv4 else "tcp6"
        self._all = ("0.0.0.0" if family is Family.IPv4 else "::",)
        self._addresses = addresses
        self._proxy_healthy = proxy_healthy
        self._listen_failed = listen_failed
        self._checks: dict[ServiceName, _Check] = {}

    def sync_services(self, ports: Mapping[ServiceName, int]) -> None:
        """Listen for exactly these Services, each on its port. A Service that is new starts with no endpoints."""
        chosen = self._addresses()
        hosts = self._all if chosen is None else tuple(chosen)
        for service, check in list(self._checks.items()):
            if (ports.get(service), hosts) != (check.port, check.hosts):
                del self._checks[service]
                _close(check.listeners)
                log.info("closed health check", service=str(service), port=check.port)
        for service, port in ports.items():
            if service not in self._checks:
                self._open(service, port, hosts)

    def sync_endpoints(self, counts: Mapping[ServiceName, int]) -> None:
        """Set the numbers of local ready endpoints; Services that are not named have none."""
        for service, check in self._checks.items():
            check.local_endpoints = counts.get(service, 0)

    @property
    def listening(self) -> dict[ServiceName, tuple[int, int]]:
        """Port and number of local ready endpoints of each open health check."""
        return {service: (check.port, check.local_endpoints) for service, check in self._checks.items()}

    def _open(self, service: ServiceName, port: int, hosts: tuple[str, ...]) -> None:
        check = _Check(port, hosts, [])
        handler = self._handler(service, check)
        for host in hosts:
            try:
                check.listeners.append(self._server.listen(ListenAddress(host, port, self._network), handler))
            except OSError as error:
                _close(check.listeners)
                self._listen_failed(service, port, error)
                return
        self._checks[service] = check
        log.info("opened health check", service=str(service), port=port)

    def _handler(self, service: ServiceName, check: _Check) -> Handler:
        def handle(_: Request) -> Response:
            count, healthy = check.local_endpoints, self._proxy_healthy()
            body = {
                "service": {"namespace": service.namespace, "name": service.name},
                "localEndpoints": count,
                "serviceProxyHealthy": healthy,
            }
            return message.json(
                HTTPStatus.OK if count and healthy else HTTPStatus.SERVICE_UNAVAILABLE,
                json.dumps(body, indent="\t").encode(),
                ("X-Load-Balancing-Endpoint-Weight", str(count)),
            )

        return handle


def _close(listeners: Iterable[Listener]) -> None:
    for listener in listeners:
        listener.close()
