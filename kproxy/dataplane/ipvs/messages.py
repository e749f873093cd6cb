"""pyroute2's message formats, mended where they are wrong, for the batches of `kproxy.netlink`.

pyroute2's own sockets send one request and wait for its answer; those of `kproxy.netlink` send many at once and tell
each one's answer apart. What is mended here, as of pyroute2 0.9.7:
- a virtual server's netmask is an IPv4 address there; in IPv6 it is a prefix length;
- the timeouts of IPVS are bare bytes there.
Not used, since they are wrong: `IPVS.service("update")` and `IPVS.dest("update")`, which delete, and the defaults of
`IPVSService` and `IPVSDest` (scheduler wlc, direct routing).

Encoding takes pyroute2 70 to 150 µs a message, so what comes by the ten thousand (real servers, members of sets) is
packed without it.
"""

from __future__ import annotations

import struct
from typing import Any

from pyroute2.netlink.generic.ipvs import ipvsmsg

from kproxy.netlink import Request

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port

Attributes = list[tuple[str, Any]]


def _mended(formats: tuple[tuple[str, str], ...], *names: str) -> tuple[tuple[str, str], ...]:
    """Formats of attributes, where those with these names are numbers."""
    return tuple((name, "uint32" if name in names else kind) for name, kind in formats)


class IpvsMessage(ipvsmsg):  # type: ignore[misc]
    """A message of the generic netlink family IPVS."""

    nla_map = _mended(
        ipvsmsg.nla_map,
        "IPVS_CMD_ATTR_TIMEOUT_TCP",
        "IPVS_CMD_ATTR_TIMEOUT_TCP_FIN",
        "IPVS_CMD_ATTR_TIMEOUT_UDP",
    )

    class service(ipvsmsg.service):  # type: ignore[misc] # noqa: N801 - the name in nla_map
        """A virtual server."""

        nla_map = _mended(ipvsmsg.service.nla_map, "IPVS_SVC_ATTR_NETMASK")


def request(kind: int, form: type[Any], attributes: Attributes, **fields: Any) -> Request:
    """A message of one of pyroute2's forms. `fields` are those in front of its attributes."""
    message = form()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attributes
    message.encode()
    return Request(kind, bytes(message.data[_HEADER.size :]))


def parsed(kind: int, form: type[Any], payload: bytes) -> Any:
    """A message that came without its header."""
    message = form(_HEADER.pack(_HEADER.size + len(payload), kind, 0, 0, 0) + payload)
    message.decode()
    return message


def nested(attributes: Attributes) -> dict[str, Attributes]:
    """The value of an attribute that holds others."""
    return {"attrs": attributes}
