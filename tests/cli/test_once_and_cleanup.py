"""`kproxy --once` and `kproxy --cleanup`: one transaction, and nobody else's rules are touched."""

from __future__ import annotations

import re

import pytest

from tests.lab.namespaces import CommandError
from tests.reconcile.objects import refused, sticky, web
from tests.reconcile.one_node import OneNode

KUBE_PROXY = """
table ip kube-proxy {
  comment "rules for kube-proxy";
  map service-ips {
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = { 10.96.0.10 . tcp . 80 : drop }
  }
  chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
  chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
}
table ip6 kube-proxy {
  chain services { }
}
"""
FOREIGN = """
table inet firewalld {
  chain input { type filter hook input priority 10; counter; tcp dport 22 accept; }
}
table ip kproxy-tools {
  set kproxy { type ipv4_addr; elements = { 192.0.2.1 }; }
}
table inet kube-proxy {
  chain mine { tcp dport 53 drop; }
}
table arp kproxy { }
"""


def load(here: OneNode, ruleset: str) -> None:
    here.host.namespace.command("nft", "-f", "-", stdin=ruleset)


def test_a_second_run_commits_nothing(here: OneNode):
    path = here.manifests(*web(), *sticky("shop", "10.96.0.20"))
    assert here.kproxy("--once", f"--manifests={path}").returncode == 0
    before = here.ruleset, here.generation()

    again = here.kproxy("--once", f"--manifests={path}")

    assert again.returncode == 0
    assert (here.ruleset, here.generation()) == before


def test_a_run_finds_what_changed_since_the_last_one(here: OneNode):
    path = here.manifests(*web())
    here.kproxy("--once", f"--manifests={path}")
    here.manifests(*web("10.0.0.1", "10.0.0.5"))

    before = here.generation()
    assert here.kproxy("--once", f"--manifests={path}").returncode == 0

    assert here.generation() == before + 1
    assert here.kproxy("--dry-run", f"--manifests={path}").returncode == 0
    listed = here.nft("list map ip kproxy endpoints")
    assert "10.0.0.5 . 8080" in listed
    assert "10.0.0.2 . 8080" not in listed


def test_a_refused_service_is_named_and_the_rest_is_in(here: OneNode):
    here.api.put_all([*web(), *refused()])
    done = here.kproxy("--once", *here.api.client_flags())

    assert (done.returncode, done.stdout) == (1, "")
    [complaint] = [line for line in done.stderr.splitlines() if "error" in line]
    assert "default/refused" in complaint
    assert "chain learn-100000000000" in complaint
    assert "Numerical result out of range" in complaint
    assert "10.96.0.10 . tcp . 80" in here.nft("list map ip kproxy services")
    assert "10.96.0.66" not in here.ruleset


def test_kube_proxys_tables_go_in_the_transaction_that_brings_ours(here: OneNode):
    load(here, KUBE_PROXY + FOREIGN)
    before = here.generation()
    done = here.kproxy("--once", f"--manifests={here.manifests(*web())}")

    assert done.returncode == 0
    assert here.generation() == before + 1
    tables = here.nft("list tables").splitlines()
    assert "table ip kproxy" in tables
    assert "table ip kube-proxy" not in tables
    assert "table ip6 kube-proxy" not in tables


def test_cleanup_leaves_exactly_what_is_not_ours(here: OneNode):
    load(here, FOREIGN)
    foreign = here.ruleset
    load(here, KUBE_PROXY)
    here.kproxy("--once", f"--manifests={here.manifests(*web(), *sticky('shop', '10.96.0.20'))}")
    load(here, KUBE_PROXY)

    removed = [
        f"removed table {family} {table}\n"
        for family in ("ip", "ip6")
        for table in ("kproxy", "kube-proxy (kube-proxy's own, with all its rules)")
    ]
    nothing = "there is nothing of kproxy's or kube-proxy's in the kernel\n"
    for told in ("".join(removed), nothing):
        done = here.kproxy("--cleanup")
        assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
        assert here.ruleset == foreign


def test_nothing_is_cleaned_up_under_a_running_proxy(here: OneNode):
    path = here.manifests(*web())
    proxy = here.started(source=[f"--manifests={path}"])
    before = here.ruleset

    for action in (["--cleanup"], ["--once", f"--manifests={here.manifests(*web('10.0.0.9'), name='other.yaml')}"]):
        done = here.kproxy(*action)
        assert done.returncode == 1
        assert re.fullmatch(r"kproxy: .*belongs to another running process.*\n", done.stderr), done.stderr

    assert here.ruleset == before
    assert proxy.stop() == 143
    assert here.kproxy("--cleanup").returncode == 0
    assert here.ruleset == ""


@pytest.fixture
def only_net_admin() -> tuple[str, ...]:
    """Runs a command with no capability but CAP_NET_ADMIN, as a container should."""
    return ("setpriv", "--inh-caps=-all", "--bounding-set=-all,+net_admin")


def test_net_admin_is_all_that_it_takes(here: OneNode, only_net_admin: tuple[str, ...]):
    path = here.manifests(*web())
    for flags, status in (
        (["--dry-run", f"--manifests={path}"], 1),
        (["--once", f"--manifests={path}"], 0),
        (["--dry-run", f"--manifests={path}"], 0),
        (["--cleanup"], 0),
    ):
        done = here.kproxy(*flags, through=only_net_admin)
        assert done.returncode == status, (flags, done.stderr)
    assert here.ruleset == ""


@pytest.mark.parametrize(("action", "status"), [("--dry-run", 2), ("--once", 1), ("--cleanup", 1)])
def test_without_net_admin_the_message_says_so(here: OneNode, action: str, status: int):
    manifests = [] if action == "--cleanup" else [f"--manifests={here.manifests(*web())}"]
    done = here.kproxy(action, *manifests, through=("setpriv", "--inh-caps=-all", "--bounding-set=-all"))
    assert (done.returncode, done.stdout) == (status, "")
    assert re.fullmatch(r"kproxy: .*CAP_NET_ADMIN.*\n", done.stderr), done.stderr


def test_in_a_user_namespace_a_dry_run_leaves_no_trace(here: OneNode):
    """The namespace's own administrator, who is nobody outside of it."""
    path = here.manifests(*web())
    script = (
        "ip link set lo up; nft add table ip mine; nft list ruleset; echo ---;"
        ' "$@"; echo "exit $?"; echo ---; nft list ruleset'
    )
    through = ("unshare", "--user", "--map-root-user", "--net", "sh", "-c", script, "sh")
    done = here.kproxy("--dry-run", f"--manifests={path}", through=through)
    before, said, after = done.stdout.split("---\n")
    assert said.endswith("exit 1\n"), done.stderr
    assert "+ ip map services: 10.96.0.10 . tcp . 80 → goto pick-2 (default/web)" in said
    assert after.startswith(before)
    assert "kproxy" not in after
    with pytest.raises(CommandError):
        here.nft("list table ip kproxy")
