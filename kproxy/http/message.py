"""Requests and responses: from bytes and to bytes, without a socket. The standard library does the parsing."""

from __future__ import annotations

import re
from collections.abc import Callable
from email.message import Message
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from urllib.parse import urlsplit

import msgspec

MAX_HEAD = 16 << 10  # bytes of request line and headers
MAX_BODY = 16 << 10  # bytes; a larger body is answered without being read

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


class Request(msgspec.Struct, frozen=True):
    """What a client asked for. `headers` finds names in any case; `body` is empty where it was not read."""

    method: str
    path: str
    query: str
    headers: Message
    body: bytes = b""


class Response(msgspec.Struct, frozen=True):
    """What is answered; Date, Content-Length and Connection are added on the way out."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]


Answer = Response | Callable[[], Response]  # a callable is work that takes long: it runs beside the server's own thread
Handler = Callable[[Request], Answer]


def text(status: int, body: str) -> Response:
    """A plain text response."""
    return Response(status, body.encode(), (("Content-Type", "text/plain; charset=utf-8"), NO_SNIFF))


def json(status: int, body: bytes, *headers: tuple[str, str]) -> Response:
    """A JSON response."""
    return Response(status, body, (("Content-Type", "application/json"), NO_SNIFF, *headers))


NO_SNIFF = ("X-Content-Type-Options", "nosniff")
NOT_FOUND = text(HTTPStatus.NOT_FOUND, "404 page not found\n")


class BadRequestError(Exception):
    """The bytes are no HTTP request that can be served; the connection ends after the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.response = text(status, f"{status} {HTTPStatus(status).phrase}: {message}\n")


class Head(msgspec.Struct, frozen=True):
    """A request up to its body."""

    request: Request
    version: str
    body_length: int  # bytes of body to wait for
    keep_alive: bool


def end_of_head(received: bytes | bytearray) -> int:
    """Where the body begins; 0 as long as the head is incomplete. Raises BadRequestError if it is too long."""
    end = _END_OF_HEAD.search(received)
    length = end.end() if end else 0
    if max(length, 0 if end else len(received)) > MAX_HEAD:
        raise BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEAD} bytes of headers")
    return length


def parse_head(data: bytes) -> Head:
    """The request that `data`, a complete head, describes. Raises BadRequestError."""
    try:
        parsed = _LibraryParser(data)  # it takes a Content-Type apart, and character sets in it can be anything
        url = urlsplit(parsed.path)
    except ValueError as error:
        raise BadRequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
    length = parsed.headers.get("Content-Length", "0").strip()
    if not (length.isascii() and length.isdigit()):
        raise BadRequestError(HTTPStatus.BAD_REQUEST, "Content-Length is not a number")
    # No handler needs a body that is long, of unknown length or sent only on request: it is left unread.
    read_body = len(length) < 10 and int(length) <= MAX_BODY
    read_body = read_body and "Transfer-Encoding" not in parsed.headers and "Expect" not in parsed.headers
    return Head(
        request=Request(parsed.command, url.path, url.query, parsed.headers),
        version="HTTP/1.1" if parsed.request_version > "HTTP/1.0" else "HTTP/1.0",
        body_length=int(length) if read_body else 0,
        keep_alive=read_body and not parsed.close_connection and parsed.request_version == "HTTP/1.1",
    )


def encode(response: Response, *, version: str = "HTTP/1.1", keep_alive: bool = False, body: bool = True) -> bytes:
    """The response's bytes; `body` False leaves the body out, as the answer to HEAD does."""
    headers = (
        *response.headers,
        ("Date", formatdate(usegmt=True)),
        ("Content-Length", str(len(response.body))),
        *(() if keep_alive else (("Connection", "close"),)),
    )
    lines = [f"{version} {response.status} {HTTPStatus(response.status).phrase}"]
    lines.extend(f"{name}: {value}" for name, value in headers)
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head + response.body if body else head


class _LibraryParser(BaseHTTPRequestHandler):
    """The standard library's request parser, reading from memory instead of a socket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, data: bytes) -> None:
        self.rfile = BytesIO(data)
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request() or self.request_version < "HTTP/1.0":
            raise BadRequestError(HTTPStatus.BAD_REQUEST, "no HTTP/1 request line")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        raise BadRequestError(code, message or "")

    def handle_expect_100(self) -> bool:
        return True
