"""Notices that somebody else changed our chains: `iptables -F`, a removed jump, an edited rule, another full restore.

nf_tables tells of every change, so in the nft variant it is known at once, and nothing wakes up in between. Legacy
tables tell nothing: once a second their sizes are asked for (microseconds), and once a period what iptables-legacy-save
prints of our chains is compared with what was read and written (0.5 s at 5,000 services × 10), which finds an edit that
leaves the size.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Iterator

import structlog

from kproxy.dataplane.iptables import commands, digest
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import BUILT_IN, concerns_us
from kproxy.dataplane.iptables.journal import Journal, generation, legacy_shape
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.dataplane.nftables.expressions import NFPROTO
from kproxy.dataplane.nftables.listener import SOMEBODY, Listener, Stoppable, process_of
from kproxy.dataplane.nftables.nfnetlink import Msg, NetlinkSocket, Received, parsed, text

_RECEIVE_BUFFER = 1 << 23  # our own bulk loads are notified, too
_TABLE, _RULE_CHAIN, _CHAIN_NAME = 1, 2, 3
_GENERATION = 1
_LOOK_SECONDS = 1.0

log = structlog.get_logger(__name__)


class NftWatch(Listener):
    """Watches the nft variant in the network namespace of the thread that creates it. Raises OSError."""

    def __init__(self, kernel: IptablesKernel) -> None:
        self._journal = kernel.journal
        self._protocols = {NFPROTO[family] for family in kernel.families}
        self._touched = False
        self._netlink = NetlinkSocket()
        self._seen = kernel.journal.read_at or generation(self._netlink)
        super().__init__(_RECEIVE_BUFFER)
        self._late = self._lost()

    def close(self) -> None:
        """See `Listener`."""
        self._netlink.close()
        super().close()

    def touches(self) -> Iterator[str]:
        """See `Listener`. What was changed since the kernel was read, before the watch began, comes first."""
        if self._late:
            yield SOMEBODY
        yield from super().touches()

    def _heard(self, received: Received) -> str:
        if received.type != Msg.NEWGEN:
            self._touched |= received.family in self._protocols and _concerns_us(received)
            return ""
        members = parsed(received.attributes)
        seen = int.from_bytes(members.get(_GENERATION, b""), "big")
        if not self._behind:
            self._seen = seen
        touched, self._touched = self._touched, False
        if not touched:
            return ""
        with self._journal.lock:  # a write of ours that is under way is known when it has ended
            ours = self._journal.are_ours(seen - 1, seen)
        return "" if ours else process_of(members)

    def _lost(self) -> bool:
        with self._journal.lock:
            after, self._seen = self._seen, generation(self._netlink)
            return not self._journal.are_ours(after, self._seen)


def _concerns_us(received: Received) -> bool:
    """Whether a notification is about our chains, or about a jump to them that goes."""
    members = parsed(received.attributes)
    table = text(members.get(_TABLE, b""))
    match received.type:
        case Msg.NEWCHAIN | Msg.DELCHAIN:
            chain = text(members.get(_CHAIN_NAME, b""))
            return concerns_us(table, chain) and (table, chain) not in BUILT_IN
        case Msg.NEWRULE | Msg.DELRULE:
            chain = text(members.get(_RULE_CHAIN, b""))
            if (table, chain) in BUILT_IN:  # what others put beside our jumps is their business
                return received.type == Msg.DELRULE and b"KUBE-" in received.attributes
            return concerns_us(table, chain)
        case _:
            return False


class LegacyWatch(Stoppable):
    """Watches the legacy variant in the network namespace of the thread that calls `touches`.

    `period`: seconds between looks at the rules themselves; syncPeriod.
    """

    def __init__(self, kernel: IptablesKernel, period: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._families = kernel.families
        self._journal: Journal = kernel.journal
        self._period = period
        self._clock = clock
        self._look_at = 0.0

    def touches(self) -> Iterator[str]:
        """Wait for foreign changes of our chains; nobody can tell whose. Ends on `stop`.

        Where it cannot look it goes on: a program that is missing is there again when its package has been replaced.
        """
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        trouble = ""
        while not poll.poll(_LOOK_SECONDS * 1000):
            try:
                if self.look():
                    yield SOMEBODY
                trouble = ""
            except OSError as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("cannot see whether others change our rules; trying again", error=trouble)

    def look(self) -> bool:
        """Whether our chains were changed since the last look, by others. Raises OSError."""
        with self._journal.lock:
            shape, written = legacy_shape(self._families), self._journal.shape
            moved = self._journal.disturbed or shape != written
            now = self._clock()
            if not moved and now < self._look_at:
                return False
            with_tables = [family for family in self._families if legacy_tables(family)]
            found = {family: digest.of_saved(commands.save(Variant.LEGACY, family)) for family in with_tables}
            self._journal.disturbed, self._journal.shape = False, shape  # not before: looking may have failed
            self._look_at = now + self._period
            return Counter(found) != self._journal.holds


def watch(kernel: IptablesKernel, period: float) -> NftWatch | LegacyWatch:
    """The watch for the kernel's variant. `period`: see `LegacyWatch`. Raises OSError."""
    return NftWatch(kernel) if kernel.variant is Variant.NFT else LegacyWatch(kernel, period)
