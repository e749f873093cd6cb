"""What somebody else did to our tables: it is noticed, read as a difference, described, and put right."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from kproxy.dataplane.base import Change, diff
from kproxy.dataplane.nftables.containers import container
from kproxy.dataplane.nftables.describe import describe
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.monitor import Monitor
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, SetKey, Table, TableKey, UnknownSet
from kproxy.model import Family
from tests.lab.namespaces import Namespace
from tests.lab.privileges import NEEDS_WIDE_BUFFERS
from tests.nftables.conftest import WITHOUT_OWNER, OpenKernel
from tests.nftables.samples import BOTH, address, empty_layout, endpoint_key, everything

V4 = Family.IPv4
MASQ = ChainKey(V4, "masq")
ENDPOINTS = container(V4, "endpoints")
WAIT_SECONDS = 10


@pytest.fixture
def written(open_kernel: OpenKernel) -> NftablesKernel:
    """Everything, in tables that others may change."""
    kernel = open_kernel(features=WITHOUT_OWNER)
    kernel.apply(diff(everything(*BOTH), {}))
    return kernel


@pytest.mark.parametrize(
    ("command", "key", "words"),
    [
        (
            'insert rule ip kproxy masq counter accept comment "hello"',
            MASQ,
            'ip chain masq: counter accept comment "hello"; ',
        ),
        ("insert rule ip kproxy masq ip saddr 10.0.0.1 tcp dport 80 jump other", MASQ, "jump other"),
        ("flush chain ip kproxy masq", MASQ, "ip chain masq: no rules"),
        ("delete rule ip kproxy masq handle {handle}; add rule ip kproxy masq meta mark set 5", MASQ, "meta"),
        ("add chain ip kproxy extra", ChainKey(V4, "extra"), "ip chain extra: no rules"),
        (
            "add chain ip kproxy hooked {{ type filter hook forward priority 7; policy drop; }}",
            ChainKey(V4, "hooked"),
            "ip chain hooked at filter forward 7 policy drop: no rules",
        ),
        (
            "add set ip kproxy extra {{ type ipv4_addr; elements = {{ 192.0.2.1 }}; }}",
            SetKey(V4, "extra"),
            "ip set or map extra (not of this layout)",
        ),
        (
            "add element ip kproxy no-endpoints {{ 192.0.2.1 . udp . 53 : drop }}",
            container(V4, "no-endpoints").key(bytes((192, 0, 2, 1)), 17, 53),
            "ip map no-endpoints: 192.0.2.1 . udp . 53 → drop",
        ),
        (
            'add element ip kproxy no-endpoints {{ * comment "all" : drop }}',
            container(V4, "no-endpoints").key(b"\0\0\0\0")[:1],
            "ip map no-endpoints: * → drop (all)",
        ),
        (
            (
                "delete element ip kproxy endpoints {{ 10.0.0.1 . tcp . 80 . 1 }}; "
                'add element ip kproxy endpoints {{ 10.0.0.1 . tcp . 80 . 1 comment "mine" : 192.0.2.9 . 9 }}'
            ),
            endpoint_key(ENDPOINTS, address(V4, 1), 6, 80, slot=1),
            "ip map endpoints: 10.0.0.1 . tcp . 80 . slot 1 → 192.0.2.9:9",
        ),
    ],
)
def test_each_change_is_one_difference_with_a_description(
    written: NftablesKernel, netns: Namespace, command: str, key: object, words: str
):
    handles = netns.command("nft", "-a", "list", "chain", "ip", "kproxy", "masq").stdout
    handle = handles.split("0x00004000 # handle ")[1].split()[0]
    netns.command("nft", "add chain ip kproxy other") if "other" in command else None
    wanted = everything(*BOTH) | ({ChainKey(V4, "other"): Chain(None, ())} if "other" in command else {})
    netns.command("nft", command.format(handle=handle))
    changes = diff(wanted, written.read())
    assert [change.key for change in changes] == [key]
    assert words in describe(key, changes[0].old)
    written.apply(changes)
    assert diff(wanted, written.read()) == []


def test_a_table_of_another_layout_is_replaced_in_one_go(open_kernel: OpenKernel, netns: Namespace):
    netns.command(
        "nft", "-f", "-", stdin="table ip kproxy { map services { type ipv4_addr : verdict; }; chain x { }; }"
    )
    kernel = open_kernel()
    found = kernel.read()
    assert list(found) == [TableKey(V4)]
    assert describe(TableKey(V4), found[TableKey(V4)]) == (
        "table ip kproxy (key length of map services differ from this version's)"
    )
    kernel.apply(diff(everything(V4), found))
    assert diff(everything(V4), kernel.read()) == []


def test_an_unknown_set_is_no_fault_of_the_table(written: NftablesKernel, netns: Namespace):
    netns.command("nft", "add set ip6 kproxy extra { type ipv6_addr; }")
    assert written.read()[SetKey(Family.IPv6, "extra")] == UnknownSet(16)


class Watched:
    """A monitor at work in a thread."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._touches: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        for by in self._monitor.touches():
            self._touches.put(by)

    def next(self) -> str:
        return self._touches.get(timeout=WAIT_SECONDS)

    def rest(self) -> list[str]:
        """What else was seen, once it has ended."""
        self._monitor.stop()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        return [self._touches.get_nowait() for _ in range(self._touches.qsize())]


