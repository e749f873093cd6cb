"""Who may change the tables: their owner while it lives, whoever comes next after it."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import ApplyError, Change, diff
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables.containers import container
from kproxy.dataplane.nftables.expressions import rule
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, Table, TableKey
from kproxy.model import Family
from tests.lab.namespaces import Namespace
from tests.nftables.conftest import WITHOUT_OWNER, OpenKernel
from tests.nftables.samples import BOTH, address, empty_layout, everything

V4 = Family.IPv4
SERVICE = container(V4, "services").key(address(V4, 1), 6, 80)
FOREIGN = "ip kproxy cluster-ips { 192.0.2.1 }"
FOREIGN_KEY = container(V4, "cluster-ips").key(bytes((192, 0, 2, 1)))


@pytest.fixture(autouse=True)
def _kernel_with_owners(kernel: NftablesKernel):
    if not kernel.features.owner:
        pytest.skip("tables with an owner that outlive it need kernel 6.9")


def test_while_the_owner_lives_nobody_else_changes_or_flushes_the_tables(kernel: NftablesKernel, netns: Namespace):
    wanted = everything(*BOTH)
    kernel.apply(diff(wanted, {}))
    for command in (f"add element {FOREIGN}", "flush chain ip kproxy masq", "delete table ip6 kproxy"):
        done = netns.command("nft", command, check=False)
        assert done.returncode == 1
        assert "Operation not permitted" in done.stderr
    netns.command("nft", "flush", "ruleset")
    assert diff(wanted, kernel.read()) == []


def test_the_tables_outlive_their_owner_and_the_next_one_takes_them_over(open_kernel: OpenKernel, netns: Namespace):
    wanted = everything(*BOTH)
    with netns.run(NftablesKernel, BOTH) as first:
        first.apply(diff(wanted, {}))
    second = open_kernel()
    assert diff(wanted, second.read()) == []
    # reading alone does not take over: a restart with nothing to change writes nothing
    netns.command("nft", f"add element {FOREIGN}")
    foreign = second.read()
    assert FOREIGN_KEY in foreign
    second.apply(diff(wanted, foreign))
    assert netns.command("nft", f"add element {FOREIGN}", check=False).returncode == 1
    netns.command("nft", "flush", "ruleset")
    assert diff(wanted, second.read()) == []


def test_a_failed_transaction_takes_nothing_over(open_kernel: OpenKernel, netns: Namespace):
    with netns.run(NftablesKernel, BOTH) as first:
        first.apply(diff(empty_layout(*BOTH), {}))
    second = open_kernel()
    with pytest.raises(ApplyError):
        second.apply([Change(SERVICE, None, ("goto nowhere", ""))])
    netns.command("nft", f"add element {FOREIGN}")
    second.apply([Change(SERVICE, None, ("drop", ""))])
    assert netns.command("nft", f"add element {FOREIGN}", check=False).returncode == 1


def test_orphaned_tables_can_be_cleaned_up(open_kernel: OpenKernel, netns: Namespace):
    with netns.run(NftablesKernel, BOTH) as first:
        first.apply(diff(everything(*BOTH), {}))
    second = open_kernel()
    second.apply(diff({}, second.read()))
    assert netns.command("nft", "list", "ruleset").stdout == ""


def test_tables_without_an_owner_are_used_as_they_are(open_kernel: OpenKernel, netns: Namespace):
    """As an older version left them: the kernel cannot give them an owner, and what they hold goes on."""
    old = open_kernel(features=WITHOUT_OWNER)
    old.apply(diff(empty_layout(*BOTH), {}))
    new = open_kernel()
    new.apply([Change(SERVICE, None, ("drop", ""))])
    assert new.read() == {**empty_layout(*BOTH), SERVICE: ("drop", "")}
    netns.command("nft", f"add element {FOREIGN}")
    assert FOREIGN_KEY in new.read()


def test_a_replaced_table_has_an_owner(open_kernel: OpenKernel, netns: Namespace):
    open_kernel(features=WITHOUT_OWNER).apply(diff(empty_layout(V4), {}))
    netns.command("nft", "add table ip kproxy { flags dormant; }")
    kernel = open_kernel()
    found = kernel.read()
    assert found == {TableKey(V4): Table("dormant")}
    masq = {ChainKey(V4, "masq"): Chain(None, (rule(x.mark_or(1)),))}
    kernel.apply(diff(empty_layout(V4) | masq, found))
    assert kernel.read() == empty_layout(V4) | masq
    assert netns.command("nft", f"add element {FOREIGN}", check=False).returncode == 1
