"""Elements of any content go through the kernel unchanged, many or few."""

from __future__ import annotations

import ipaddress
import struct
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kproxy.dataplane.base import Change, Entries, diff
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables.containers import CONTAINERS, Container, container, unpack
from kproxy.dataplane.nftables.expressions import rule
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, Hook
from kproxy.model import Family
from tests.conftest import MakeNetns
from tests.lab.namespaces import Namespace
from tests.nftables.conftest import OpenKernel
from tests.nftables.samples import BOTH, address, empty_layout, endpoint_key

V4 = Family.IPv4
MASQ = {ChainKey(family, "masq"): Chain(None, (rule(x.mark_or(1)),)) for family in BOTH}
LAYOUT = empty_layout(*BOTH) | MASQ

ports = st.integers(0, 65535)
protocols = st.sampled_from((6, 17, 132))
comments = st.one_of(
    st.just(""),
    st.text(st.characters(codec="ascii", min_codepoint=33, exclude_characters='"'), min_size=1, max_size=127),
    st.text("äß中→", min_size=1, max_size=40),
)
verdicts = st.sampled_from(("goto masq", "jump masq", "drop", "accept", "return"))


def addresses(family: Family) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=family.bits // 8, max_size=family.bits // 8)


@st.composite
def element(draw: st.DrawFn, where: Container) -> tuple[bytes, object]:
    parts: list[bytes | int] = []
    slots = b""
    for part in where.key_fields:
        match part.pack:
            case "4s" | "16s":
                parts.append(draw(addresses(where.family)))
            case "B3x":
                parts.append(draw(protocols))
            case "H2x":
                parts.append(draw(ports))
            case _:
                slots = struct.pack("=I", draw(st.integers(0, 1000)))
    key = where.key(*parts) + slots
    if where.has_intervals:
        length = draw(st.integers(0, where.family.bits))
        network = ipaddress.ip_network((parts.pop(), length), strict=False)
        key = where.interval(where.key(*parts), network.network_address.packed, network.broadcast_address.packed)
    if where.data == "verdict":
        return key, (draw(verdicts), draw(comments))
    if where.data:
        return key, where.address_port(draw(addresses(where.family)), draw(ports))
    return key, draw(comments)


filled = [c for c in CONTAINERS.values() if not c.learned]
several = st.lists(st.sampled_from(filled).flatmap(element), max_size=60).map(dict)


@pytest.fixture(scope="module")
def ready() -> Iterator[NftablesKernel]:
    with Namespace() as namespace, namespace.run(NftablesKernel, BOTH) as kernel:
        kernel.apply(diff(LAYOUT, {}))
        yield kernel


def without_overlaps(elements: dict[bytes, object]) -> Entries:
    """Leave out intervals that overlap another one of the same frontend; the kernel refuses those."""
    kept: Entries = {}
    frontends: set[bytes] = set()
    for key, value in elements.items():
        where = CONTAINERS[key[0]]
        if where.has_intervals:
            frontend = key[: 1 + where.key_length - where.key_fields[-1].length]
            if frontend in frontends:
                continue
            frontends.add(frontend)
        kept[key] = value
    return kept


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=several, after=several)
def test_any_elements_are_read_back_as_written(ready: NftablesKernel, before: dict, after: dict):
    for wanted in (without_overlaps(before), without_overlaps(after), {}):
        ready.apply(diff(LAYOUT | wanted, ready.read()))
        assert ready.read() == LAYOUT | wanted


