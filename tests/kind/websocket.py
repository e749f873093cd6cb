"""The server's side of `kubectl exec`: the protocol v5.channel.k8s.io over a WebSocket (RFC 6455)."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO

PROTOCOL = "v5.channel.k8s.io"
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_STDOUT, _STDERR, _ERROR = 1, 2, 3
_BINARY, _CLOSE = 2, 8
_CHUNK = 60_000


def accept(handler: BaseHTTPRequestHandler) -> bool:
    """Answer the request to upgrade; False if the client speaks another protocol."""
    headers: Message = handler.headers
    offered = [name.strip() for name in headers.get("Sec-WebSocket-Protocol", "").split(",")]
    if headers.get("Upgrade", "").lower() != "websocket" or PROTOCOL not in offered:
        return False
    digest = hashlib.sha1((headers["Sec-WebSocket-Key"] + _GUID).encode()).digest()
    handler.send_response(101)
    for name, value in (
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", base64.b64encode(digest).decode()),
        ("Sec-WebSocket-Protocol", PROTOCOL),
    ):
        handler.send_header(name, value)
    handler.end_headers()
    handler.close_connection = True
    return True


def send_result(wire: BinaryIO, stdout: bytes, stderr: bytes, status: int) -> None:
    """What the command printed, how it ended, and the end of the conversation."""
    for channel, content in ((_STDOUT, stdout), (_STDERR, stderr)):
        for begin in range(0, len(content), _CHUNK):
            _send(wire, _BINARY, bytes([channel]) + content[begin : begin + _CHUNK])
    _send(wire, _BINARY, bytes([_ERROR]) + json.dumps(_status(status)).encode())
    _send(wire, _CLOSE, struct.pack("!H", 1000))
    wire.flush()


def _status(code: int) -> dict[str, object]:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _send(wire: BinaryIO, opcode: int, content: bytes) -> None:
    if len(content) < 126:
        head = struct.pack("!BB", 0x80 | opcode, len(content))
    else:
        head = struct.pack("!BBH", 0x80 | opcode, 126, len(content))
    wire.write(head + content)
