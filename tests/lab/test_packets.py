"""The packet lab against rules written by hand: it must see what they do, whoever sends and whatever the protocol."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kproxy.model import Protocol
from tests.lab.flows import Fate, Flow, Origin
from tests.lab.node import POD_GATEWAYS
from tests.lab.packets import NODE_ADDRESSES, Lab


class Addresses(NamedTuple):
    """The addresses of a test in one family."""

    keyword: str
    node: str
    gateway: str
    pod: str
    client: str
    endpoint: str
    service: str
    refused: str
    silent: str
    reset: str
    on_node: str
    elsewhere: str


FAMILIES = [
    Addresses(
        "ip", NODE_ADDRESSES[0], POD_GATEWAYS[0], "10.0.0.2", "203.0.113.9", "10.0.1.1",
        "172.30.0.1", "172.30.0.2", "172.30.0.3", "172.30.0.4", "172.30.0.5", "198.51.100.1",
    ),
    Addresses(
        "ip6", NODE_ADDRESSES[1], POD_GATEWAYS[1], "fd00::a00:2", "2001:db8::9", "fd00::a00:101",
        "fd00::ac1e:1", "fd00::ac1e:2", "fd00::ac1e:3", "fd00::ac1e:4", "fd00::ac1e:5", "2001:db8:1::1",
    ),
]  # fmt: skip


@pytest.fixture(params=FAMILIES, ids=["IPv4", "IPv6"])
def ip(request, lab: Lab) -> Addresses:
    """A node that translates, masquerades what is not from pods, rejects, drops and resets."""
    a: Addresses = request.param
    refuse = f"""
        {a.keyword} daddr {a.refused} reject
        {a.keyword} daddr {a.silent} drop
    """
    lab.netns.command(
        "nft",
        "-f",
        "-",
        stdin=f"""
        table {a.keyword} lab {{
          chain translate {{
            {a.keyword} daddr {a.service} meta l4proto {{ tcp, udp, sctp }} dnat to {_host_port(a.endpoint, 8080)}
            {a.keyword} daddr {a.on_node} meta l4proto {{ tcp, udp, sctp }} dnat to {_host_port(a.node, 8080)}
          }}
          chain nat-prerouting {{ type nat hook prerouting priority -100; jump translate; }}
          chain nat-output {{ type nat hook output priority -100; jump translate; }}
          chain nat-postrouting {{
            type nat hook postrouting priority 100
            ct status dnat {a.keyword} saddr != {a.pod} masquerade fully-random
          }}
          chain filter-output {{ type filter hook output priority 0; {refuse} }}
          chain filter-forward {{
            type filter hook forward priority 0
            {refuse}
            {a.keyword} daddr {a.reset} meta l4proto tcp reject with tcp reset
          }}
        }}
        """,
    )
    return a


@pytest.fixture(params=list(Protocol))
def protocol(request) -> Protocol:
    return request.param


@pytest.fixture(params=list(Origin))
def origin(request) -> Origin:
    return request.param


def flow(ip: Addresses, origin: Origin, destination: str, protocol: Protocol) -> Flow:
    source = {Origin.POD: ip.pod, Origin.OUTSIDE: ip.client, Origin.NODE: ip.node}[origin]
    return Flow(origin, source, destination, 80, protocol)


def test_a_translated_connection_is_seen_at_its_endpoint_and_goes_on(
    lab: Lab, ip: Addresses, origin: Origin, protocol: Protocol
) -> None:
    connection = lab.open(flow(ip, origin, ip.service, protocol))
    seen = connection.outcome
    conversation = lab.converse(connection)
    connection.close()

    assert (seen.fate, seen.destination, seen.port, seen.device) == (Fate.FORWARDED, ip.endpoint, 8080, "pods")
    assert seen.source == (ip.pod if origin is Origin.POD else ip.gateway)
    assert conversation.flaw(connection) == ""


def test_a_connection_that_lost_its_translation_is_reported_as_broken(lab: Lab, ip: Addresses, origin: Origin) -> None:
    connection = lab.open(flow(ip, origin, ip.service, Protocol.UDP))

    lab.flush_conntrack()
    conversation = lab.converse(connection)
    connection.close()

    assert "the answer of" in conversation.flaw(connection)


def test_an_untouched_connection_leaves_the_node_as_it_came(
    lab: Lab, ip: Addresses, origin: Origin, protocol: Protocol
) -> None:
    seen = lab.send(flow(ip, origin, ip.elsewhere, protocol))

    assert (seen.fate, seen.destination, seen.port, seen.device) == (Fate.FORWARDED, ip.elsewhere, 80, "eth0")
    assert seen.source == flow(ip, origin, ip.elsewhere, protocol).source


def test_a_connection_to_the_node_itself_is_seen_with_its_translation(
    lab: Lab, ip: Addresses, origin: Origin, protocol: Protocol
) -> None:
    direct = lab.send(flow(ip, origin, ip.node, protocol))
    translated = lab.send(flow(ip, origin, ip.on_node, protocol))

    assert (direct.fate, direct.destination, direct.port) == (Fate.DELIVERED, ip.node, 80)
    assert (translated.fate, translated.destination, translated.port) == (Fate.DELIVERED, ip.node, 8080)


def test_a_refusal_is_told_from_silence(lab: Lab, ip: Addresses, origin: Origin, protocol: Protocol) -> None:
    refused, silent = lab.send_many([flow(ip, origin, where, protocol) for where in (ip.refused, ip.silent)])

    assert refused.fate is Fate.REJECTED
    assert silent.fate is Fate.DROPPED


def test_a_reset_by_a_rule_is_told_from_a_port_that_nobody_listens_on(lab: Lab, ip: Addresses) -> None:
    by_rule, nobody = lab.send_many([flow(ip, Origin.OUTSIDE, where, Protocol.TCP) for where in (ip.reset, ip.node)])

    assert by_rule.fate is Fate.RESET
    assert nobody.fate is Fate.DELIVERED


def test_many_flows_come_back_in_the_order_they_were_given(lab: Lab, ip: Addresses) -> None:
    wanted = [ip.service, ip.refused, ip.silent, ip.elsewhere, ip.on_node] * 400

    outcomes = lab.send_many([flow(ip, Origin.OUTSIDE, where, Protocol.TCP) for where in wanted])

    fates = [Fate.FORWARDED, Fate.REJECTED, Fate.DROPPED, Fate.FORWARDED, Fate.DELIVERED] * 400
    assert [o.fate for o in outcomes] == fates


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
