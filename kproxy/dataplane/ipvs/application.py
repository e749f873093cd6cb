"""Changes of ipvs mode, step after step.

IPVS, interfaces, ipsets and iptables know no common transaction. So no step relies on a later one: sets and rules,
addresses, virtual servers, real servers come in this order and go in the other, but that an address goes before its
virtual servers. Each step may be repeated. Nothing goes before all that comes is there; so rules of iptables mode serve
until virtual servers can. Where the kernel refuses something for good, the rest is taken back.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kproxy.dataplane.base import ApplyError, Change, Key
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey, JumpKey
from kproxy.dataplane.iptables.refusal import RefusedError
from kproxy.dataplane.ipvs import device, ipset, names, tables
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.drain import Draining
from kproxy.dataplane.ipvs.entries import (
    AddressKey,
    DeviceKey,
    MemberKey,
    RealServerKey,
    RuleKey,
    SetKey,
    VirtualServer,
    VirtualServerKey,
)
from kproxy.dataplane.ipvs.ownership import Ownership
from kproxy.dataplane.ipvs.servers import Servers
from kproxy.model import Family, Protocol

_TRANSIENT = frozenset((errno.ENOMEM, errno.ENOBUFS, errno.EPERM, errno.EACCES, errno.EAGAIN, errno.EINTR))
_TOLD = 5  # faults that an error spells out
_FIREWALLED = frozenset(names.set_name(names.LOAD_BALANCER_FIREWALL_SET, family) for family in Family)


class Application:
    """One run of changes; gathers what was refused."""

    def __init__(self, variant: Variant, servers: Servers, ownership: Ownership, draining: Draining) -> None:
        self._variant = variant
        self._servers = servers
        self._ownership = ownership
        self._draining = draining
        self._faults: list[str] = []
        self._culprits: list[Key] = []
        self._transient = True
        self._changes: dict[Key, Change] = {}
        self._put: defaultdict[type, dict[Any, Any]] = defaultdict(dict)
        self._removed: defaultdict[type, list[Any]] = defaultdict(list)
        self._rules: defaultdict[Family, list[Change]] = defaultdict(list)
        self._old_rules: defaultdict[Family, list[Change]] = defaultdict(list)
        self._taken_over: list[VirtualServerKey] = []

    def run(self, changes: Iterable[Change]) -> None:
        """All steps. Raises ApplyError.

        If that is not transient, nothing is in force: all is as before, but for connections of servers that went. Where
        nothing was to be made, what could be removed has gone.
        """
        tried = self._carry_out(changes)
        if self._faults and not self._transient and (self._rules or any(self._put.values())):
            self._take_back(tried - set(self._culprits))
        if self._faults:
            raise ApplyError(self._text(), tuple(self._culprits), transient=self._transient)

    def _carry_out(self, changes: Iterable[Change]) -> set[Key]:
        """Make, and unless something of that is refused, remove. Returns what was tried."""
        for change in changes:
            self._changes[change.key] = change
            match change.key:
                case ChainKey(family) | RuleKey(family) | JumpKey(family):
                    (self._old_rules if change.new is None else self._rules)[family].append(change)
                case key if change.new is None:
                    self._removed[type(key)].append(key)
                case key:
                    self._put[type(key)][key] = change.new
        self._make()
        if self._faults:
            return {key for key, change in self._changes.items() if change.new is not None}
        self._remove()
        return set(self._changes)

    def _take_back(self, done: set[Key]) -> None:
        way_back = Application(self._variant, self._servers, self._ownership, self._draining)
        way_back._carry_out([Change(key, self._changes[key].new, self._changes[key].old) for key in done])
        self._ownership.removed(self._taken_over)
        if way_back._faults:
            self._fault(f"what is in force already cannot be taken back: {way_back._text()}", (), transient=True)
            self._transient = True  # so that everything is compared

    # --- steps ---

    def _make(self) -> None:
        put = self._put
        if put[SetKey]:
            self._step(ipset.make, put[SetKey], ipset.explain)
        # Who is in this set may come only from certain sources, so these have to be there before.
        self._step(ipset.add, sorted(put[MemberKey], key=_is_limit), ipset.explain)
        self._write_rules(self._rules)
        if put[DeviceKey] or (put[AddressKey] and not device.index()):  # somebody may have deleted it meanwhile
            if self._faults:
                return  # without the rules that guard it, all that listens on the node would answer on its addresses
            with self._told():
                device.make()
        self._step(device.bind, put[AddressKey])
        refused = self._step(self._put_virtual_servers, put[VirtualServerKey])
        self._ownership.wrote(put[VirtualServerKey].keys() - refused)
        real = {key: value for key, value in put[RealServerKey].items() if key.virtual_server not in refused}
        self._draining.end(real)  # what is wanted again must not be deleted, least of all if this fails
        self._step(self._servers.put, real)

    def _put_virtual_servers(self, wanted: Mapping[Any, VirtualServer]) -> Mapping[Any, int]:
        known = {key for key in wanted if self._changes[key].old is not None or key in self._ownership}
        codes = self._servers.put(wanted, known=known)
        if unknown := {key: wanted[key] for key, code in codes.items() if code == errno.EEXIST}:
            self._take_over(unknown)
            codes = {key: code for key, code in codes.items() if key not in unknown} | self._servers.put(unknown)
        return codes

    def _take_over(self, wanted: Mapping[Any, VirtualServer]) -> None:
        """What is there already is to be changed, and what it has too many to be removed.

        It is somebody else's, or was left on an address that the node did not have for a while.
        """
        present = {found.key: found.value for found in self._servers.virtual_servers()}
        for key, value in wanted.items():
            self._taken_over.append(key)
            self._changes[key] = Change(key, present.get(key), value)
            for found in self._servers.real_servers(key):
                new = self._put[RealServerKey].get(found.key)
                self._changes[found.key] = Change(found.key, found.value, new)
                if new is None:
                    self._removed[RealServerKey].append(found.key)

    def _remove(self) -> None:
        removed = self._removed
        gone = set(removed[VirtualServerKey])  # their real servers go with them
        self._retire([key for key in removed[RealServerKey] if key.virtual_server not in gone])
        # Before the virtual servers: the rules still let their ports pass, and something else may listen there.
        self._step(device.unbind, removed[AddressKey])
        gone -= self._step(self._servers.remove, gone).keys()
        self._ownership.removed(gone)
        self._draining.end_of(gone)
        self._step(ipset.delete, sorted(removed[MemberKey], key=_is_limit, reverse=True), ipset.explain)
        self._write_rules(self._old_rules)  # which may have to wait for a lock
        if removed[SetKey]:
            self._step(ipset.destroy, removed[SetKey], ipset.explain)
        if removed[DeviceKey]:
            with self._told():
                device.remove()

    def _write_rules(self, changes: Mapping[Family, list[Change]]) -> None:
        for family, of_family in sorted(changes.items()):
            with self._told():
                tables.write(self._variant, family, of_family)

    def _retire(self, keys: list[RealServerKey]) -> None:
        """Take real servers out of service: at once, or when their TCP connections have ended."""
        graceful = {key for key in keys if key.protocol is Protocol.TCP}
        graceful -= self._step(self._servers.quiesce, graceful).keys()
        with self._told():
            # Only now, as no connection can come between looking and deleting.
            busy = {key for key, count in connections_of(self._servers, graceful).items() if count}
            for key in busy:
                self._draining.begin(key)
            self._step(self._servers.remove, [key for key in keys if key not in graceful or key not in busy])

    # --- faults ---

    def _step(
        self,
        carry_out: Callable[[Any], Mapping[Any, int]],
        what: Any,
        explain: Callable[[int], str] = os.strerror,
    ) -> Mapping[Any, int]:
        """Carry out a step for several entries; the errno of each that was refused."""
        refused: Mapping[Any, int] = {}
        if what:
            with self._told():
                refused = carry_out(what)
        for key, code in refused.items():
            change = self._changes[key]
            what_it_is = describe(key, change.old if change.new is None else change.new)
            self._fault(f"{what_it_is}: {explain(code)}", (key,), transient=code in _TRANSIENT)
        return refused

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Gather the failure of a whole step."""
        try:
            yield
        except RefusedError as error:
            self._fault(str(error), error.culprits, transient=error.transient)
        except OSError as error:
            self._fault(str(error), (), transient=True)

    def _text(self) -> str:
        text = "; ".join(self._faults[:_TOLD])
        return f"{text}; and {len(self._faults) - _TOLD} more" if len(self._faults) > _TOLD else text

    def _fault(self, text: str, culprits: tuple[Key, ...], *, transient: bool) -> None:
        self._faults.append(text)
        self._culprits += culprits
        self._transient &= transient


def connections_of(servers: Servers, keys: Iterable[RealServerKey]) -> dict[RealServerKey, int]:
    """How many connections real servers have now; without those that are not there. Raises OSError."""
    wanted = set(keys)
    return {
        found.key: found.connections
        for virtual_server in {key.virtual_server for key in wanted}
        for found in servers.real_servers(virtual_server)
        if found.key in wanted
    }


def _is_limit(key: MemberKey) -> bool:
    return key.set_name in _FIREWALLED
