"""Entries for people, in one line."""

from __future__ import annotations

from kproxy.dataplane.base import Key, Value
from kproxy.dataplane.iptables.describe import describe as describe_rules
from kproxy.dataplane.iptables.entries import ChainKey
from kproxy.dataplane.ipvs.entries import (
    MH_PORT,
    PERSISTENT,
    AddressKey,
    DeviceKey,
    MemberKey,
    RealServer,
    RealServerKey,
    RuleKey,
    SetKey,
    SetType,
    VirtualServer,
    VirtualServerKey,
)
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.model import join_host_port

_FLAGS = {PERSISTENT: "persistent", MH_PORT: "mh-port"}
_METHODS = {2: "tunnel", 3: "direct routing"}  # IP_VS_CONN_F_TUNNEL, IP_VS_CONN_F_DROUTE


def describe(key: Key, value: Value) -> str:
    """An entry of the ipvs mode as one line, its rules as iptables-save prints them."""
    match key, value:
        case VirtualServerKey(), VirtualServer(scheduler, flags, timeout):
            chosen = [scheduler, *(text for flag, text in _FLAGS.items() if flags & flag)]
            if timeout:
                chosen.append(f"timeout {timeout} s")
            return f"virtual server {key}: {', '.join(chosen)}"
        case RealServerKey(), RealServer(weight, method, upper, lower):
            server = join_host_port(key.endpoint_address, key.endpoint_port)
            settings = [f"weight {weight}"]
            if method:
                settings.append(_METHODS.get(method, f"method {method}"))
            if upper or lower:
                settings.append(f"thresholds {lower} and {upper}")
            return f"virtual server {key.virtual_server} to {server}: {', '.join(settings)}"
        case DeviceKey(name), _:
            return f"interface {name}"
        case AddressKey(_, address), _:
            return f"interface {DEVICE}: address {address}"
        case SetKey(name), SetType(kind, family):
            return f"ipset {name}: {kind} for {family.name}"
        case MemberKey(name, member), _:
            return f"ipset {name}: member {member}"
        case RuleKey(family, table, chain), _:
            return describe_rules(ChainKey(family, table, chain), value)
        case _:
            return describe_rules(key, value)
