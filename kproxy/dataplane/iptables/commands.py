"""The iptables programs of one variant: which there are, and running them."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, cast

from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.restore import TABLES, Command, Commit
from kproxy.dataplane.iptables.xtables_lock import WAIT_SECONDS
from kproxy.model import Family

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BEGINNING = re.compile(r"^[*:]\S+", re.MULTILINE)
_READ_SECONDS = 10.0
_READ_PAUSE_SECONDS = 0.02
_INCOMPATIBLE = re.compile(r"^# Table `(\w+)' is incompatible", re.MULTILINE)


class Variant(StrEnum):
    """Which part of the kernel iptables writes to: its own tables, or those of nf_tables."""

    LEGACY = "legacy"
    NFT = "nft"

    @property
    def other(self) -> Variant:
        """The one that is not in use."""
        return Variant.NFT if self is Variant.LEGACY else Variant.LEGACY


class TornError(OSError):
    """What was read is not what there is at any time.

    While nf_tables carries out a large commit, it lists chains twice or oftener, and `iptables-save` prints them so.
    """


class Line(NamedTuple):
    """A line of what iptables-restore reads. `command` None: a table's name or COMMIT."""

    text: str
    command: Command | None


def program(variant: Variant, family: Family, action: str) -> str:
    """The name of a program, such as ip6tables-nft-save."""
    return f"{'iptables' if family is Family.IPv4 else 'ip6tables'}-{variant}-{action}"


def missing(variant: Variant, families: Iterable[Family]) -> list[str]:
    """The programs that are not there."""
    needed = [program(variant, family, action) for family in families for action in ("save", "restore")]
    return [name for name in needed if not shutil.which(name)]


def version(variant: Variant, family: Family) -> str:
    """What the programs say of their version, such as "1.8.9 (nf_tables)". Raises OSError."""
    return _run([program(variant, family, "restore"), "--version"]).stdout.rpartition(" v")[2].strip()


def save(variant: Variant, family: Family, tables: Iterable[Table] | None = None) -> str:
    """What iptables-save prints of tables; all that there are unless told. Raises OSError."""
    selections = [["--table", table] for table in tables] if tables is not None else [[]]
    return "".join(_saved(variant, family, selection) for selection in selections)


def _saved(variant: Variant, family: Family, selection: list[str]) -> str:
    name = program(variant, family, "save")
    for _ in attempts():
        done = _run([name, *selection])
        if done.returncode:
            needed = " (it takes CAP_NET_ADMIN and CAP_NET_RAW)" if "Permission denied" in done.stderr else ""
            raise OSError(f"{name}: {_reason(done)}{needed}")
        for table in _INCOMPATIBLE.findall(done.stdout):  # it is left out, and the status is 0
            if table in TABLES:
                word = "ip" if family is Family.IPv4 else "ip6"
                raise OSError(
                    f"{name}: table {table} holds what iptables cannot understand; see nft list table {word} {table}"
                )
        if not _is_torn(done.stdout):
            return done.stdout
        del done
    raise TornError(errno.EAGAIN, f"{name} prints chains twice, again and again")


def attempts(seconds: float = _READ_SECONDS) -> Iterator[bool]:
    """As often as it is worth to read again what was torn, with a pause in between; whether it is the last time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield False
        time.sleep(_READ_PAUSE_SECONDS)
    yield True


def _is_torn(saved: str) -> bool:
    """Whether a chain is there twice."""
    seen: set[str] = set()
    for begin in _BEGINNING.findall(saved):
        if begin.startswith("*"):
            seen.clear()
        elif begin in seen:
            break
        seen.add(begin)
    else:
        return False
    # Or it is a line of somebody's comment that looks like a chain.
    chains = [(table, chain) for table, chain, rule in sections(saved) if rule is None]
    return len(set(chains)) < len(chains)


def lines(commits: Iterable[Commit]) -> Iterator[Line]:
    """What iptables-restore is given."""
    for commit in commits:
        yield Line(f"*{commit.table}", None)
        for command in commit.commands:
            yield Line(str(command), command)
        yield Line("COMMIT", None)


def restore(
    variant: Variant, family: Family, given: Sequence[Line], *, test: bool = False
) -> subprocess.CompletedProcess[str]:
    """Have iptables-restore carry out the lines; `test`: only parse them. Raises OSError."""
    command = [program(variant, family, "restore"), "--noflush", f"--wait={WAIT_SECONDS:.0f}"]
    text = "".join(f"{line.text}\n" for line in given)
    return _run([*command, "--test"] if test else command, text)


def sections(saved: str) -> Iterator[tuple[Table, str, str | None]]:
    """What iptables-save printed: (table, chain, None) for a chain, (table, chain, rule) for a rule after it."""
    table: Table | None = None
    for line in _lines(saved):
        match line[:1]:
            case "-":
                if table and line.startswith("-A "):
                    _, chain, *rule = line.split(" ", 2)
                    yield table, chain, rule[0] if rule else ""
            case ":":
                if table:
                    yield table, line[1:].split(" ", 1)[0], None
            case "*":
                table = cast("Table", line[1:]) if line[1:] in TABLES else None
            case _:
                pass


def _lines(saved: str) -> Iterator[str]:
    """The lines of iptables-save; one goes on while a quotation is open, for others' comments may hold line ends."""
    begun = ""
    for line in saved.split("\n"):
        begun += line
        if begun.startswith("-A ") and _ESCAPED.sub("", begun).count('"') % 2:
            begun += "\n"
            continue
        yield begun
        begun = ""


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        # Others' comments may be any bytes.
        return subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "this program is missing; install iptables", command[0]) from error


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip() or f"exit status {done.returncode}"
