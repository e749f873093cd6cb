"""What is noticed of what others do to our chains, and what is not our business."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kproxy.dataplane.base import diff
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.watch import LegacyWatch, NftWatch, watch
from kproxy.model import Family
from tests.iptables.conftest import Host, OpenHost
from tests.iptables.services import elaborate, entries, everything, plain
from tests.lab.privileges import NEEDS_WIDE_BUFFERS
from tests.lab.waiting import eventually

WAIT = 10.0
PERIOD = 30.0
FLOOD = 300  # services; their notifications are more than a socket holds
CLEARED = ("*nat", ":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]", ":POSTROUTING ACCEPT [0:0]", "COMMIT")

Meddle = Callable[[Host], object]

# What others may do that harms us.
HARM: dict[str, Meddle] = {
    "a table flushed": lambda host: host.iptables("-t", "nat", "-F"),
    "a jump removed": lambda host: host.iptables("-t", "nat", "-D", "PREROUTING", "1"),
    "a jump removed in IPv6": lambda host: host.iptables("-D", "FORWARD", "1", family=Family.IPv6),
    "a rule edited": lambda host: host.iptables("-R", "KUBE-FORWARD", "1", "-m", "conntrack", "--ctstate", "INVALID"),
    "a rule added": lambda host: host.iptables("-t", "nat", "-A", "KUBE-POSTROUTING", "-j", "ACCEPT"),
    "a chain flushed": lambda host: host.iptables("-t", "nat", "-F", "KUBE-MARK-MASQ"),
    "a canary removed": lambda host: host.iptables("-t", "mangle", "-X", "KUBE-PROXY-CANARY"),
    "another tool's full restore": lambda host: host.restore(*CLEARED),
}
# What others do that is theirs to do.
BUSINESS: dict[str, Meddle] = {
    "rules beside our jumps": lambda host: host.iptables("-I", "FORWARD", "-i", "docker0", "-j", "ACCEPT"),
    "a chain of their own": lambda host: host.iptables("-t", "nat", "-N", "DOCKER"),
    "kubelet's canary": lambda host: host.iptables("-t", "mangle", "-N", "KUBE-KUBELET-CANARY"),
    "their own jump removed": lambda host: (
        host.iptables("-A", "INPUT", "-j", "LOG"),
        host.iptables("-D", "INPUT", "-j", "LOG"),
    ),
}


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def followed(host: Host) -> Iterator[queue.Queue[str]]:
    """The touches of a watch of the nft variant, as they come."""
    heard: queue.Queue[str] = queue.Queue()
    watching = host.netns.run(watch, host.kernel, PERIOD)
    assert isinstance(watching, NftWatch)

    def follow() -> None:
        for who in watching.touches():
            heard.put(who)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield heard
    finally:
        watching.stop()
        thread.join(WAIT)
        watching.close()


def waiting_bytes(host: Host) -> int:
    """How much the netlink sockets of the host hold that nobody has received."""
    _, *sockets = host.netns.command("cat", "/proc/net/netlink").stdout.splitlines()
    return sum(int(line.split()[4]) for line in sockets)


@pytest.fixture
def nft(open_host: OpenHost) -> Host:
    host = open_host(Variant.NFT)
    host.bring_to(everything())
    return host


@pytest.fixture
def legacy(open_host: OpenHost) -> Host:
    host = open_host(Variant.LEGACY)
    host.bring_to(everything())
    return host


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def legacy_watch(legacy: Host, clock: Clock) -> Iterator[LegacyWatch]:
    with LegacyWatch(legacy.kernel, PERIOD, clock) as watching:
        assert not legacy.netns.run(watching.look)
        yield watching


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed_at_once_in_the_nft_variant(nft: Host, harm: str) -> None:
    with followed(nft) as heard:
        HARM[harm](nft)
        assert "tables" in heard.get(timeout=WAIT)
    assert diff(everything(), nft.read()) != []


def test_our_own_writes_and_others_business_are_no_touch_in_the_nft_variant(nft: Host) -> None:
    with followed(nft) as heard:
        nft.bring_to(entries(elaborate(Family.IPv4), plain(Family.IPv6, 3, 3)))
        for meddle in BUSINESS.values():
            meddle(nft)
        nft.bring_to(everything())
        HARM["a chain flushed"](nft)  # what is told first, is told of this
        assert "tables" in heard.get(timeout=WAIT)
        nft.bring_to(everything())
        nft.iptables("-t", "nat", "-X", "DOCKER")
    assert heard.empty()


@NEEDS_WIDE_BUFFERS
def test_more_of_our_own_writes_than_can_be_received_are_no_touch(nft: Host) -> None:
    watching = nft.netns.run(watch, nft.kernel, PERIOD)
    assert isinstance(watching, NftWatch)
    with watching:
        many = entries(*(plain(Family.IPv4, n, *range(n * 10, n * 10 + 10)) for n in range(FLOOD)))
        nft.bring_to(many)
        nft.bring_to(everything())
        heard: queue.Queue[str] = queue.Queue()
        thread = threading.Thread(target=lambda: [heard.put(who) for who in watching.touches()])
        thread.start()
        try:
            eventually(lambda: waiting_bytes(nft) == 0, "what was written is received", seconds=60)
            with pytest.raises(queue.Empty):
                heard.get(timeout=0.3)
            HARM["a chain flushed"](nft)
            assert "tables" in heard.get(timeout=WAIT)
        finally:
            watching.stop()
            thread.join(WAIT)


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed_within_a_period_in_the_legacy_variant(
    legacy: Host, legacy_watch: LegacyWatch, clock: Clock, harm: str
) -> None:
    HARM[harm](legacy)
    clock.now += PERIOD
    assert legacy.netns.run(legacy_watch.look)
    assert diff(everything(), legacy.read()) != []
    legacy.bring_to(everything())
    assert not legacy.netns.run(legacy_watch.look)


@pytest.mark.parametrize("harm", ["a table flushed", "a jump removed", "another tool's full restore"])
def test_what_changes_the_size_of_a_table_is_noticed_at_the_next_look(
    legacy: Host, legacy_watch: LegacyWatch, harm: str
) -> None:
    HARM[harm](legacy)
    assert legacy.netns.run(legacy_watch.look)


def test_our_own_writes_and_others_business_are_no_touch_in_the_legacy_variant(
    legacy: Host, legacy_watch: LegacyWatch, clock: Clock
) -> None:
    legacy.bring_to(entries(elaborate(Family.IPv4), plain(Family.IPv6, 3, 3)))
    assert not legacy.netns.run(legacy_watch.look)
    for meddle in BUSINESS.values():
        meddle(legacy)
        assert not legacy.netns.run(legacy_watch.look)
    clock.now += PERIOD
    assert not legacy.netns.run(legacy_watch.look)


def test_harm_just_before_a_write_of_ours_is_noticed_after_it(legacy: Host, legacy_watch: LegacyWatch) -> None:
    changes = diff(entries(elaborate(Family.IPv4)), legacy.read())
    HARM["a jump removed"](legacy)
    legacy.netns.run(legacy.kernel.apply, changes)
    assert legacy.netns.run(legacy_watch.look)


def test_harm_between_a_write_of_ours_and_the_next_look_is_noticed_within_a_period(
    legacy: Host, legacy_watch: LegacyWatch, clock: Clock
) -> None:
    legacy.bring_to(entries(elaborate(Family.IPv4)))
    HARM["a rule edited"](legacy)
    legacy.netns.run(legacy_watch.look)
    legacy.netns.run(legacy.kernel.apply, diff(everything(), entries(elaborate(Family.IPv4))))
    clock.now += PERIOD
    assert legacy.netns.run(legacy_watch.look)


def test_a_legacy_watch_ends_when_it_is_told(legacy: Host, legacy_watch: LegacyWatch) -> None:
    legacy_watch.stop()
    assert legacy.netns.run(list, legacy_watch.touches()) == []
