"""Log lines: for people on a terminal, as JSON elsewhere; those of the libraries go the same way.

Verbosity is klog's number (`-v`):

| -v | what is logged |
|---|---|
| 0–3 | what an operator should know: info, warnings, errors |
| 4–5 | also every step of the proxy itself (debug) |
| 6–7 | also what the libraries do (their info) |
| 8–10 | also each of their requests (their debug) |

Every line has `ts` (UTC), `level`, `logger` and `msg`; further keys belong to the message.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog

LogFormat = Literal["text", "json"]

_OWN = "kproxy"
_SECRET_KEYS = frozenset({"authorization", "token", "password", "client_key", "client-key-data", "secret"})
_SECRET_TEXT = re.compile(
    r"""(?P<intro>\bauthorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic)\s+)?
               | \bbearer\s+(?=\S{16})
               | \b(?:token|password|secret)["']?\s*[:=]\s*["']?
        )[^\s"',}]+""",
    re.IGNORECASE | re.VERBOSE,
)
_REDACTED = "[redacted]"


def configure(log_format: LogFormat | None, verbosity: int, stream: TextIO = sys.stderr) -> None:
    """Send all log lines of the process to `stream`. Without a format: text if it is a terminal, else JSON.

    The libraries' and Python's own warnings, and exceptions that end a thread or the process, become log lines too.
    """
    terminal = stream.isatty()
    as_text = log_format == "text" or (log_format is None and terminal)
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.stdlib.ExtraAdder(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact,
                *(
                    [_text_renderer(colors=terminal)]
                    if as_text
                    else [_leading_keys, structlog.processors.JSONRenderer()]
                ),
            ],
        )
    )
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    set_verbosity(verbosity)


def set_verbosity(verbosity: int) -> None:
    """Change what is logged from now on; see the module's table."""
    libraries = logging.WARNING if verbosity < 6 else logging.INFO if verbosity < 8 else logging.DEBUG
    logging.getLogger().setLevel(libraries)
    logging.getLogger(_OWN).setLevel(logging.INFO if verbosity < 4 else logging.DEBUG)


def redact(_logger: object, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Leave credentials out of a line, wherever they come from."""
    for key, value in line.items():
        if key.lower() in _SECRET_KEYS:
            line[key] = _REDACTED
        elif isinstance(value, str):
            line[key] = _SECRET_TEXT.sub(rf"\g<intro>{_REDACTED}", value)
    return line


def _text_renderer(*, colors: bool) -> structlog.typing.Processor:
    return structlog.dev.ConsoleRenderer(
        colors=colors, timestamp_key="ts", pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
    )


def _leading_keys(_logger: object, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    first = {"ts": line.pop("ts"), "level": line.pop("level"), "logger": line.pop("logger"), "msg": line.pop("event")}
    return {**first, **line}


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(_OWN).critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None:
        return
    trace = (args.exc_type, args.exc_value, args.exc_traceback)
    thread = args.thread.name if args.thread else ""
    logging.getLogger(_OWN).critical("uncaught exception in thread %s", thread, exc_info=trace)
