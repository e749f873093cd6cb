"""From iptables mode to ipvs mode: what stands in nat KUBE-SERVICES, which both have, on the way."""

from __future__ import annotations

import pytest

from kproxy.dataplane.base import Change, Entries, diff
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey, JumpKey
from kproxy.dataplane.ipvs import tables
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import MemberKey, RuleKey, SetKey
from kproxy.model import Family
from tests.ipvs.samples import everything
from tests.ipvs.tools import write
from tests.lab.namespaces import Namespace

V4 = Family.IPv4
OF_IPTABLES_MODE = [
    *(f"-A KUBE-SERVICES -d 10.96.0.{number}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A" for number in range(1, 13)),
    "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
]
MASQUERADED = "-A KUBE-SERVICES -m set --match-set KUBE-IPVS-IPS src -j KUBE-MARK-MASQ"


class Node:
    """Its rules, of one variant, which are those of iptables mode at first; and the sets of ipvs mode."""

    def __init__(self, netns: Namespace, variant: Variant) -> None:
        self.netns, self.variant = netns, variant
        # The kernel here need not have IPVS, without which it takes no rule about virtual servers.
        entries = {key: value for key, value in everything().items() if "--vaddr" not in describe(key, value)}
        self.wanted: Entries = {
            key: value
            for key, value in entries.items()
            if isinstance(key, ChainKey | RuleKey | JumpKey) and key.family is V4
        }
        write(netns, variant, {k: v for k, v in entries.items() if isinstance(k, SetKey | MemberKey)}, V4)
        chains = [":KUBE-SERVICES -", ":KUBE-SVC-A -", ":KUBE-NODEPORTS -"]
        text = "\n".join(["*nat", *chains, *OF_IPTABLES_MODE, "COMMIT", ""])
        netns.command(f"iptables-{variant}-restore", "--noflush", stdin=text)

    def differences(self) -> list[Change]:
        """What a dry run would tell."""
        return diff(self.wanted, self.netns.run(tables.read, self.variant, [V4]))

    def write(self, changes: list[Change]) -> None:
        self.netns.run(tables.write, self.variant, V4, changes)

    def make(self) -> list[Change]:
        """What comes. Returns what is to go, when the addresses are there."""
        changes = self.differences()
        self.write([change for change in changes if change.new is not None])
        return [change for change in changes if change.new is None]

    def services(self) -> list[str]:
        saved = self.netns.command(f"iptables-{self.variant}-save", "-t", "nat").stdout.splitlines()
        return [line for line in saved if line.startswith("-A KUBE-SERVICES ")]


@pytest.fixture(params=Variant)
def node(netns: Namespace, request: pytest.FixtureRequest) -> Node:
    return Node(netns, request.param)


def test_old_rules_serve_first_and_their_order_stays_but_the_nodes_connections_are_masqueraded(node: Node) -> None:
    node.make()

    assert node.services()[: len(OF_IPTABLES_MODE) + 1] == [MASQUERADED, *OF_IPTABLES_MODE]


def test_they_go_and_nothing_of_the_hand_over_stays(node: Node) -> None:
    node.write(node.make())

    assert node.differences() == []
    assert MASQUERADED not in node.services()


def test_a_process_that_dies_on_the_way_leaves_what_the_next_one_mends(node: Node) -> None:
    node.make()

    old = {str(rule) for change in node.differences() for rule in change.old or () if change.new is None}
    assert old == {rule.removeprefix("-A KUBE-SERVICES ") for rule in [MASQUERADED, *OF_IPTABLES_MODE]}

    node.write(node.make())
    assert node.differences() == []


@pytest.mark.parametrize("rule", ["-s 192.0.2.9 -j RETURN", "-p icmp -j ACCEPT"])
def test_a_rule_that_others_put_in_meanwhile_stops_none_of_that(node: Node, rule: str) -> None:
    old = node.make()
    node.netns.command(f"iptables-{node.variant}", "-t", "nat", "-I", "KUBE-SERVICES", *rule.split())

    node.write(old)

    assert not set(OF_IPTABLES_MODE) & set(node.services())
    node.write(node.make())
    assert node.differences() == []


def test_what_was_made_can_be_taken_back(node: Node) -> None:
    before = node.differences()
    node.make()

    node.write([Change(change.key, change.new, change.old) for change in before if change.new is not None])

    assert node.services() == OF_IPTABLES_MODE
