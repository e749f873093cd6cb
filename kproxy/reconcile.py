"""Brings the kernel to what the cluster's state asks for: plan, diff, apply, and what to do when it is refused.

Knows what is in place (as of the last success), so a sync looks only at the Services that changed. On doubt, what the
kernel holds is read and attributed to the Services that want it; the rest of the sync is the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Literal

import msgspec

from kproxy.cluster import ClusterState
from kproxy.dataplane.base import ApplyError, Change, Dataplane, Entries, Key, Value, diff
from kproxy.model import Family, NodeFacts, Route, ServiceName


class Summary(msgspec.Struct, frozen=True, gc=False):
    """What health checks and metrics want to know of a Service's routes."""

    # Service ports whose internal or external traffic is dropped on this node, for want of an endpoint here.
    no_local: tuple[tuple[Literal["internal", "external"], Family], ...] = ()
    health_check_port: int = 0
    ready_here: tuple[tuple[Family, int], ...] = ()  # how many addresses of ready endpoints are on this node


Kind = Literal["add", "change", "remove"]


def kind(change: Change) -> Kind:
    """What is done to the entry."""
    if change.old is None:
        return "add"
    return "remove" if change.new is None else "change"


class SyncReport(msgspec.Struct):
    """What a sync did."""

    full: bool = False  # the kernel was read and compared with everything
    services: list[ServiceName] = []  # whose entries are now as their objects ask
    changes: Counter[Kind] = msgspec.field(default_factory=Counter)  # entries written or removed
    drift: Counter[Kind] = msgspec.field(default_factory=Counter)  # of them, repairs of what someone else changed
    quarantined: dict[ServiceName, str] = {}  # newly refused Services, with the reason
    stuck: dict[Key, str] = {}  # what is nobody's and cannot be removed, with the reason


class Difference(msgspec.Struct, frozen=True):
    """What a sync would change for one Service; None, which comes last: in what several or all of them share."""

    service: ServiceName | None
    changes: list[Change]


class _Shared(msgspec.Struct):
    """An entry that several Services need."""

    value: Value
    count: int


class _Rendered(msgspec.Struct, frozen=True):
    """What a Service shall have."""

    entries: Entries
    summary: Summary


class _Plan(msgspec.Struct):
    """What some Services shall have, and the changes that takes."""

    wanted: dict[ServiceName, _Rendered]
    base: Entries | None  # None: not part of the plan
    shared: dict[Key, _Shared]  # as they will be
    changes: list[Change]


