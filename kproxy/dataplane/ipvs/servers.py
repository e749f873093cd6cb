"""Virtual servers and their real servers in the kernel's IPVS, over generic netlink (linux/ip_vs.h)."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping
from typing import Any, Self

import msgspec
from pyroute2.netlink import CTRL_CMD_GETFAMILY, GENL_ID_CTRL, ctrlmsg
from pyroute2.netlink.generic import ipvs

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.ipvs.entries import PERSISTENT, RealServer, RealServerKey, VirtualServer, VirtualServerKey
from kproxy.dataplane.ipvs.messages import Attributes, IpvsMessage, nested, parsed, request
from kproxy.model import Family, Protocol
from kproxy.netlink import NetlinkSocket, Request, attribute, attributes
from kproxy.netlink import nested as packed_nest

_NETLINK_GENERIC = 16
_ADDRESS_FAMILY = {Family.IPv4: socket.AF_INET, Family.IPv6: socket.AF_INET6}
_FAMILY = {number: family for family, number in _ADDRESS_FAMILY.items()}
_PROTOCOL = {protocol.number: protocol for protocol in Protocol}
_WHOLE_ADDRESS = {Family.IPv4: 0xFFFFFFFF, Family.IPv6: 128}  # netmask of a client that stays: a mask, a length
_HASHED = 0x2  # IP_VS_SVC_F_HASHED, which the kernel sets by itself
_ALL_FLAGS = 0xFFFFFFFF
_MASQUERADING, _TUNNEL, _METHODS = 0, 2, 0x7  # IP_VS_CONN_F_MASQ, IP_VS_CONN_F_TUNNEL, IP_VS_CONN_F_FWD_MASK
_GONE = frozenset((errno.ESRCH, errno.ENOENT))
_NOWHERE = VirtualServerKey(Family.IPv6, "2001:db8::", Protocol.TCP, 20000)  # an address for documentation
_NO_SCHEDULER = "none"  # the kernel takes that, and refuses every connection
_LONGEST_SCHEDULER = 15  # characters of its name that the kernel takes

# Attributes of real servers, and of virtual servers around them (IPVS_CMD_ATTR_*, IPVS_SVC_ATTR_*, IPVS_DEST_ATTR_*).
_SERVICE, _DEST = 1, 2
_AF, _SERVICE_PROTOCOL, _SERVICE_ADDRESS, _SERVICE_PORT = 1, 2, 3, 4
_ADDRESS, _PORT, _FORWARDING, _WEIGHT, _UPPER, _LOWER, _ACTIVE, _INACTIVE = range(1, 9)
_STATS, _DEST_FAMILY, _STATS64 = range(10, 13)
_STATS_CONNECTIONS = 1
_GENERIC_HEADER = struct.Struct("=BBH")  # command, version, reserved
_SHORT, _NUMBER, _BIG_SHORT = struct.Struct("=H"), struct.Struct("=I"), struct.Struct("!H")

Key = VirtualServerKey | RealServerKey


class FoundVirtualServer(msgspec.Struct, frozen=True, gc=False):
    """A virtual server as the kernel has it. `total`: connections that it has had since it was made."""

    key: VirtualServerKey
    value: VirtualServer
    total: int


class FoundRealServer(msgspec.Struct, frozen=True, gc=False):
    """A real server as the kernel has it."""

    key: RealServerKey
    value: RealServer
    connections: int  # that it has now; inactive ones, such as in TIME_WAIT, count
    total: int  # connections that it has had since it was made


class Servers:
    """IPVS in the network namespace of the thread that makes this. Raises UnsupportedError and OSError."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(_NETLINK_GENERIC)
        try:
            self._kind = self._find()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()

    def _find(self) -> int:
        """The number of the generic netlink family; the kernel gives them out as modules are loaded."""
        everything = request(GENL_ID_CTRL, ctrlmsg, [], cmd=CTRL_CMD_GETFAMILY, version=1)
        for attempt in range(2):
            if attempt:
                _load_module("ip_vs")
            for payload in list(self._socket.dump(everything)):
                family = parsed(GENL_ID_CTRL, ctrlmsg, payload)
                if family.get_attr("CTRL_ATTR_FAMILY_NAME") == ipvs.GENL_NAME:
                    return int(family.get_attr("CTRL_ATTR_FAMILY_ID"))
        raise UnsupportedError("ipvs mode: the kernel has no IPVS; load the module ip_vs")

    # --- reading ---

    def virtual_servers(self) -> list[FoundVirtualServer]:
        """All that have an address (others go by firewall mark), of both families. Raises OSError."""
        listed = self._socket.dump(self._request(ipvs.IPVS_CMD_GET_SERVICE, []))
        found = (_virtual_server(parsed(self._kind, IpvsMessage, payload)) for payload in list(listed))
        return [server for server in found if server]

    def real_servers(self, of: VirtualServerKey) -> list[FoundRealServer]:
        """Those of a virtual server; none where that is not there. Raises OSError."""
        payload = _GENERIC_HEADER.pack(ipvs.IPVS_CMD_GET_DEST, ipvs.GENL_VERSION, 0) + _packed_service(of)
        try:
            listed = list(self._socket.dump(Request(self._kind, payload)))
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        return [_real_server(of, payload) for payload in listed]

    def has_scheduler(self, name: str) -> bool:
        """Whether virtual servers can have a scheduler, whose module is loaded if need be. Makes none. Raises OSError.

        It asks for a virtual server that there cannot be. The kernel looks for the scheduler before it comes to the
        netmask. Where IPVS does not know IPv6 it looks for nothing; true then.
        """
        if name == _NO_SCHEDULER or len(name.encode()) > _LONGEST_SCHEDULER:
            return False
        impossible = _identity(_NOWHERE) + _settings(VirtualServer(name), netmask=0)
        service = [("IPVS_CMD_ATTR_SERVICE", nested(impossible))]
        (code,) = self._socket.acknowledged([self._request(ipvs.IPVS_CMD_NEW_SERVICE, service)])
        if code not in (errno.ENOENT, errno.EINVAL, errno.EAFNOSUPPORT):
            raise OSError(code, f"IPVS does not say whether it has the scheduler {name!r}: {os.strerror(code)}")
        return code != errno.ENOENT

    # --- writing ---

    def put(
        self, servers: Mapping[Key, VirtualServer | RealServer], *, known: Container[Key] | None = None
    ) -> dict[Key, int]:
        """Make servers, or make those that exist like this; their connections stay.

        `known`: those that may exist; another stays as it is if it does, refused with EEXIST. None: all may. Returns
        the errno of each that was refused. Raises OSError.
        """
        codes = self._send({key: self._made(key, value, exists=False) for key, value in servers.items()})
        existing = [key for key, code in codes.items() if code == errno.EEXIST and (known is None or key in known)]
        codes |= self._send({key: self._made(key, servers[key], exists=True) for key in existing})
        return {key: code for key, code in codes.items() if code}

    def quiesce(self, keys: Iterable[RealServerKey]) -> dict[Key, int]:
        """Let real servers get no new connections; those that they have stay. What is not there is no error.

        Returns the errno of each that the kernel refused. Raises OSError.
        """
        codes = self._send({key: self._made(key, RealServer(0, _method(key)), exists=True) for key in keys})
        return {key: code for key, code in codes.items() if code and code not in _GONE}

    def remove(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Remove servers, with the connections that they have. What is not there is no error.

        Returns the errno of each that the kernel refused. Raises OSError.
        """
        codes = self._send({key: self._removed(key) for key in keys})
        return {key: code for key, code in codes.items() if code and code not in _GONE}

    def set_timeouts(self, tcp: int, tcp_fin: int, udp: int) -> None:
        """Seconds after which idle connections are forgotten; 0 keeps what is set. Raises OSError."""
        timeouts = [
            ("IPVS_CMD_ATTR_TIMEOUT_TCP", tcp),
            ("IPVS_CMD_ATTR_TIMEOUT_TCP_FIN", tcp_fin),
            ("IPVS_CMD_ATTR_TIMEOUT_UDP", udp),
        ]
        (code,) = self._socket.acknowledged([self._request(ipvs.IPVS_CMD_SET_CONFIG, timeouts)])
        if code:
            raise OSError(code, "the kernel refuses the timeouts of IPVS")

    def _send(self, requests: Mapping[Key, Request]) -> dict[Key, int]:
        return dict(zip(requests, self._socket.acknowledged(list(requests.values())), strict=True))

    def _request(self, command: int, attrs: Attributes) -> Request:
        return request(self._kind, IpvsMessage, attrs, cmd=command, version=ipvs.GENL_VERSION)

    def _made(self, key: Key, value: VirtualServer | RealServer, *, exists: bool) -> Request:
        match key, value:
            case VirtualServerKey(), VirtualServer():
                return self._request(
                    ipvs.IPVS_CMD_SET_SERVICE if exists else ipvs.IPVS_CMD_NEW_SERVICE,
                    [("IPVS_CMD_ATTR_SERVICE", nested(_identity(key) + _settings(value, _WHOLE_ADDRESS[key.family])))],
                )
            case RealServerKey(), RealServer():
                command = ipvs.IPVS_CMD_SET_DEST if exists else ipvs.IPVS_CMD_NEW_DEST
                return Request(self._kind, _packed_real_server(command, key, value))
            case _:
                raise TypeError(f"{value!r} is no value of {key!r}")

    def _removed(self, key: Key) -> Request:
        if isinstance(key, RealServerKey):
            return Request(self._kind, _packed_real_server(ipvs.IPVS_CMD_DEL_DEST, key, RealServer(0)))
        return self._request(ipvs.IPVS_CMD_DEL_SERVICE, [("IPVS_CMD_ATTR_SERVICE", nested(_identity(key)))])


def _load_module(name: str) -> None:
    """Have a kernel module loaded, as far as that is possible; what is missing then shows by itself."""
    try:
        subprocess.run(["modprobe", name], capture_output=True, check=False)
    except FileNotFoundError:
        return


def _identity(key: VirtualServerKey) -> Attributes:
    return [
        ("IPVS_SVC_ATTR_AF", _ADDRESS_FAMILY[key.family]),
        ("IPVS_SVC_ATTR_PROTOCOL", key.protocol.number),
        ("IPVS_SVC_ATTR_ADDR", key.address),
        ("IPVS_SVC_ATTR_PORT", key.port),
    ]


def _settings(value: VirtualServer, netmask: int) -> Attributes:
    return [
        ("IPVS_SVC_ATTR_SCHED_NAME", value.scheduler),
        ("IPVS_SVC_ATTR_FLAGS", {"flags": value.flags, "mask": _ALL_FLAGS}),
        ("IPVS_SVC_ATTR_TIMEOUT", value.timeout),
        ("IPVS_SVC_ATTR_NETMASK", netmask),
    ]


def _virtual_server(message: Any) -> FoundVirtualServer | None:
    """A virtual server that goes by address."""
    fields = message.get_attr("IPVS_CMD_ATTR_SERVICE")
    family = _FAMILY.get(fields.get_attr("IPVS_SVC_ATTR_AF"))
    protocol = _PROTOCOL.get(fields.get_attr("IPVS_SVC_ATTR_PROTOCOL"))
    address = fields.get_attr("IPVS_SVC_ATTR_ADDR")
    if family is None or protocol is None or address is None:
        return None
    flags = fields.get_attr("IPVS_SVC_ATTR_FLAGS")["flags"] & ~_HASHED
    statistics = fields.get_attr("IPVS_SVC_ATTR_STATS64") or fields.get_attr("IPVS_SVC_ATTR_STATS")
    return FoundVirtualServer(
        VirtualServerKey(family, address, protocol, fields.get_attr("IPVS_SVC_ATTR_PORT")),
        VirtualServer(
            fields.get_attr("IPVS_SVC_ATTR_SCHED_NAME"),
            flags,
            fields.get_attr("IPVS_SVC_ATTR_TIMEOUT") if flags & PERSISTENT else 0,
        ),
        statistics.get_attr("IPVS_STATS_ATTR_CONNS"),
    )


def _packed_service(key: VirtualServerKey) -> bytes:
    """What tells a virtual server from others."""
    return packed_nest(
        _SERVICE,
        attribute(_AF, _SHORT.pack(_ADDRESS_FAMILY[key.family])),
        attribute(_SERVICE_PROTOCOL, _SHORT.pack(key.protocol.number)),
        attribute(_SERVICE_ADDRESS, socket.inet_pton(_ADDRESS_FAMILY[key.family], key.address)),
        attribute(_SERVICE_PORT, _BIG_SHORT.pack(key.port)),
    )


def _method(key: RealServerKey) -> int:
    """How a real server is reached, as far as that does not matter: the kernel only tunnels to the other family."""
    return _MASQUERADING if Family.of(key.endpoint_address) is key.family else _TUNNEL


def _packed_real_server(command: int, key: RealServerKey, value: RealServer) -> bytes:
    number = _ADDRESS_FAMILY[Family.of(key.endpoint_address)]  # others' may be of the other family
    return (
        _GENERIC_HEADER.pack(command, ipvs.GENL_VERSION, 0)
        + _packed_service(key.virtual_server)
        + packed_nest(
            _DEST,
            attribute(_DEST_FAMILY, _SHORT.pack(number)),
            attribute(_ADDRESS, socket.inet_pton(number, key.endpoint_address)),
            attribute(_PORT, _BIG_SHORT.pack(key.endpoint_port)),
            attribute(_FORWARDING, _NUMBER.pack(value.method)),
            attribute(_WEIGHT, _NUMBER.pack(value.weight)),
            attribute(_UPPER, _NUMBER.pack(value.upper)),
            attribute(_LOWER, _NUMBER.pack(value.lower)),
        )
    )


def _real_server(of: VirtualServerKey, payload: bytes) -> FoundRealServer:
    fields = attributes(attributes(payload, _GENERIC_HEADER.size)[_DEST])
    family = _ADDRESS_FAMILY[of.family]
    if _DEST_FAMILY in fields:
        (family,) = _SHORT.unpack(fields[_DEST_FAMILY])
    size = 4 if family == socket.AF_INET else 16  # there is room for the longer one
    address = socket.inet_ntop(family, fields[_ADDRESS][:size])
    (port,) = _BIG_SHORT.unpack(fields[_PORT])
    connections = _number(fields, _ACTIVE) + _number(fields, _INACTIVE)
    statistics = attributes(fields.get(_STATS64) or fields[_STATS])  # the longer ones since Linux 4.1
    return FoundRealServer(
        RealServerKey(*of, address, port),
        RealServer(
            _number(fields, _WEIGHT),
            _number(fields, _FORWARDING) & _METHODS,
            _number(fields, _UPPER),
            _number(fields, _LOWER),
        ),
        connections,
        int.from_bytes(statistics[_STATS_CONNECTIONS], sys.byteorder),
    )


def _number(fields: Mapping[int, bytes], kind: int) -> int:
    value: int = _NUMBER.unpack(fields[kind])[0]
    return value