@given(several)
def test_the_fields_of_a_key_can_be_told(elements: dict):
    for key in elements:
        where, fields = unpack(key)
        assert where.number == key[0]
        assert len(fields) == len(where.key_fields)
        if where.key_fields[0].pack.endswith("s"):
            assert ipaddress.ip_address(fields[0]).packed == key[1 : 1 + where.family.bits // 8]


def test_a_hundred_thousand_endpoints_at_once(kernel: NftablesKernel):
    services, endpoints = container(V4, "services"), container(V4, "endpoints")
    wanted = dict(LAYOUT)
    for number in range(10_000):
        vip = address(V4, number)
        wanted[services.key(vip, 6, 80)] = ("goto masq", f"default/service-{number}:http")
        for slot in range(10):
            target = endpoints.address_port(address(V4, 1 << 20 | number << 4 | slot), 8080)
            wanted[endpoint_key(endpoints, vip, 6, 80, slot=slot)] = target
    kernel.apply(diff(wanted, {}))
    assert diff(wanted, kernel.read()) == []
    # one endpoint of them moves
    key = endpoint_key(endpoints, address(V4, 7777), 6, 80, slot=3)
    moved = endpoints.address_port(address(V4, 5), 9090)
    kernel.apply([Change(key, wanted[key], moved)])
    assert diff(wanted, kernel.read()) == [Change(key, moved, wanted[key])]
    kernel.apply(diff(LAYOUT, kernel.read()))
    assert kernel.read() == LAYOUT


def test_a_reader_never_sees_half_a_transaction(kernel: NftablesKernel, open_kernel: OpenKernel):
    """Given a writer that moves a service between two maps, over and over."""
    key = {name: container(V4, name).key(address(V4, 1), 6, 80) for name in ("services", "no-endpoints")}
    kernel.apply([*diff(LAYOUT, {}), Change(key["services"], None, ("drop", ""))])
    reader = open_kernel()
    enough = threading.Event()

    def write() -> None:
        here, there = "services", "no-endpoints"
        while not enough.wait(0.002):
            kernel.apply([Change(key[there], None, ("drop", "")), Change(key[here], ("drop", ""), None)])
            here, there = there, here

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [reader.read() for _ in range(30)]
    finally:
        enough.set()
        writer.join()
    assert all((key["services"] in entries) != (key["no-endpoints"] in entries) for entries in seen)
    assert {key["services"] in entries for entries in seen} == {True, False}


def test_counters_count_the_packets_that_an_element_matched(kernel: NftablesKernel, netns: Namespace):
    nodeports = container(V4, "nodeports")
    hit, missed = nodeports.key(17, 30053), nodeports.key(17, 30054)
    wanted = {
        **LAYOUT,
        ChainKey(V4, "output"): _base_chain(rule(x.vmap(nodeports))),
        hit: ("accept", ""),
        missed: ("accept", ""),
    }
    kernel.apply(diff(wanted, {}))
    for _ in range(3):
        netns.command("bash", "-c", "echo -n 12345 > /dev/udp/127.0.0.1/30053")
    assert sorted(kernel.counters(nodeports)) == [(hit, ("accept", ""), 3), (missed, ("accept", ""), 0)]


def _base_chain(*rules: x.Rule) -> Chain:
    return Chain(Hook("filter", "output", 0), rules)


NARROW = """
import array, ctypes, platform, struct
from kproxy.dataplane.base import diff
from kproxy.dataplane.nftables.containers import container
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.model import Family
from tests.nftables.samples import address, empty_layout

SETSOCKOPT = {"x86_64": 54, "aarch64": 208}[platform.machine()]
program = array.array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in [
    (0x20, 0, 0, 0),             # the system call's number
    (0x15, 0, 3, SETSOCKOPT),
    (0x20, 0, 0, 32),            # its third argument
    (0x15, 3, 0, 32),            # SO_SNDBUFFORCE: refused with EPERM
    (0x15, 1, 0, 7),             # SO_SNDBUF: without effect, as at its limit
    (0x06, 0, 0, 0x7FFF0000),    # anything else: allowed
    (0x06, 0, 0, 0x00050000),
    (0x06, 0, 0, 0x00050001),
]))
address_of_program = ctypes.create_string_buffer(struct.pack("HP", 8, program.buffer_info()[0]))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0                       # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, address_of_program, 0, 0) == 0      # PR_SET_SECCOMP, by a filter

V4 = Family.IPv4
with NftablesKernel([V4]) as kernel:
    kernel.probe()
    layout = empty_layout(V4)
    where = container(V4, "endpoints")
    wanted, moved = dict(layout), dict(layout)
    for number in range(40_000):
        key = where.key(address(V4, number >> 3), 6, 80) + struct.pack("=I", number & 7)
        wanted[key] = where.address_port(address(V4, number), 80)
        if number % 3:
            moved[key] = where.address_port(address(V4, number), 90 if number % 2 else 80)
    for state in (wanted, moved, layout, {}):
        generation = kernel._generation()
        kernel.apply(diff(state, kernel.read()))
        transactions = int.from_bytes(kernel._generation(), "big") - int.from_bytes(generation, "big")
        print("same" if kernel.read() == state else "different", "several" if transactions > 1 else "one")
"""


def test_where_the_send_buffer_may_not_grow_a_large_change_takes_several_transactions(netns: Namespace):
    """As in the user namespaces of older kernels; here a system call filter holds it down."""
    done = netns.command(sys.executable, "-c", NARROW, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["same several", "same several", "same several", "same one"]


def test_in_a_user_namespace_it_works(netns: Namespace):
    done = netns.command("unshare", "-Urn", sys.executable, "-c", USER_NAMESPACE, check=False)
    assert done.stderr == ""
    assert done.stdout == "same\n"


USER_NAMESPACE = """
from kproxy.dataplane.base import diff
from kproxy.dataplane.nftables.kernel import NftablesKernel
from tests.nftables.samples import BOTH, everything
with NftablesKernel(BOTH) as kernel:
    kernel.probe()
    kernel.apply(diff(everything(*BOTH), {}))
    print("same" if kernel.read() == everything(*BOTH) else "different")
"""


def test_namespaces_do_not_share_tables(kernel: NftablesKernel, open_kernel: OpenKernel, make_netns: MakeNetns):
    kernel.apply(diff(LAYOUT, {}))
    assert open_kernel(make_netns()).read() == {}
