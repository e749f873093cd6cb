"""The kernel side of the iptables mode: read what it holds of ours, and change it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import structlog

from kproxy.dataplane.base import ApplyError, Change, Entries, Key, UnsupportedError, Value
from kproxy.dataplane.iptables import commands, digest, localhost
from kproxy.dataplane.iptables.accounting import ensure_counters
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey, JumpKey, SettingKey, concerns_us, entries_of
from kproxy.dataplane.iptables.journal import Journal
from kproxy.dataplane.iptables.legacy import InProcess
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.probe import Features, probe
from kproxy.dataplane.iptables.refusal import RefusedError, refusal
from kproxy.dataplane.iptables.restore import BULK_CHAINS, TABLES, Commit, commits
from kproxy.dataplane.iptables.rule import AnyRule
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.model import Family
from kproxy.sysctl import SysctlError, current
from kproxy.sysctl import apply as apply_settings

# More commands iptables-restore carries out sooner. With more rules it takes as long, but not this process's memory.
# Figures are in docs/decisions.md.
IN_PROCESS_COMMANDS = 150
IN_PROCESS_RULES = 30_000

log = structlog.get_logger(__name__)


class IptablesKernel:
    """Our chains in the network namespace of the calling thread, in one variant of iptables.

    `guards_localhost`: the rules of KUBE-FIREWALL are ours to write in IPv4, and not kubelet's alone.
    """

    def __init__(self, families: Sequence[Family], variant: Variant, *, guards_localhost: bool) -> None:
        self.families = tuple(families)
        self.variant = variant
        self.journal = Journal(variant, self.families)
        self.has_read = False
        self.counters: frozenset[str] = frozenset()  # nfacct objects that rules refer to, so that they must be there
        # For metrics: rules of ours; those written last; writes that were refused, and of them those of a part only.
        self.rules: Counter[tuple[Family, Table]] = Counter()
        self.written: Counter[tuple[Family, Table]] = Counter()
        self.refused: Counter[Family] = Counter()
        self.refused_parts: Counter[Family] = Counter()
        self._is_part = False  # what is written now was not compared with all that there is
        self._guards_localhost = guards_localhost
        self._in_process: dict[Family, InProcess] = {}

    def probe(self, *, makes_tables: bool = True) -> Features:
        """Try all that the mode needs. Raises UnsupportedError and OSError.

        It leaves no trace but legacy tables, which trying makes; if it may not, only those that are there are tried.
        """
        features = probe(self.variant, self.families, makes_tables=makes_tables)
        if self.variant is Variant.LEGACY and makes_tables:
            family = self.families[0]  # python-iptables works for one in a process
            try:
                self._in_process[family] = InProcess(family)
            except UnsupportedError as error:
                log.warning(
                    "legacy iptables: python-iptables does not work here, so all goes through iptables-legacy-restore",
                    reason=str(error),
                )
        return features

    # --- reading ---

    def read(self) -> Entries:
        """What the kernel holds of ours. Changes nothing, takes no lock. Raises OSError."""
        self.journal.reads()
        entries = self._read(self.families, None)
        self.has_read = True
        self._is_part = False
        self.rules = _rules(entries.items())
        if self._guards_localhost and (value := current(localhost.ROUTE_LOCALNET.path)):
            entries[localhost.ROUTE_LOCALNET] = value
        return entries

    def _read(self, families: Iterable[Family], tables: Iterable[Table] | None) -> Entries:
        entries: Entries = {}
        for family in families:
            if self.variant is Variant.LEGACY and not legacy_tables(family):
                continue  # asking for a legacy table makes it
            saved = commands.save(self.variant, family, tables)
            if self.variant is Variant.LEGACY and tables is None:
                self.journal.holds[family] = digest.of_saved(saved)
            guards = self._guards_localhost and family is Family.IPv4
            entries.update(entries_of(family, parse_tables(saved, family), guards_localhost=guards))
        return entries

    # --- writing ---

    def apply(self, changes: Iterable[Change]) -> None:
        """Make the changes: a commit for each table, IPv4 and filter first. Raises ApplyError.

        Where one is refused, what is in force already is taken back, so that nothing of the changes is.
        """
        by_family: defaultdict[Family, list[Change]] = defaultdict(list)
        settings: list[tuple[SettingKey, object]] = []
        for change in changes:
            if isinstance(change.key, SettingKey):
                settings.append((change.key, change.new))
            else:
                by_family[_family(change)].append(change)
        if self.counters:
            ensure_counters(sorted(self.counters))
        try:
            with self.journal.writing():
                self._apply(by_family)
                if self.variant is Variant.LEGACY:
                    self.journal.holds.update({f: digest.of_changes(part) for f, part in by_family.items()})
        except OSError as error:
            raise ApplyError(f"iptables: {error}", transient=True) from error
        changed = [change for of_family in by_family.values() for change in of_family]
        self.rules.update(_rules((change.key, change.new) for change in changed))
        self.rules.subtract(_rules((change.key, change.old) for change in changed))
        self.written = _rules((change.key, change.new) for change in changed)
        self._is_part = True
        for key, value in settings:
            self._set(key, value)

    def _set(self, key: SettingKey, value: object) -> None:
        """Write a setting that rules in force rely on. Without it they do less, so a failure is told and no more."""
        try:
            if value is None or localhost.is_guarded(self._read([Family.IPv4], ["filter"])):
                apply_settings([localhost.setting(key, value)])
            else:
                log.warning("node ports on localhost do not work: KUBE-FIREWALL is not in place to guard them")
        except (OSError, SysctlError) as error:
            log.warning("node ports on localhost stay as they are", error=str(error))

    def _apply(self, by_family: Mapping[Family, list[Change]]) -> None:
        done: list[Change] = []
        for family, of_family in sorted(by_family.items()):
            try:
                self._write(family, of_family)
            except RefusedError as error:
                self.refused[family] += 1
                self.refused_parts[family] += self._is_part
                if error.committed:
                    done += of_family
                if done:
                    self._take_back(done, error)
                raise ApplyError(str(error), error.culprits, transient=error.transient) from error
            done += of_family

    def _write(self, family: Family, changes: Sequence[Change]) -> None:
        """Make changes of one family. Raises RefusedError."""
        bulk = BULK_CHAINS if self.variant is Variant.NFT else None
        planned = commits(changes, bulk_chains=bulk)
        size = sum(len(commit.commands) for commit in planned)
        in_process = self._in_process.get(family)
        small = size <= IN_PROCESS_COMMANDS and self._rules_of(family) <= IN_PROCESS_RULES
        if in_process and small and in_process.can_express(planned):
            in_process.write(planned)
        else:
            self._restore(family, planned)
        self.journal.wrote(len(planned))

    def _rules_of(self, family: Family) -> int:
        return sum(self.rules[family, table] for table in TABLES)

    def _restore(self, family: Family, planned: Sequence[Commit]) -> None:
        given = list(commands.lines(planned))
        done = commands.restore(self.variant, family, given)
        if done.returncode:
            raise refusal(commands.program(self.variant, family, "restore"), done.stderr, given)

    def _take_back(self, changes: Sequence[Change], why: RefusedError) -> None:
        """Put things back as they were before changes of which some are in force."""
        families = {_family(change) for change in changes}
        try:
            actual = self._read(families, None)
            back = [Change(c.key, actual.get(c.key), c.old) for c in changes if actual.get(c.key) != c.old]
            for family in sorted(families):
                self._write(family, [change for change in back if _family(change) is family])
        except (RefusedError, OSError) as error:
            raise ApplyError(f"{why}\nand what is in force cannot be taken back: {error}", transient=True) from error


def parse_tables(saved: str, family: Family) -> dict[Table, dict[str, list[AnyRule]]]:
    """The chains that concern us, with their rules, of what iptables-save printed."""
    tables: dict[Table, dict[str, list[AnyRule]]] = {}
    for table, chain, rule in commands.sections(saved):
        if not concerns_us(table, chain):
            continue
        chains = tables.setdefault(table, {})
        if rule is None:
            chains[chain] = []
        else:
            chains[chain].append(parse_rule(rule, family))
    return tables


def _family(change: Change) -> Family:
    match change.key:
        case ChainKey(family) | BlockKey(family) | JumpKey(family):
            return family
        case _:
            raise TypeError(f"{change.key!r} is no key of iptables mode")


def _rules(entries: Iterable[tuple[Key, Value | None]]) -> Counter[tuple[Family, Table]]:
    """How many rules entries have."""
    count: Counter[tuple[Family, Table]] = Counter()
    for key, value in entries:
        match key:
            case ChainKey(family, table) | BlockKey(family, table) if isinstance(value, tuple):
                count[family, table] += len(value)
            case JumpKey(family, table) if value is not None:
                count[family, table] += 1
            case _:
                pass
    return count
