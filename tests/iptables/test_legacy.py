"""Legacy tables from within the process, with python-iptables."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kproxy.dataplane.base import ApplyError, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.dataplane.iptables.legacy import InProcess
from kproxy.dataplane.iptables.probe import needed_rules
from kproxy.dataplane.iptables.refusal import RefusedError, refusal
from kproxy.dataplane.iptables.restore import Command, Commit
from kproxy.dataplane.iptables.rule import Jump, Rule
from kproxy.dataplane.iptables.xtables_lock import LockedError, xtables_lock
from kproxy.model import Family
from tests.iptables.conftest import Host, OpenHost
from tests.iptables.services import BOTH, entries, plain
from tests.lab.namespaces import Namespace

CHAIN = "KUBE-SVC-LEGACY"


@pytest.fixture
def library(netns: Namespace) -> InProcess:
    return netns.run(InProcess, Family.IPv4)


@pytest.fixture
def legacy(open_host: OpenHost) -> Host:
    return open_host(Variant.LEGACY)


def saved(netns: Namespace) -> list[str]:
    text = netns.run(commands.save, Variant.LEGACY, Family.IPv4)
    return [f"{chain} {rule}" for _, chain, rule in commands.sections(text) if rule is not None]


def test_every_kind_of_rule_is_what_iptables_would_have_made_of_it(netns: Namespace, library: InProcess) -> None:
    for table, rules in needed_rules(Family.IPv4).items():
        made = [Command(":", CHAIN, None), *(Command("-A", CHAIN, None, rule) for rule in rules)]
        netns.run(library.write, [Commit(table, made)])
        assert [line.rstrip() for line in saved(netns)] == [f"{CHAIN} {rule}" for rule in rules]
        gone = [*(Command("-D", CHAIN, None, rule) for rule in reversed(rules)), Command("-X", CHAIN, None)]
        netns.run(library.write, [Commit(table, gone)])
        assert saved(netns) == []


def test_a_table_that_nobody_asked_for_is_not_made(netns: Namespace, library: InProcess) -> None:
    netns.run(library.write, [Commit("nat", [Command(":", CHAIN, None)])])
    tables = netns.run(Path("/proc/thread-self/net/ip_tables_names").read_text).split()
    assert set(tables) == {"nat", "filter"}  # the latter for the library's test


def test_a_command_that_cannot_be_carried_out_leaves_its_table_as_it_is(netns: Namespace, library: InProcess) -> None:
    wrong = [
        Command(":", CHAIN, "the chain"),
        Command("-D", CHAIN, "the culprit", Rule((), Jump("ACCEPT"))),
    ]
    with pytest.raises(RefusedError, match="-D KUBE-SVC-LEGACY -j ACCEPT") as caught:
        netns.run(library.write, [Commit("nat", wrong)])
    assert caught.value.culprits == ("the culprit",)
    assert not caught.value.transient
    assert not caught.value.committed
    assert CHAIN not in netns.run(commands.save, Variant.LEGACY, Family.IPv4)


def test_changes_of_another_program_between_two_of_ours_are_kept(legacy: Host) -> None:
    legacy.bring_to(entries(families=(Family.IPv4,)))
    legacy.iptables("-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.9", "-j", "ACCEPT")
    wanted = entries(plain(Family.IPv4, 1, 1), families=(Family.IPv4,))
    legacy.bring_to(wanted)
    assert diff(wanted, legacy.read()) == []
    assert any("192.0.2.9" in line for line in legacy.saved())


def test_two_writers_at_the_same_time_lose_nothing(legacy: Host) -> None:
    script = "for i in $(seq 30); do iptables-legacy --wait -t nat -A OUTPUT -d 192.0.2.$i -j ACCEPT || exit 1; done"
    other = legacy.netns.start(["sh", "-c", script])
    for count in range(12):
        wanted = entries(*(plain(Family.IPv4, n, n) for n in range(count)), families=(Family.IPv4,))
        legacy.bring_to(wanted)
    assert other.wait(timeout=30) == 0
    assert diff(wanted, legacy.read()) == []
    assert sum("192.0.2." in line for line in legacy.saved()) == 30


def test_what_goes_to_standard_output_meanwhile_is_not_swallowed(
    netns: Namespace, library: InProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()
    written = []

    def write() -> None:
        while not stop.is_set():
            written.append(os.write(1, b"x"))

    writer = threading.Thread(target=write)
    writer.start()
    rules = needed_rules(Family.IPv4)["nat"] * 5
    commit = Commit("nat", [Command(":", CHAIN, None), *(Command("-A", CHAIN, None, r) for r in rules)])
    try:
        netns.run(library.write, [commit])
    finally:
        stop.set()
        writer.join()
    assert capfd.readouterr().out.count("x") == len(written)


def test_where_the_library_does_not_work_one_warning_tells_why_and_iptables_restore_does_it(netns: Namespace) -> None:
    # The library can do the first family of a process only; here that is IPv4.
    netns.run(InProcess, Family.IPv4)
    kernel = netns.run(lambda: IptablesKernel(BOTH[::-1], Variant.LEGACY, guards_localhost=True))
    with capture_logs() as logged:
        netns.run(kernel.probe)
    assert [entry["log_level"] for entry in logged] == ["warning"]
    assert "python-iptables" in logged[0]["reason"]
    wanted = entries(plain(Family.IPv6, 1, 1))
    netns.run(kernel.apply, diff(wanted, {}))
    assert diff(wanted, netns.run(kernel.read)) == []


def test_the_lock_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    lock = tmp_path / "xtables.lock"
    with xtables_lock(lock), pytest.raises(LockedError, match=r"xtables\.lock"), xtables_lock(lock, 0.05):
        pass
    with xtables_lock(lock, 0):
        pass


def test_a_lock_that_iptables_could_not_get_is_nobodys_fault(netns: Namespace, tmp_path: Path) -> None:
    given = list(commands.lines([Commit("nat", [Command(":", CHAIN, "a key")])]))
    lock = tmp_path / "xtables.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = netns.run(
            subprocess.run,
            ["iptables-legacy-restore", "--noflush", "--wait=1"],
            input="".join(f"{line.text}\n" for line in given),
            env={**os.environ, "XTABLES_LOCKFILE": str(lock)},
            capture_output=True,
            text=True,
            check=False,
        )
    error = refusal("iptables-legacy-restore", done.stderr, given)
    assert done.returncode == 4
    assert error.transient
    assert error.culprits == ()


def test_of_many_rules_the_one_that_was_refused_is_shown(legacy: Host) -> None:
    legacy.bring_to(entries(families=(Family.IPv4,)))
    before = legacy.saved()
    wanted = entries(*(plain(Family.IPv4, n, n) for n in range(60)), families=(Family.IPv4,))  # not for python-iptables
    culprit = ChainKey(Family.IPv4, "nat", "KUBE-SVC-AAAAAAAAAAAAAAAA")
    wanted[culprit] = (Rule((), Jump("KUBE-SEP-BBBBBBBBBBBBBBBB")),)
    with pytest.raises(ApplyError, match=r"> .*: -A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-BBBBBBBBBBBBBBBB") as caught:
        legacy.bring_to(wanted)
    assert caught.value.culprits == (culprit,)
    assert legacy.saved() == before
