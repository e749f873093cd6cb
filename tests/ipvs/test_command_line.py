"""`--once`, `--dry-run` and `--cleanup` with `--proxy-mode=ipvs`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.reconcile.objects import Object, endpoints, port, service, web
from tests.reconcile.one_node import OneNode

pytestmark = pytest.mark.ipvs

STRANGER = "-A -t 203.0.113.77:99 -s wlc\n"
SECONDS = 120.0
RULE = re.compile(r"^-A (\S+) (.*)$", re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[OneNode]:
    """A node with a network card, so that it has an address for node ports."""
    with OneNode(tmp_path) as node:
        node.host.configure("link add eth0 type dummy", "link set eth0 up", "addr add 192.0.2.10/24 dev eth0")
        yield node


def shop(**spec: str) -> list[Object]:
    ports = [port(80, node_port=30080)]
    return [service("shop", "10.96.0.20", type="NodePort", ports=ports, **spec), endpoints("shop", "10.0.0.3")]


def kproxy(here: OneNode, action: str, *flags: str, status: int, mode: str = "ipvs") -> str:
    """Run kproxy, check how it ended, and give back what it printed."""
    done = here.kproxy(f"--proxy-mode={mode}", action, *flags, timeout=SECONDS)
    assert done.returncode == status, (done.stdout, done.stderr)
    return str(done.stdout + done.stderr)


def lines(text: str) -> list[str]:
    """The changes that a dry run tells."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def test_what_a_dry_run_tells_and_a_cleanup_leaves(here: OneNode) -> None:
    host = here.host
    source = f"--manifests={here.manifests(*web(), *shop())}"
    host.namespace.command("ipvsadm", "-R", stdin=STRANGER)

    text = kproxy(here, "--dry-run", source, status=1)
    assert "+ virtual server 10.96.0.10:80/TCP: rr" in lines(text)
    assert host.exec("ipvsadm", "-Sn") == STRANGER
    assert host.exec("ipset", "list", "-n") == ""

    kproxy(here, "--once", source, status=0)
    assert "nothing to change" in kproxy(here, "--dry-run", source, status=0)
    answer = kproxy(here, "explain", source, "203.0.113.9", "192.0.2.10:30080", status=0)
    assert answer.splitlines()[-1].startswith("dnat")
    answer = kproxy(here, "explain", source, "10.0.0.9", "10.96.0.20:81", status=1)
    assert answer.splitlines()[-1] == "reject"

    host.exec("ipvsadm", "-D", "-t", "10.96.0.20:80")
    host.exec("ipvsadm", "-d", "-t", "10.96.0.10:80", "-r", "10.0.0.1:8080")
    assert sorted(lines(kproxy(here, "--dry-run", source, status=1))) == [
        "+ virtual server 10.96.0.10:80/TCP to 10.0.0.1:8080: weight 1",
        "+ virtual server 10.96.0.20:80/TCP to 10.0.0.3:8080: weight 1",
        "+ virtual server 10.96.0.20:80/TCP: rr",
    ]

    kproxy(here, "--cleanup", status=0)
    assert host.exec("ipvsadm", "-Sn") == STRANGER
    assert host.exec("ipset", "list", "-n") == ""
    assert "kube-ipvs0" not in host.exec("ip", "link")
    saved = host.exec("iptables-legacy-save") + host.exec("ip6tables-legacy-save")
    assert "KUBE-" not in saved


def going(here: OneNode, text: str) -> set[str]:
    """The rules in the kernel that a dry run would remove."""
    told: defaultdict[str, str] = defaultdict(str)
    for program, table, chain, rules in re.findall(r"^ +- (ip6?tables) (\S+) chain (\S+): (.*)$", text, re.MULTILINE):
        told[f"{program} -t {table} -A {chain}"] += f"; {rules}; "
    return {
        f"{where} {rule}"
        for program, table in product(("iptables", "ip6tables"), ("nat", "filter", "mangle"))
        for chain, rule in RULE.findall(here.host.exec(f"{program}-legacy-save", "-t", table))
        if f"; {rule}; " in told[where := f"{program} -t {table} -A {chain}"]
    }


def test_a_dry_run_over_iptables_mode_tells_what_goes(here: OneNode) -> None:
    source = f"--manifests={here.manifests(*web(), *shop())}"
    kproxy(here, "--once", source, status=0, mode="iptables")
    text = kproxy(here, "--dry-run", source, status=1)
    assert going(here, text)
    kproxy(here, "--once", source, status=0)
    assert going(here, text) == set()


def test_a_scheduler_that_there_is_not(here: OneNode) -> None:
    source = f"--manifests={here.manifests(*web())}"
    said = kproxy(here, "--once", source, "--ipvs-scheduler=fancy", status=1)
    assert "no scheduler 'fancy'" in said
    assert "ip_vs_fancy" in said
    assert here.host.exec("ipvsadm", "-Sn") == ""


def test_what_is_chosen_by_flags(here: OneNode) -> None:
    """One run with all of them, since each takes its time."""
    far = endpoints("shop", "10.0.0.3")
    outer = service(
        "shop", "10.96.0.20", type="NodePort", externalTrafficPolicy="Local", ports=[port(80, node_port=30080)]
    )
    source = f"--manifests={here.manifests(*web(), outer, far)}"
    host = here.host

    kproxy(here, "--once", source, status=0)
    assert "-a -t 192.0.2.10:30080" not in host.exec("ipvsadm", "-Sn")

    host.configure("addr add 10.96.0.128/32 dev kube-ipvs0")
    host.exec("ipvsadm", "-A", "-t", "10.96.0.128:80", "-s", "rr")
    flags = (
        "--ipvs-scheduler=lc",
        "--ipvs-strict-arp",
        "--ipvs-tcp-timeout=111s",
        "--ipvs-tcpfin-timeout=0s",
        "--ipvs-udp-timeout=222s",
        "--ipvs-exclude-cidrs=10.96.0.128/25",
        "--ipvs-stock-local-fallback",
    )
    kproxy(here, "--once", source, *flags, status=0)
    servers = host.exec("ipvsadm", "-Sn")
    assert "-A -t 10.96.0.10:80 -s lc" in servers
    assert "-A -t 10.96.0.128:80 -s rr" in servers
    assert "-a -t 192.0.2.10:30080 -r 10.0.0.3:8080 -m -w 1" in servers
    assert host.exec("ipvsadm", "-L", "--timeout").split(":")[1].split() == ["111", "120", "222"]
    sysctls = "/proc/sys/net/ipv4/conf/all/arp_ignore", "/proc/sys/net/ipv4/conf/all/arp_announce"
    assert host.exec("cat", *sysctls).split() == ["1", "2"]
