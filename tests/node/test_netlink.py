"""The netlink codec against the kernel."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from kproxy.netlink import DumpInterruptedError, NetlinkSocket, Request, attribute, attributes, nested
from tests.lab.namespaces import Namespace

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTM_NEWADDR, RTM_GETADDR, RTM_GETLINK, CTNETLINK_DELETE = 20, 22, 18, 0x102
ADDRESSES = Request(RTM_GETADDR, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0))
LINKS = Request(RTM_GETLINK, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0))
SENSELESS = Request(RTM_NEWADDR, struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, 999))


@pytest.fixture
def crowded(netns: Namespace) -> Namespace:
    """With one interface and more addresses than the kernel hands out at a time."""
    many = "\n".join(f"addr add 10.0.{i // 250}.{i % 250 + 1}/32 dev lo" for i in range(1000))
    netns.command("ip", "-batch", "-", stdin=many + "\n")
    return netns


def test_attributes_are_read_as_they_were_written():
    data = nested(1, attribute(2, b"abcde"), attribute(3, b"")) + attribute(4, b"x")
    outer = attributes(data)
    assert outer == {1: data[4:20], 4: b"x"}
    assert attributes(outer[1]) == {2: b"abcde", 3: b""}


@pytest.mark.parametrize("length", [0, 3, 9])
def test_an_attribute_of_impossible_length_is_an_error_not_an_endless_loop(length: int):
    with pytest.raises(ValueError, match=f"attribute 7 at byte 0 of 8 claims {length} bytes"):
        attributes(struct.pack("=HH4x", length, 7))


def test_requests_are_answered_one_by_one_however_many_there_are(netns: Namespace):
    """Deletions of connections that do not exist, with one among them that makes no sense."""
    missing = Request(
        CTNETLINK_DELETE,
        struct.pack("=BBH", socket.AF_INET, 0, 0)
        + nested(
            1,
            nested(1, attribute(1, bytes([192, 0, 2, 1])), attribute(2, bytes([192, 0, 2, 2]))),
            nested(2, attribute(1, bytes([17])), attribute(2, b"\x00\x35"), attribute(3, b"\x00\x35")),
        ),
    )
    senseless = Request(CTNETLINK_DELETE, struct.pack("=BBH", socket.AF_INET, 0, 0) + nested(1))
    with netns.run(NetlinkSocket, NETLINK_NETFILTER) as kernel:
        codes = kernel.acknowledged([missing] * 500 + [senseless] + [missing] * 500)
    assert codes == [errno.ENOENT] * 500 + [errno.EINVAL] + [errno.ENOENT] * 500


def test_a_listing_that_the_kernel_refuses_is_an_error(netns: Namespace):
    unknown_subsystem = Request(0xFF01, struct.pack("=BBH", 0, 0, 0))
    with (
        netns.run(NetlinkSocket, NETLINK_NETFILTER) as kernel,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        list(kernel.dump(unknown_subsystem))


def test_a_listing_whose_subject_changes_meanwhile_says_so(crowded: Namespace):
    with crowded.run(NetlinkSocket, NETLINK_ROUTE) as kernel:
        listing = kernel.dump(ADDRESSES)
        next(listing)
        crowded.command("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
        with pytest.raises(DumpInterruptedError):
            list(listing)


@pytest.mark.parametrize("given_up", [ADDRESSES, LINKS], ids=["with much more to come", "read but for its end"])
def test_a_listing_that_was_given_up_does_not_get_into_the_next_answers(crowded: Namespace, given_up: Request):
    with crowded.run(NetlinkSocket, NETLINK_ROUTE) as kernel:
        next(kernel.dump(given_up))
        (link,) = kernel.dump(LINKS)
        assert b"lo\0" in link

        next(kernel.dump(given_up))
        assert kernel.acknowledged([SENSELESS] * 3) == [errno.EINVAL] * 3


def test_a_listing_cannot_go_on_after_another_request(crowded: Namespace):
    with crowded.run(NetlinkSocket, NETLINK_ROUTE) as kernel:
        listing = kernel.dump(ADDRESSES)
        next(listing)
        list(kernel.dump(LINKS))
        with pytest.raises(DumpInterruptedError):
            list(listing)
