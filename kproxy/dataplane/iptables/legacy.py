"""Legacy tables through python-iptables: libiptc in this process reads a table, edits it and commits it at once.

For a few rules this saves starting a program. For many it does not pay (0.25 ms a rule; docs/decisions.md).

What python-iptables does not do, or does in a way that does not suit a daemon, is done here:
- it takes no lock, so the xtables lock is taken round reading and committing;
- its check of a finished rule writes to the process's standard output and reads that back, so the check is called on
  the extensions themselves;
- to tell whether a target is a chain it opens, and so makes, every table there is, unless it believes to know which
  there are;
- its tables are one per process and outlive a network namespace, so they are opened for each write and closed after it.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.probe import SCRATCH, needed_rules
from kproxy.dataplane.iptables.refusal import RefusedError
from kproxy.dataplane.iptables.restore import Command, Commit
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Conntrack,
    Dnat,
    Jump,
    MarkMatch,
    Masquerade,
    Match,
    Nfacct,
    NotBridged,
    Recent,
    Reject,
    Rule,
    SetMark,
    SetMatch,
    Statistic,
    Target,
    Transport,
    VirtualServerMatch,
)
from kproxy.dataplane.iptables.xtables_lock import LockedError, lock_path, xtables_lock
from kproxy.model import Family

_ATTEMPTS = 10  # to commit a table that others, who hold no lock, change meanwhile
_ALL_TABLES = ("filter", "mangle", "raw", "nat", "security")
_LIBRARY = threading.Lock()  # the library keeps one object for a table, whoever uses it


class InProcess:
    """Writes legacy tables of one family from this process. Raises UnsupportedError where the library cannot do it.

    Of 1.2.0 it is known that it cannot with libxtables 1.8.11 (a structure has grown), and that it can do only the
    first family in a process (the extension of DNAT and MASQUERADE is loaded once, for the family that asks first).
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the library's age: distutils, escapes in its patterns
                self._iptc: ModuleType = importlib.import_module("iptc")
        except Exception as error:
            raise UnsupportedError(f"python-iptables cannot be loaded: {error or type(error).__name__}") from error
        for table, rules in needed_rules(family).items():
            try:
                self._try(table, rules)
            except _FailedError as error:
                raise UnsupportedError(f"python-iptables cannot build {error}") from error

    def can_express(self, commits: Sequence[Commit]) -> bool:
        """Whether all rules are of kinds that are known here."""
        return all(c.rule is None or isinstance(c.rule, Rule) for commit in commits for c in commit.commands)

    def write(self, commits: Sequence[Commit]) -> None:
        """Carry out the commits, each in one piece. Raises RefusedError."""
        for position, commit in enumerate(commits):
            try:
                with xtables_lock(lock_path()), _LIBRARY:
                    self._commit(commit)
            except (LockedError, OSError) as error:
                raise RefusedError(f"legacy iptables: {error}", (), transient=True, committed=position > 0) from error
            except _FailedError as error:
                raise RefusedError(
                    f"legacy iptables: table {commit.table}: {error}",
                    () if error.command is None else (error.command.key,),
                    transient=error.command is None and error.number in _TRANSIENT,
                    committed=position > 0,
                ) from error

    def _try(self, name: Table, rules: Sequence[Rule]) -> None:
        """Put rules into a table and leave it at that: nothing is committed."""
        with _LIBRARY:
            table = self._open(name)
            try:
                for command in [Command(":", SCRATCH, None), *(Command("-A", SCRATCH, None, r) for r in rules)]:
                    self._carry_out(table, command)
            finally:
                table.close()

    def _commit(self, commit: Commit) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            table = self._open(commit.table)
            try:
                for command in commit.commands:
                    self._carry_out(table, command)
                try:
                    table.commit()
                except self._iptc.IPTCError as error:
                    number = _errno(str(error))
                    if number == errno.EAGAIN and attempt < _ATTEMPTS:
                        continue
                    raise _FailedError(str(error), None, number) from error
            finally:
                table.close()
            return

    def _open(self, name: Table) -> Any:
        """A table as it is now."""
        kind = self._iptc.Table if self._family is Family.IPv4 else self._iptc.Table6
        kind.existing_table_names.update({other: other == name for other in _ALL_TABLES})
        try:
            table = kind(name, autocommit=False)
            table.refresh()
        except self._iptc.IPTCError as error:
            raise _FailedError(str(error), None, _errno(str(error))) from error
        return table

    def _carry_out(self, table: Any, command: Command) -> None:
        chain = command.chain
        try:
            match command:
                case Command(":"):
                    if table.is_chain(chain):
                        table.flush_entries(chain)
                    else:
                        table.create_chain(chain)
                case Command("-X"):
                    table.delete_chain(chain)
                case Command(verb, _, _, Rule() as rule):
                    built = self._build(rule)
                    if verb == "-A":
                        table.append_entry(chain, built.rule)
                    elif verb == "-I":
                        table.insert_entry(chain, built.rule, 0)
                    else:
                        entry = built.rule
                        table.delete_entry(chain, entry, built.mask)
        except Exception as error:
            raise _FailedError(f"`{command}`: {error or type(error).__name__}", command, None) from error

    def _build(self, rule: Rule) -> Any:
        built = self._iptc.Rule() if self._family is Family.IPv4 else self._iptc.Rule6()
        if rule.source:
            built.src = _inverted(rule.source.cidr, rule.source.inverted)
        if rule.destination:
            built.dst = _inverted(rule.destination.cidr, rule.destination.inverted)
        if rule.in_interface:
            built.in_interface = _inverted(rule.in_interface.name, rule.in_interface.inverted)
        if rule.protocol:
            built.protocol = rule.protocol
        for match in rule.matches:
            name, options = _match(match)
            extension = built.create_match(name)
            for option, value in options.items():
                extension.set_parameter(option, value)
            extension._final_check()
        name, options = _target(rule.target)
        target = built.create_target(name)
        for option, value in options.items():
            target.set_parameter(option, value)
        target._final_check()
        return built


