"""Somebody else changes our tables under a running proxy: all is put right within a second, and it is told."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kproxy.dataplane.nftables.features import Features
from tests.lab.namespaces import CommandError, Namespace
from tests.lab.proxy_process import ProxyProcess
from tests.lab.waiting import eventually
from tests.reconcile.conftest import MakePart
from tests.reconcile.driven import part
from tests.reconcile.objects import endpoints, services, sticky, web
from tests.reconcile.one_node import OneNode

WITHOUT_OWNER = Features(owner=False, destroy=True)
FOREIGN = "table inet others {\n\tchain input {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n}\n"


def rules(here: OneNode) -> list[str]:
    """What is in our tables, as nft lists it; in no order, for what is made anew comes last."""
    tables = here.nft("list tables").splitlines()
    ours = [here.nft(f"list {table}") for table in tables if table in ("table ip kproxy", "table ip6 kproxy")]
    text = re.sub(r"^table ip6? kproxy \{.*\n(\tflags.*\n)?\tcomment.*\n", "\n\n", "".join(ours), flags=re.MULTILINE)
    return sorted(filter(None, (block.strip("}\n") for block in text.split("\n\n"))))


class Tables:
    """A running proxy and what its tables should be."""

    def __init__(self, here: OneNode, proxy: ProxyProcess) -> None:
        self.here, self.proxy = here, proxy
        self.wanted = rules(here)

    def drift(self) -> dict[str, float]:
        scraped = self.proxy.scrape()
        return {found: scraped[f'kproxy_drift_detected_total{{found="{found}"}}'] for found in _FOUND}


_FOUND = ("missing", "changed", "foreign")


@contextmanager
def anybody_may_change(folder: Path) -> Iterator[Tables]:
    """Tables without an owner, as kernels before 6.9 have them, beside somebody else's; and their proxy."""
    with OneNode(folder) as here:
        older = part(here.host.namespace, features=WITHOUT_OWNER)
        older.sync()
        older.kernel.close()
        here.host.namespace.command("nft", "-f", "-", stdin=FOREIGN)
        here.api.put_all([*web(), *sticky("shop", "10.96.0.20"), *services(20)])
        yield Tables(here, here.started())


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tables]:
    with anybody_may_change(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture
def fresh_tables(tmp_path: Path) -> Iterator[Tables]:
    """For those who replace a table: the new one has an owner."""
    with anybody_may_change(tmp_path) as made:
        yield made


CHANGES = {
    "an element is deleted": ("delete element ip kproxy services { 10.96.0.10 . tcp . 80 }", "missing"),
    "an element is added": ("add element ip kproxy no-endpoints { 192.0.2.1 . udp . 53 : drop }", "foreign"),
    "an endpoint is replaced": (
        (
            "delete element ip kproxy endpoints { 10.96.0.10 . tcp . 80 . 0 };"
            " add element ip kproxy endpoints { 10.96.0.10 . tcp . 80 . 0 : 192.0.2.9 . 9 }"
        ),
        "changed",
    ),
    "a map is emptied": ("flush map ip kproxy endpoints", "missing"),
    "a chain is emptied": ("flush chain ip kproxy nat-prerouting", "changed"),
    "a rule is inserted": ("insert rule ip kproxy services counter accept", "changed"),
    "a rule is added in IPv6": ("add rule ip6 kproxy filter-forward drop", "changed"),
    "a chain is added": ("add chain ip kproxy theirs { type filter hook forward priority 5; policy drop; }", "foreign"),
    "a set is added": ("add set ip kproxy theirs { type ipv4_addr; }", "foreign"),
    "a chain is deleted": ("flush chain ip kproxy filter-input; delete chain ip kproxy filter-input", "missing"),
}
LOSSES = {
    "a table is made dormant": ("add table ip kproxy { flags dormant; }", ""),
    "a table is deleted": ("delete table ip kproxy", "missing"),
    "everything is deleted": (f"flush ruleset; {FOREIGN}", "missing"),
}


@pytest.mark.parametrize(("command", "found"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_repaired_within_a_second(tables: Tables, command: str, found: str):
    is_repaired(tables, command, found)


@pytest.mark.parametrize(("command", "found"), LOSSES.values(), ids=LOSSES)
def test_a_lost_table_is_made_anew_within_a_second(fresh_tables: Tables, command: str, found: str):
    is_repaired(fresh_tables, command, found)


def is_repaired(open_tables: Tables, command: str, found: str) -> None:
    here, before = open_tables.here, open_tables.drift()
    others = here.nft("list table inet others")

    begin = time.monotonic()
    here.host.namespace.command("nft", "-f", "-", stdin=command.replace("; ", "\n", 2) + "\n")
    eventually(lambda: rules(here) == open_tables.wanted, "it is repaired", seconds=3)
    assert time.monotonic() - begin < 1

    def counted() -> bool:
        return sum(open_tables.drift().values()) > sum(before.values())

    eventually(counted, "the metric tells")
    if found:
        assert open_tables.drift()[found] > before[found]
    assert here.nft("list table inet others") == others
    assert open_tables.proxy.running


def test_it_is_told_by_an_event_and_in_the_log(tables: Tables):
    here = tables.here
    logged = tables.proxy.log.read_text().count("repaired what someone else had changed in the kernel")
    here.nft("delete element ip kproxy services { 10.97.0.3 . tcp . 80 }")
    eventually(lambda: rules(here) == tables.wanted, "it is repaired")
    [event] = [e for e in eventually(lambda: here.events("DriftRepaired"), "Event") if e["note"] == "1 missing entries"]
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Node", "here")
    said = tables.proxy.log.read_text()
    assert said.count("repaired what someone else had changed in the kernel") == logged + 1
    assert "by=nft" in said or '"by": "nft' in said


def test_our_own_changes_and_those_of_others_elsewhere_are_no_drift(tables: Tables):
    here, before = tables.here, tables.drift()
    here.api.put(endpoints("web", "10.0.0.1", "10.0.0.7"))
    eventually(lambda: "10.0.0.7 . 8080" in here.nft("list map ip kproxy endpoints"), "the change is in")
    here.nft("add chain inet others more")
    here.api.put(endpoints("web", "10.0.0.1", "10.0.0.2"))
    eventually(lambda: rules(here) == tables.wanted, "the next change is in")
    assert tables.drift() == before


def test_nobody_changes_tables_that_have_an_owner(here: OneNode):
    here.api.put_all([*web(), *services(3)])
    proxy = here.started()
    before = rules(here), here.generation()
    for command in (
        "delete element ip kproxy services { 10.96.0.10 . tcp . 80 }",
        "insert rule ip kproxy services accept",
        "add chain ip kproxy theirs",
        "delete table ip6 kproxy",
        "add table ip kproxy { flags dormant; }",
    ):
        with pytest.raises(CommandError, match="Operation not permitted"):
            here.nft(command)
    here.host.namespace.command("nft", "-f", "-", stdin=f"flush ruleset\n{FOREIGN}")
    assert rules(here) == before[0]
    assert proxy.running


# What counts as drift, without a process


def test_changes_that_were_on_their_way_are_no_drift(make_part: MakePart, netns: Namespace):
    target = make_part(*web(), *services(4), features=WITHOUT_OWNER)
    target.sync()
    target.delete(services(4)[0], services(4)[1])
    target.put(*sticky("new", "10.96.0.30"), *web("10.0.0.9"))
    netns.command("nft", "delete element ip kproxy services { 10.97.0.2 . tcp . 80 }")
    target.reconciler.doubt()

    report = target.sync()

    assert dict(report.drift) == {"add": 1}
    assert target.in_step


def test_drift_that_is_found_while_nothing_can_be_written_is_told_afterwards(
    make_part: MakePart, netns: Namespace, tmp_path: Path
):
    target = make_part(*web(), features=WITHOUT_OWNER)
    target.sync()
    netns.command("nft", "delete table ip kproxy")
    other = make_part(*web())
    other.sync()  # the table is new, and another's
    netns.command("nft", "list table ip kproxy")
    target.reconciler.doubt()
    target.put(*services(1))
    with pytest.raises(Exception, match="another running process"):
        target.sync()
    other.kernel.close()

    report = target.sync()

    assert target.in_step
    assert len(report.services) >= 1
