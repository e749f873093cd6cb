"""Which variant is in use, what the other still holds, and what clean-up takes away."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kproxy.dataplane.base import Change, UnsupportedError, diff
from kproxy.dataplane.iptables import variant as variants
from kproxy.dataplane.iptables.accounting import ensure_counters
from kproxy.dataplane.iptables.cleanup import leftovers, remove
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import ChainKey, is_kubelets
from kproxy.dataplane.iptables.localhost import ROUTE_LOCALNET
from kproxy.dataplane.iptables.probe import probe
from kproxy.model import Family
from tests.iptables.conftest import Host, OpenHost
from tests.iptables.services import BOTH, entries, everything
from tests.lab.namespaces import Namespace


def find(netns: Namespace) -> Variant:
    return netns.run(variants.find, BOTH)


def test_a_new_machine_gets_the_nft_variant_and_nothing_is_made(netns: Namespace) -> None:
    assert find(netns) is Variant.NFT
    assert netns.run(variants.legacy_tables, Family.IPv4) == []
    assert netns.command("nft", "list", "ruleset").stdout == ""


@pytest.mark.parametrize("used", list(Variant))
@pytest.mark.parametrize("hint", ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"])
def test_kubelets_chains_decide_against_any_number_of_rules(netns: Namespace, used: Variant, hint: str) -> None:
    netns.command(f"iptables-{used}", "--wait", "-t", "mangle", "-N", hint)
    for _ in range(3):
        netns.command(f"iptables-{used.other}", "--wait", "-A", "INPUT", "-j", "ACCEPT")
    assert find(netns) is used


@pytest.mark.parametrize("used", list(Variant))
def test_without_kubelet_the_larger_number_of_rules_decides(netns: Namespace, used: Variant) -> None:
    netns.command(f"iptables-{used.other}", "--wait", "-A", "INPUT", "-j", "ACCEPT")
    for _ in range(2):
        netns.command(f"ip6tables-{used}", "--wait", "-A", "INPUT", "-j", "ACCEPT")
    assert find(netns) is used


def test_rules_of_nft_itself_do_not_count(netns: Namespace) -> None:
    netns.command("iptables-legacy", "--wait", "-A", "INPUT", "-j", "ACCEPT")
    rules = "table ip mine { chain c { accept; accept; accept; }; }"
    netns.command("nft", "-f", "-", stdin=rules)
    assert find(netns) is Variant.LEGACY


def test_the_programs_tell_what_they_can(netns: Namespace) -> None:
    for variant in Variant:
        features = netns.run(probe, variant, BOTH)
        assert len(features.versions) == 2
        assert all(version[0].isdigit() for version in features.versions)
        assert features.random_fully


def test_missing_programs_are_named(netns: Namespace, tmp_path: Path) -> None:
    python = "import sys; from kproxy.model import Family; from kproxy.dataplane.iptables import variant"
    script = (
        f"{python}\ntry: variant.find(tuple(Family))\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = netns.command(sys.executable, "-c", script, env={**os.environ, "PATH": str(tmp_path)})
    assert done.stdout.startswith(UnsupportedError.__name__)
    assert "iptables-nft-restore" in done.stdout
    assert "ip6tables-legacy-save" in done.stdout


def test_a_program_that_goes_missing_later_is_trouble_that_passes(netns: Namespace, tmp_path: Path) -> None:
    script = """