_TRANSIENT = frozenset((errno.EAGAIN, errno.ENOMEM, errno.EPERM, errno.EBUSY))
_BYTES = re.compile(r"b'([^']*)'")  # how the library prints what libiptc says
_ERRNO = {os.strerror(number): number for number in _TRANSIENT}


class _FailedError(Exception):
    """A command could not be carried out; None: the table as a whole."""

    def __init__(self, message: str, command: Command | None, number: int | None) -> None:
        super().__init__(_BYTES.sub(r"\1", message))
        self.command = command
        self.number = number


def _errno(message: str) -> int | None:
    """The library tells errors only in words."""
    return next((number for words, number in _ERRNO.items() if words in message), None)


def _inverted(value: str, inverted: bool) -> str:
    return f"!{value}" if inverted else value


def _match(match: Match) -> tuple[str, Mapping[str, str | list[str]]]:
    """The extension of a match, with its options."""
    match match:
        case Comment(text):
            return "comment", {"comment": text}
        case Conntrack(states, inverted):
            return "conntrack", {"ctstate": _inverted(states, inverted)}
        case AddressType(source, destination, inverted):
            kinds = {"src-type": _inverted(source, inverted), "dst-type": destination}
            return "addrtype", {option: kind for option, kind in kinds.items() if kind}
        case MarkMatch(value, mask, inverted):
            return "mark", {"mark": _inverted(f"{value:#x}/{mask:#x}", inverted)}
        case Statistic():
            return "statistic", {"mode": "random", "probability": str(match).rpartition(" ")[2]}
        case Recent(name, mask, seconds):
            how = {"rcheck": "", "seconds": str(seconds), "reap": ""} if seconds else {"set": ""}
            return "recent", {**how, "name": name, "mask": mask, "rsource": ""}
        case Nfacct(name):
            return "nfacct", {"nfacct-name": name}
        case Transport(protocol, port):
            return protocol, {"dport": str(port)} if port else {}
        case SetMatch(name, parts):
            return "set", {"match-set": [name, parts]}
        case NotBridged():
            return "physdev", {"physdev-is-in": "!"}
        case VirtualServerMatch(protocol, address, port):
            return "ipvs", {"vproto": protocol, "vaddr": address, "vport": str(port)}


def _target(target: Target | None) -> tuple[str, dict[str, str]]:
    """The extension of a target, with its options. No target is one without a name."""
    match target:
        case None:
            return "", {}
        case Jump(to):
            return to, {}
        case Dnat(destination):
            return "DNAT", {"to-destination": destination}
        case SetMark(value, mask):
            return "MARK", {"set-xmark": f"{value:#x}/{mask:#x}"}
        case Masquerade(random_fully):
            return "MASQUERADE", {"random-fully": ""} if random_fully else {}
        case Reject(reply):
            return "REJECT", {"reject-with": reply}
