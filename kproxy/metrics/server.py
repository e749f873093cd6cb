"""What the metrics address serves: metrics, mode, configuration, and on demand what helps to debug (reference: 7.2)."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus

import msgspec
from prometheus_client import CollectorRegistry, make_wsgi_app

from kproxy.http.message import NO_SNIFF, Answer, Handler, Request, Response, json, text


def metrics_handler(
    registry: CollectorRegistry,
    mode: str,
    configuration: object,
    *,
    set_verbosity: Callable[[int], None] | None = None,
    flags: Mapping[str, str] | None = None,
    status: Callable[[], Mapping[str, str]] | None = None,
) -> Handler:
    """Serves `registry`, the proxy mode and the configuration (anything that msgspec encodes).

    `set_verbosity` comes with `enableProfiling` and opens the debug paths; `flags` and `status` come with the gates
    ComponentFlagz and ComponentStatusz. What is None is not served.
    """
    configz = msgspec.json.encode({"kubeproxy.config.k8s.io": configuration})
    routes: dict[str, Handler] = {
        "/configz": lambda _: json(HTTPStatus.OK, configz),
        "/healthz": lambda _: text(HTTPStatus.OK, "ok"),
        "/metrics": _exposition(registry),
        "/metrics/slis": _exposition(CollectorRegistry()),  # no component has such a check here
        "/proxyMode": lambda _: text(HTTPStatus.OK, mode),
    }
    if flags is not None:
        routes["/flagz"] = lambda _: _lines("kube-proxy flagz", flags)
    if status is not None:
        routes["/statusz"] = lambda _: _lines("kube-proxy statusz", {**status(), "Paths": " ".join(sorted(routes))})
    if set_verbosity is not None:
        routes["/debug/flags/v"] = _verbosity(set_verbosity)
        routes["/debug/pprof/goroutine"] = lambda _: text(HTTPStatus.OK, thread_stacks())
    not_found = json(
        HTTPStatus.NOT_FOUND, msgspec.json.format(msgspec.json.encode({"paths": sorted(routes)}), indent=2)
    )

    def handle(request: Request) -> Answer:
        route = routes.get(request.path)
        return route(request) if route else not_found

    return handle


def thread_stacks() -> str:
    """The stack of every thread, as Python prints tracebacks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = (
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
    return "\n".join(stacks)


def _exposition(registry: CollectorRegistry) -> Handler:
    """The registry in the format the client accepts, compressed if it accepts that."""
    application = make_wsgi_app(registry)

    def scrape(request: Request) -> Response:
        environment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": request.headers.get("Accept-Encoding", ""),
        }
        started: list[tuple[str, list[tuple[str, str]]]] = []
        body = b"".join(application(environment, lambda status, headers: started.append((status, headers))))
        [(status, headers)] = started
        return Response(int(status.split()[0]), body, (*headers, NO_SNIFF))

    return lambda request: lambda: scrape(request)  # a scrape may read the whole kernel state


def _verbosity(set_verbosity: Callable[[int], None]) -> Handler:
    """`PUT` with a number changes the log verbosity, as in Kubernetes' components."""

    def handle(request: Request) -> Response:
        if request.method != "PUT":
            return text(HTTPStatus.NOT_ACCEPTABLE, "only PUT is served here\n")
        value = request.body.decode("latin-1").strip()
        if not (value.isascii() and value.isdigit()):
            return text(HTTPStatus.BAD_REQUEST, f"{value!r} is not a verbosity\n")
        set_verbosity(int(value))
        return text(HTTPStatus.OK, f"verbosity is now {int(value)}\n")

    return handle


def _lines(title: str, values: Mapping[str, str]) -> Response:
    return text(HTTPStatus.OK, "\n".join([title, "", *(f"{name}={value}" for name, value in values.items()), ""]))
