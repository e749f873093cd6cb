"""What other modes of kproxy or kube-proxy left in the kernel; it goes when the own rules are in place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from kproxy import sysctl
from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.base import ApplyError, Change, Key, UnsupportedError, Value, diff
from kproxy.dataplane.iptables import cleanup, commands, localhost
from kproxy.dataplane.iptables import describe as iptables_describe
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, JumpKey
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.variant import chains, find, legacy_tables, ours
from kproxy.dataplane.ipvs import cleanup as ipvs_cleanup
from kproxy.dataplane.ipvs import describe as ipvs_describe
from kproxy.dataplane.ipvs import device
from kproxy.dataplane.ipvs.entries import VirtualServerKey
from kproxy.dataplane.ipvs.jumps import CHAINS, JUMPS, OWN
from kproxy.dataplane.nftables import describe as nftables_describe
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import TableKey
from kproxy.model import Family, NodeFacts
from kproxy.proxy import Observer
from kproxy.reconcile import SyncReport

log = structlog.get_logger(__name__)

FIRST_LOOK_SECONDS = 15.0
LAST_LOOK_SECONDS = 3600.0


class Remains(NamedTuple):
    """What there is of one mode in one place."""

    owner: str
    changes: Sequence[Change]
    describe: Callable[[Key, Value], str]
    remove: Callable[[], None]  # makes the changes; raises ApplyError
    staying: Sequence[Change] = ()  # what is not to go yet


def places(
    families: Sequence[Family],
    but: ProxyMode | None = None,
    *,
    excluded: Sequence[str] = (),
    masquerade_mark: int | None = None,
    ahead: bool = False,
) -> Iterator[Callable[[], Remains | None]]:
    """A function for each place where a mode other than `but` may have left something; None if it has not.

    They change nothing, and raise UnsupportedError and OSError. A place is to be looked at when what was found in those
    before it has been removed. `excluded`: CIDRs whose virtual servers are left alone.

    `masquerade_mark`: the packet mark by which the mode `but` masquerades. With it, virtual servers that have
    connections stay, without new ones, and so does what keeps their addresses from doing harm. None: all goes.
    `ahead`: `but` may not be in place yet, and what it will have in common with others stays.
    """
    if but is not ProxyMode.NFTABLES:
        yield _nftables
    if but is not ProxyMode.IPVS:
        yield partial(_ipvs_servers, families, excluded, masquerade_mark is not None)
        for variant in Variant:
            comes = ahead and but is ProxyMode.IPTABLES
            yield partial(_ipvs_rules, variant, families, masquerade_mark, comes)
        yield partial(_ipvs_sets, families, masquerade_mark is not None)
    if but is not ProxyMode.IPTABLES:
        yield partial(_localhost, families)  # first, while the rule is there that guards it
        for variant in Variant:
            yield partial(_iptables, variant, families, ahead and but is ProxyMode.IPVS)


def _nftables() -> Remains | None:
    with NftablesKernel(tuple(Family)) as kernel:
        changes = [Change(key, table, None) for key, table in kernel.tables().items()]

    def remove() -> None:
        with NftablesKernel(tuple(Family)) as kernel:
            kernel.apply(changes)

    return Remains("nftables mode", changes, nftables_describe.describe, remove) if changes else None


def _ipvs_servers(families: Sequence[Family], excluded: Sequence[str], patient: bool) -> Remains | None:
    found = ipvs_cleanup.servers_left(families, excluded)
    busy = ipvs_cleanup.busy(found) if patient else set()
    changes, staying = _parted(found, lambda c: c.key in busy or (bool(busy) and ipvs_cleanup.is_needed(c)))
    remove = partial(ipvs_cleanup.remove_servers, changes, busy)
    return Remains("ipvs mode", changes, ipvs_describe.describe, remove, staying) if found else None


def _ipvs_rules(
    variant: Variant, families: Sequence[Family], masquerade_mark: int | None, iptables_mode_comes: bool
) -> Remains | None:
    comes = iptables_mode_comes and variant is find(families)
    found = ipvs_cleanup.rules_left(variant, families, iptables_mode_comes=comes)
    needed = ipvs_cleanup.needed_rules(found, masquerade_mark) if masquerade_mark is not None and device.index() else {}
    changes = diff(needed, {change.key: change.old for change in found})
    staying = [change for change in found if change.key in needed]
    remove = partial(ipvs_cleanup.write_rules, variant, changes)
    guards_only = all(map(ipvs_cleanup.is_needed, found))  # then it counts with the device, for who waits for the rules
    owner = "ipvs mode" if guards_only else f"ipvs mode, iptables' {variant} variant"
    return Remains(owner, changes, ipvs_describe.describe, remove, staying) if found else None


def _ipvs_sets(families: Sequence[Family], patient: bool) -> Remains | None:
    found = ipvs_cleanup.sets_left(families)
    draining = patient and device.index()
    changes, staying = _parted(found, lambda c: draining and ipvs_cleanup.is_needed(c))
    remove = partial(ipvs_cleanup.remove_sets, changes)
    return Remains("ipvs mode", changes, ipvs_describe.describe, remove, staying) if found else None


def _parted(found: Iterable[Change], stays: Callable[[Change], object]) -> tuple[list[Change], list[Change]]:
    """What goes, and what stays."""
    changes: list[Change] = []
    staying: list[Change] = []
    for change in found:
        (staying if stays(change) else changes).append(change)
    return changes, staying


def _localhost(families: Sequence[Family]) -> Remains | None:
    """The setting that node ports on localhost took; a proxy in iptables mode is who needs that."""
    if Family.IPv4 not in families or not sysctl.current(localhost.ROUTE_LOCALNET.path):
        return None
    used = [variant for variant in Variant if ours(variant, families)]
    if not any(localhost.is_guarded(IptablesKernel([Family.IPv4], v, guards_localhost=True).read()) for v in used):
        return None
    if any(map(_others_need_localnet, Variant)):
        return None

    def remove() -> None:
        try:
            sysctl.apply([localhost.setting(localhost.ROUTE_LOCALNET, None)])
        except sysctl.SysctlError as error:
            raise ApplyError(str(error)) from error

    changes = [Change(localhost.ROUTE_LOCALNET, 1, None)]
    return Remains("iptables mode", changes, iptables_describe.describe, remove)


def _others_need_localnet(variant: Variant) -> bool:
    """Whether somebody else translates to loopback addresses, as the nodes of kind do for Docker's DNS."""
    legacy = variant is Variant.LEGACY
    if commands.missing(variant, [Family.IPv4]) or (legacy and "nat" not in legacy_tables(Family.IPv4)):
        return False
    rules = commands.sections(commands.save(variant, Family.IPv4, ["nat"]))
    return any("--to-destination 127." in (rule or "") and not chain.startswith("KUBE-") for _, chain, rule in rules)