from kproxy.dataplane.base import ApplyError, Change
from kproxy.dataplane.iptables.entries import ChainKey
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.kernel import IptablesKernel
from kproxy.model import Family
kernel = IptablesKernel([Family.IPv4], Variant.NFT, guards_localhost=False)
try: kernel.apply([Change(ChainKey(Family.IPv4, "nat", "KUBE-SEP-A"), None, ())])
except ApplyError as error: print(error.transient, error)
try: kernel.read()
except OSError as error: print(error)
"""
    done = netns.command(sys.executable, "-c", script, env={**os.environ, "PATH": str(tmp_path)})
    applied, read = done.stdout.splitlines()
    assert applied.startswith("True")
    assert "iptables-nft-restore" in applied
    assert "iptables-nft-save" in read


def test_the_other_variants_leftovers_are_reported_and_kubelets_chains_are_not(open_host: OpenHost) -> None:
    host = open_host(Variant.LEGACY)
    host.iptables("-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
    assert host.netns.run(variants.ours, Variant.LEGACY, BOTH) == []
    host.bring_to(entries())
    ours = host.netns.run(variants.ours, Variant.LEGACY, BOTH)
    assert (Family.IPv6, "nat", "KUBE-SERVICES") in ours
    assert not any("KUBELET" in chain or chain == "KUBE-FIREWALL" for _, _, chain in ours)
    assert host.netns.run(variants.ours, Variant.NFT, BOTH) == []


def test_clean_up_takes_all_that_is_ours_in_both_variants_and_nothing_else(open_host: OpenHost) -> None:
    hosts = [open_host(variant) for variant in Variant]
    before = {}
    for host in hosts:
        for family in BOTH:
            host.iptables("-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "ACCEPT", family=family)
            host.iptables("-t", "mangle", "-N", "KUBE-IPTABLES-HINT", family=family)
            host.iptables("-N", "KUBE-FIREWALL", family=family)
            host.iptables("-A", "INPUT", "-j", "KUBE-FIREWALL", family=family)
            host.iptables("-A", "OUTPUT", "-j", "KUBE-FIREWALL", family=family)
            host.iptables("-A", "KUBE-FIREWALL", "-j", "RETURN", family=family)
            before[host.kernel.variant, family] = host.saved(family)
        theirs = {key: value for key, value in host.read().items() if _firewall(key)}
        host.bring_to({**everything(), **theirs})
    netns = hosts[0].netns
    planned = netns.run(leftovers, Variant.LEGACY, BOTH)
    assert planned
    assert all(change.new is None and not is_kubelets(change.key) for change in planned)
    for host in hosts:
        netns.run(remove, host.kernel.variant, BOTH, netns.run(leftovers, host.kernel.variant, BOTH))
    for host in hosts:
        for family in BOTH:
            kept = [line for line in host.saved(family) if not line.startswith(":") or " - " in line]
            assert kept == [
                line for line in before[host.kernel.variant, family] if not line.startswith(":") or " - " in line
            ]
        assert netns.run(leftovers, host.kernel.variant, BOTH) == []


def _firewall(key: object) -> bool:
    return isinstance(key, ChainKey) and key.chain == "KUBE-FIREWALL"


def test_route_localnet_waits_for_its_guard(open_host: OpenHost) -> None:
    host = open_host(Variant.NFT)
    host.netns.run(host.kernel.apply, [Change(ROUTE_LOCALNET, None, 1)])
    assert ROUTE_LOCALNET not in host.read()
    host.bring_to(entries())
    assert host.read()[ROUTE_LOCALNET] == 1

    host.netns.sysctl("net/ipv4/conf/all/route_localnet", 0)
    host.iptables("-D", "INPUT", "-j", "KUBE-FIREWALL")
    host.netns.run(host.kernel.apply, [Change(ROUTE_LOCALNET, None, 1)])
    assert ROUTE_LOCALNET not in host.read()
    host.bring_to(entries())
    assert host.read()[ROUTE_LOCALNET] == 1


def test_counters_are_made_once_and_can_be_used(netns: Namespace, host: Host) -> None:
    names = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")
    assert netns.run(ensure_counters, names) == set(names)
    assert netns.run(ensure_counters, names) == set(names)
    host.iptables("-A", "INPUT", "-m", "nfacct", "--nfacct-name", names[0], "-j", "ACCEPT")
    assert diff({}, host.read()) == []