class Reconciler:
    """Owns what is in the kernel. Not thread-safe: one thread syncs, and feeds `state` between syncs."""

    def __init__(self, state: ClusterState, dataplane: Dataplane, facts: NodeFacts) -> None:
        self.state = state
        self.facts = facts
        self.quarantine: dict[ServiceName, str] = {}
        self.summaries: dict[ServiceName, Summary] = {}  # only those that differ from an empty one
        self.no_local: Counter[tuple[Literal["internal", "external"], Family]] = Counter()  # over all summaries
        self._dataplane = dataplane
        self._dirty: set[ServiceName] = set()
        self._in_doubt = True  # what is in place is not known for certain
        self._settled = False  # a full comparison has succeeded once
        self._report = SyncReport()  # what attempts that failed have done nevertheless
        self._fixed = dataplane.render_base(facts)  # what is wanted whatever the Services are
        # What is in the kernel, by who wants it:
        self._base: Entries = {}
        self._orphans: Entries = {}
        self._stuck: Entries = {}  # nobody's, and cannot be removed; tried again when everything is compared
        self._owned: dict[ServiceName, Entries] = {}
        self._shared: dict[Key, _Shared] = {}

    def doubt(self) -> None:
        """Compare with the kernel at the next sync."""
        self._in_doubt = True

    def set_facts(self, facts: NodeFacts) -> None:
        """The node is different now; what follows from it goes in with the next sync."""
        if facts == self.facts:
            return
        if self._dataplane.rerenders(self.facts, facts):
            self.state.mark_all_dirty()
        self.facts = facts
        self._fixed = self._dataplane.render_base(facts)

    def retry_quarantined(self) -> None:
        """Try the refused Services again at the next sync."""
        self._dirty.update(self.quarantine)

    @property
    def pending(self) -> bool:
        """Whether a sync has something to do."""
        return self._in_doubt or bool(self._dirty or self.state.dirty) or self._base is not self._fixed

    def plan(self) -> list[Difference]:
        """What a sync would change now. Reads the kernel; changes nothing, there or here."""
        trial = Reconciler(self.state, self._dataplane, self.facts)
        rendered = trial._adopt(self._dataplane.read())
        labels = self._dataplane.labels(trial._orphans)
        by_service: defaultdict[ServiceName, list[Change]] = defaultdict(list)
        shared: defaultdict[Key, list[tuple[ServiceName, Change]]] = defaultdict(list)
        for service, wanted in rendered.items():
            for change in diff(wanted.entries, trial._owned.get(service, {})):
                if self._dataplane.is_shared(change.key):
                    shared[change.key].append((service, change))
                else:
                    by_service[service].append(change)
        common = diff(self._fixed, trial._base)
        for lacking in shared.values():
            service, change = lacking[0]
            (by_service[service] if len(lacking) == 1 else common).append(change)
        for key, value in trial._orphans.items():
            label = labels.get(key)
            (by_service[label] if label else common).append(Change(key, value, None))
        differences = [Difference(service, changes) for service, changes in sorted(by_service.items())]
        return [*differences, Difference(None, common)] if common else differences

    def sync(self) -> SyncReport:
        """Bring the kernel up to date. Raises ApplyError (nothing forgotten: call again) and OSError."""
        self._dirty |= self.state.dirty
        self.state.dirty.clear()
        report = self._report
        report.full = self._in_doubt
        if not self._in_doubt:
            self._in_doubt = True  # if this fails: someone else may have changed what we rely on
            try:
                self._sync_dirty(report)
            except ApplyError as error:
                if error.transient:
                    raise
                report.full = True
        if report.full:
            self._sync_everything(report)
        self._in_doubt = False
        self._report = SyncReport()
        return report

    def _sync_dirty(self, report: SyncReport) -> None:
        """Bring in what has changed. A Service that was refused goes by itself: the others are not to suffer again."""
        refused = self._dirty & self.quarantine.keys()
        self._install(list(self._dirty - refused), {}, report, base=True, split=False)
        for service in refused:
            self._install([service], {}, report, base=False, split=True)

    def _sync_everything(self, report: SyncReport) -> None:
        """Compare with the kernel, and bring in what differs."""
        actual = self._dataplane.read()
        if self._settled:
            report.drift.update(self._differences(actual))
        rendered = self._adopt(actual)
        self._install(list({**rendered, **dict.fromkeys(self._dirty)}), rendered, report, base=True, split=True)
        self._settled = True

    def _differences(self, actual: Entries) -> Counter[Kind]:
        """In how many entries the kernel differs from what was last written there."""
        found: Counter[Kind] = Counter()
        present = 0
        known = (self._base, self._orphans, self._stuck, *self._owned.values())
        own = chain.from_iterable(entries.items() for entries in known)
        of_one = ((key, value) for key, value in own if key not in self._shared)
        for key, value in chain(of_one, ((key, entry.value) for key, entry in self._shared.items())):
            there = actual.get(key)
            if there is None:
                found["add"] += 1
            else:
                present += 1
                found["change"] += there != value
        found["remove"] = len(actual) - present
        return +found

    def _adopt(self, actual: Entries) -> dict[ServiceName, _Rendered]:
        """Attribute what the kernel holds to whom it belongs. Returns what Services want that differs or is dirty."""
        self._base = {key: actual.pop(key) for key in self._fixed if key in actual}
        undecided = self._dirty | self.quarantine.keys()
        before = {service: self._owned[service] for service in undecided if service in self._owned}
        self._owned, self._shared = {}, {}
        rendered = {}
        for service in self.state.services():
            if service in self.quarantine and service not in self._dirty:
                continue
            wanted = self._render(service, actual)
            owned = self._take(wanted.entries, actual)
            if owned:
                self._owned[service] = owned
            if service in self._dirty or owned != wanted.entries:
                rendered[service] = wanted
        for service, entries in before.items():  # it stays, should the Service be refused, unless others want it
            owned = self._owned.setdefault(service, {})
            owned.update(self._take({key: value for key, value in entries.items() if key not in owned}, actual))
        self._orphans = actual
        self._stuck = {}
        return rendered

    def _take(self, entries: Entries, actual: Entries) -> Entries:
        """What the kernel holds of a Service's entries. It is taken out of `actual`; others may share it."""
        owned: Entries = {}
        for key, value in entries.items():
            if key in self._shared:
                owned[key] = value
                self._shared[key].count += 1
            elif key in actual:
                found = actual.pop(key)
                owned[key] = value if found == value else found
                if self._dataplane.is_shared(key):
                    self._shared[key] = _Shared(found, 1)
        return owned

    def _render(self, service: ServiceName, present: Mapping[Key, Value]) -> _Rendered:
        routes = self.state.routes(service)
        entries: Entries = {}
        for route in routes:
            entries.update(self._dataplane.render_route(route, self.facts, present))
        return _Rendered(entries, summarise(routes))

    def _plan(self, services: Iterable[ServiceName], rendered: Mapping[ServiceName, _Rendered], *, base: bool) -> _Plan:
        old: Entries = {}
        new: Entries = {}
        counts: defaultdict[Key, int] = defaultdict(int)
        values: Entries = {}
        wanted = {}
        for service in services:
            before = self._owned.get(service, {})
            wanted[service] = rendered.get(service) or self._render(service, before)
            for key, value in before.items():
                if key in self._shared:
                    counts[key] -= 1
                else:
                    old[key] = value
            for key, value in wanted[service].entries.items():
                if self._dataplane.is_shared(key):
                    counts[key] += 1
                    values[key] = value
                else:
                    new[key] = value
        if base and (self._base is not self._fixed or self._orphans):
            old |= self._base | self._orphans
            new |= self._fixed
        changes = diff(new, old)
        shared = {}
        for key, count in counts.items():
            known = self._shared.get(key)
            value = values.get(key, known.value if known else None)
            shared[key] = _Shared(value, count + (known.count if known else 0))
            if shared[key].count == 0:
                if known:
                    changes.append(Change(key, known.value, None))
            elif known is None or known.value != value:
                changes.append(Change(key, known.value if known else None, value))
        return _Plan(wanted, self._fixed if base else None, shared, changes)

    def _install(
        self,
        services: list[ServiceName],
        rendered: Mapping[ServiceName, _Rendered],
        report: SyncReport,
        *,
        base: bool,
        split: bool,
    ) -> None:
        """Apply in one transaction. Where that is refused and `split`: in halves, until the culprit is alone."""
        plan = self._plan(services, rendered, base=base)
        try:
            if plan.changes:
                self._dataplane.apply(plan.changes)
        except ApplyError as error:
            if error.transient or not split:
                raise
            if base:
                if not services:
                    if not self._orphans:
                        raise
                    self._install_without_orphans(report)
                    return
                # What is nobody's any more may be in use until the last Service has changed: a chain, say.
                shared = {key: value for key, value in self._orphans.items() if self._dataplane.is_shared(key)}
                self._orphans = {key: value for key, value in self._orphans.items() if key not in shared}
                try:
                    self._install([], {}, report, base=True, split=True)
                    self._install(services, rendered, report, base=False, split=True)
                finally:
                    self._orphans |= shared
                self._install([], {}, report, base=True, split=True)
            elif len(services) == 1:
                self._refuse(services[0], str(error), report)
            else:
                for part in self._parts(services, plan, error.culprits):
                    self._install(part, rendered, report, base=False, split=True)
        else:
            report.changes.update(map(kind, plan.changes))
            report.services.extend(services)
            self._commit(plan)

    def _install_without_orphans(self, report: SyncReport) -> None:
        """Apply the base, then remove what is nobody's as far as that is possible: somebody else may hold on to it."""
        orphans, self._orphans = self._orphans, {}
        try:
            self._install([], {}, report, base=True, split=True)
        except (ApplyError, OSError):
            self._orphans = orphans
            raise
        parts = [list(orphans.items())]
        while parts:
            part = parts.pop()
            try:
                self._dataplane.apply([Change(key, value, None) for key, value in part])
                report.changes["remove"] += len(part)
            except ApplyError as error:
                if error.transient:
                    raise
                if len(part) == 1:
                    report.stuck[part[0][0]] = str(error)
                    self._stuck.update(part)
                else:
                    parts += [part[: len(part) // 2], part[len(part) // 2 :]]

    def _parts(
        self, services: list[ServiceName], plan: _Plan, culprits: tuple[Key, ...]
    ) -> tuple[list[ServiceName], list[ServiceName]]:
        suspects = [s for s in services if any(key in plan.wanted[s].entries for key in culprits)]
        if 0 < len(suspects) < len(services):
            return [s for s in services if s not in set(suspects)], suspects
        middle = len(services) // 2
        return services[:middle], services[middle:]

    def _refuse(self, service: ServiceName, reason: str, report: SyncReport) -> None:
        """Leave a Service as it is in the kernel until its objects change or it is tried again."""
        if service not in self.quarantine:
            report.quarantined[service] = reason
        self.quarantine[service] = reason
        self._dirty.discard(service)

    def _commit(self, plan: _Plan) -> None:
        for service, wanted in plan.wanted.items():
            if wanted.entries:
                self._owned[service] = wanted.entries
            else:
                self._owned.pop(service, None)
            self.quarantine.pop(service, None)
            self._dirty.discard(service)
            before = self.summaries.pop(service, None)
            if before:
                self.no_local.subtract(before.no_local)
            if wanted.summary != Summary():
                self.summaries[service] = wanted.summary
                self.no_local.update(wanted.summary.no_local)
        for key, entry in plan.shared.items():
            if entry.count:
                self._shared[key] = entry
            else:
                self._shared.pop(key, None)
        if plan.base is not None:
            self._base = plan.base
            self._orphans = {}


def summarise(routes: Iterable[Route]) -> Summary:
    """The summary of a Service from its routes."""
    no_local: list[tuple[Literal["internal", "external"], Family]] = []
    port = 0
    ready: defaultdict[Family, set[str]] = defaultdict(set)
    for route in routes:
        service_port = route.service_port
        if route.has_any and not route.local:
            if service_port.internal_local:
                no_local.append(("internal", service_port.family))
            if service_port.external_local and service_port.externally_accessible:
                no_local.append(("external", service_port.family))
        if service_port.health_check_node_port:
            port = service_port.health_check_node_port
            ready[service_port.family].update(route.ready_here)
    return Summary(tuple(no_local), port, tuple((family, len(addresses)) for family, addresses in ready.items()))