def _iptables(variant: Variant, families: Sequence[Family], ipvs_mode_comes: bool) -> Remains | None:
    # Some chains have the same names in ipvs mode; where that is in place, or about to be, they are its own.
    comes = ipvs_mode_comes and variant is find(families)
    ipvs = families if comes else _families_of_ipvs(variant, families)
    changes = cleanup.leftovers(variant, [family for family in families if family not in ipvs])
    changes += [c for c in cleanup.leftovers(variant, ipvs) if not _is_ipvs_modes(c)]
    remove = partial(cleanup.remove, variant, families, changes)
    owner = f"iptables mode, {variant} variant"
    return Remains(owner, changes, iptables_describe.describe, remove) if changes else None


def _families_of_ipvs(variant: Variant, families: Sequence[Family]) -> list[Family]:
    # What guards the device may be all that is left of it.
    own = OWN - ipvs_cleanup.GUARDS
    held = {family for family, *where in chains(variant, families) if tuple(where) in own}
    return [family for family in families if family in held]


def _is_ipvs_modes(change: Change) -> bool:
    match change.key:
        case JumpKey(_, table, chain):
            return any(jump.rule == change.old for jump in JUMPS if (jump.table, jump.chain) == (table, chain))
        case ChainKey(_, table, chain) | BlockKey(_, table, chain):
            return (table, chain) in CHAINS
        case _:
            return False


def in_place(families: Sequence[Family]) -> ProxyMode | None:
    """The mode whose rules are in the kernel; where several are, that of our own tables. Raises OSError."""
    with NftablesKernel(families) as kernel:
        tables = {type(key) for key in kernel.tables()}
    if TableKey in tables:
        return ProxyMode.NFTABLES
    for variant in Variant:
        try:
            if _families_of_ipvs(variant, families):
                return ProxyMode.IPVS
            if ours(variant, families):
                return ProxyMode.IPTABLES
        except UnsupportedError:  # whoever needs that variant will say so
            continue
    return ProxyMode.NFTABLES if tables else None


class Succession(Observer):
    """Removes what other modes left once a sync has succeeded, in a thread of its own.

    It looks again now and then: a kube-proxy that still runs puts its rules back, and leaves them when it is removed.
    Connections through ipvs mode may last for `drain_seconds`, and until the look after that. `wait` is given the
    seconds until the next look, and returns true when there shall be none. `excluded`, `masquerade_mark`: see `places`.
    """

    def __init__(
        self,
        families: Sequence[Family],
        mode: ProxyMode,
        *,
        excluded: Sequence[str] = (),
        drain_seconds: float = 0.0,
        masquerade_mark: int = NodeFacts().masquerade_mark,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._families = tuple(families)
        self._mode = mode
        self._excluded = excluded
        self._drain_seconds = drain_seconds
        self._masquerade_mark = masquerade_mark
        self._wait = wait or threading.Event().wait  # for something that never happens
        self._begun = False
        self._told: set[str] = set()

    def sync_done(self, report: SyncReport, seconds: float) -> None:  # noqa: ARG002 - an observer's signature
        """See `kproxy.proxy.Observer`."""
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._run, name="succession", daemon=True).start()

    def _run(self) -> None:
        pause = FIRST_LOOK_SECONDS
        drained = time.monotonic() + self._drain_seconds
        self.remove_now(patient=self._drain_seconds > 0)
        while not self._wait(pause):
            self.remove_now(patient=time.monotonic() < drained)
            pause = min(2 * pause, LAST_LOOK_SECONDS)

    def remove_now(self, *, patient: bool = True) -> bool:
        """Remove what is there, in the calling thread. What cannot be removed is told.

        Returns whether something stays for connections through ipvs mode, which is told, too.
        """
        busy = 0
        mark = self._masquerade_mark if patient else None
        for place in places(self._families, but=self._mode, excluded=self._excluded, masquerade_mark=mark):
            try:
                found = place()
                if found:
                    found.remove()
                    busy += sum(isinstance(change.key, VirtualServerKey) for change in found.staying)
                    if found.changes:
                        log.info("removed what another mode left", mode=found.owner, entries=len(found.changes))
            except (ApplyError, UnsupportedError, OSError, ValueError) as error:
                if str(error) not in self._told:
                    self._told.add(str(error))
                    log.warning("what another mode left stays for now", error=str(error))
        if busy:
            log.info(
                "virtual servers of ipvs mode stay while they have connections, and what guards them", servers=busy
            )
        return busy > 0