@pytest.fixture
def watch(netns: Namespace, written: NftablesKernel) -> Iterator[Watched]:
    with netns.run(Monitor, [written.port]) as monitor:
        watched = Watched(monitor)
        yield watched
        watched.rest()


@pytest.mark.parametrize(
    "command",
    [
        "add element ip kproxy cluster-ips { 192.0.2.1 }",
        "add rule ip6 kproxy masq accept",
        "flush chain ip kproxy masq",
        "delete table ip kproxy",
        "flush ruleset",
        "add table ip kproxy { flags dormant; }",
    ],
)
def test_a_foreign_change_is_noticed_with_who_made_it(watch: Watched, netns: Namespace, command: str):
    netns.command("nft", command)
    assert watch.next().startswith("nft (process ")
    assert watch.rest() == []


def test_our_own_changes_and_other_tables_are_not(watch: Watched, written: NftablesKernel, netns: Namespace):
    for number in range(3):
        key = container(V4, "cluster-ips").key(address(V4, 1000 + number))
        written.apply([Change(key, None, "")])
        netns.command("nft", "add table ip other; add chain ip other c; delete table ip other")
    netns.command("nft", "add chain ip kproxy last")
    assert watch.next().startswith("nft (process ")
    assert watch.rest() == []


def test_a_large_transaction_of_ours_does_not_drown_a_foreign_change(
    watch: Watched, written: NftablesKernel, netns: Namespace
):
    where = container(V4, "nodeport-ips")
    written.apply([Change(where.key(address(V4, 5000 + n)), None, "") for n in range(50_000)])
    netns.command("nft", "add chain ip kproxy last")
    assert watch.next().startswith("nft (process ")
    assert watch.rest() == []


@NEEDS_WIDE_BUFFERS
def test_a_flood_of_foreign_changes_is_noticed_though_it_is_lost(watch: Watched, netns: Namespace):
    many = ", ".join(f"192.0.{n >> 8}.{n & 255}" for n in range(20_000))
    netns.command("nft", "-f", "-", stdin=f"add element ip kproxy cluster-ips {{ {many} }}")
    assert watch.next()


def test_a_monitor_without_own_ports_sees_everything(netns: Namespace, written: NftablesKernel):
    with netns.run(Monitor, []) as monitor:
        watched = Watched(monitor)
        written.apply([Change(container(V4, "cluster-ips").key(address(V4, 77)), None, "")])
        assert "(process " in watched.next()
        assert watched.rest() == []
        monitor.stop()  # again, when it has ended


def test_an_empty_layout_is_read_without_elements(open_kernel: OpenKernel):
    kernel = open_kernel()
    kernel.apply(diff(empty_layout(V4), {}))
    assert kernel.read() == empty_layout(V4)
    assert describe(TableKey(V4), Table()) == "table ip kproxy"
