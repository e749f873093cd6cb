"""What goes into the kernel in parts, since the whole was refused, is complete in the end."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kproxy.dataplane.base import ApplyError, Change
from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.lab import scenario as scenarios
from tests.lab.packets import Lab
from tests.lab.proxy import HINT
from tests.lab.scenario import Objects
from tests.oracle.rig import Rig
from tests.oracle.unreliable import Unreliable
from tests.oracle.worlds import PRIMARY

CONFIG = {"mode": "nftables", "hostnameOverride": scenarios.NODE_NAME}


class RefusesOnce(Unreliable):
    """Refuses the first transaction, and does not say which part of it."""

    def apply(self, changes: Iterable[Change]) -> None:
        if not self.refused:
            self.refused += 1
            raise ApplyError("the test refuses")
        super().apply(changes)


def sticky_for(seconds: int) -> Objects:
    affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}
    return Objects(
        node={"addresses": [PRIMARY]},
        services={"a": {"clusterIP": "172.30.0.11", "ports": [{"name": "http", "port": 80}], **affinity}},
        slices={"a-1": {"service": "a", "ports": [{"name": "http", "port": 8080}], "endpoints": ["10.0.1.1"]}},
    )


def test_a_chain_that_is_in_use_until_the_last_part_goes_too(node_lab: Lab) -> None:
    """The chain for the old timeout is nobody's when the proxy starts, but the Service's elements lead to it."""
    start(Rig(node_lab.netns, CONFIG), sticky_for(600)).close()
    again = start(refused_once(node_lab), sticky_for(1200))
    assert again.plan() == []
    assert again.misplaced() == []
    again.close()


def test_what_strangers_left_in_our_tables_goes_too(node_lab: Lab) -> None:
    start(Rig(node_lab.netns, CONFIG, shared_tables=True), sticky_for(600)).close()
    for command in (
        "add set ip kproxy extra { type ipv4_addr; }",
        "add chain ip kproxy extra",
        "add rule ip kproxy extra ip saddr @extra drop",
        "add element ip kproxy cluster-ips { 198.51.100.81 }",
    ):
        node_lab.netns.command("nft", command)
    again = start(refused_once(node_lab, shared_tables=True), sticky_for(600))
    assert again.plan() == []
    assert again.misplaced() == []
    again.close()


@pytest.mark.parametrize("variant", list(Variant))
def test_a_second_copy_of_a_rule_behind_the_last_one_goes_and_the_order_stays(node_lab: Lab, variant: Variant) -> None:
    """iptables deletes rules by what they say: the first of two that say the same."""
    netns = node_lab.netns
    netns.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
    world = sticky_for(600)
    both = {**world.services["a"], "externalIPs": ["198.51.100.80"]}
    rig = start(Rig(netns, CONFIG | {"mode": "iptables"}), Objects(world.config, world.node, {"a": both}, world.slices))
    before = netns.command(f"iptables-{variant}", "-w", "-t", "nat", "-S", "KUBE-SERVICES").stdout
    first = next(line for line in before.splitlines() if line.startswith("-A"))
    netns.command("sh", "-c", f"iptables-{variant} -w -t nat {first}")

    rig.reconciler.doubt()
    rig.sync()

    assert netns.command(f"iptables-{variant}", "-w", "-t", "nat", "-S", "KUBE-SERVICES").stdout == before
    rig.reconciler.doubt()
    assert rig.plan() == []
    rig.close()


@pytest.mark.parametrize("variant", list(Variant))
def test_a_jump_that_others_copy_behind_their_own_rules_stays_before_them(node_lab: Lab, variant: Variant) -> None:
    """As when somebody loads a saved ruleset once more, with --noflush."""
    netns = node_lab.netns
    netns.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
    rig = start(Rig(netns, CONFIG | {"mode": "iptables"}), sticky_for(600))
    listing = (f"iptables-{variant}", "-w", "-S", "INPUT")
    jumps = [line for line in netns.command(*listing).stdout.splitlines() if line.startswith("-A")]
    theirs = "-A INPUT -s 203.0.113.0/24 -j ACCEPT"
    for line in (theirs, *jumps):
        netns.command("sh", "-c", f"iptables-{variant} -w {line}")

    rig.reconciler.doubt()
    rig.sync()

    now = [line for line in netns.command(*listing).stdout.splitlines() if line.startswith("-A")]
    kubelets = [line for line in jumps if "KUBE-FIREWALL" in line]  # what becomes of these is kubelet's affair
    assert [line for line in now if line not in kubelets] == [line for line in (*jumps, theirs) if line not in kubelets]
    rig.close()


def refused_once(lab: Lab, *, shared_tables: bool = False) -> Rig:
    return Rig(lab.netns, CONFIG, shared_tables=shared_tables, wrap=lambda real: RefusesOnce(real, 0.0, seed=0))


def start(rig: Rig, world: Objects) -> Rig:
    rig.apply([*scenarios.surroundings(world), *scenarios.items(world, Family.IPv4)])
    rig.sync()
    return rig
