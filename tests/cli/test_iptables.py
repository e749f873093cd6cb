"""The actions of the command line in iptables mode, in both variants."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family, Protocol
from tests.lab.frames import Turn, build, parse
from tests.lab.host import Host
from tests.lab.namespaces import Namespace
from tests.lab.pod_server import PodServer
from tests.lab.proxy import HINT, InProcess
from tests.reconcile.objects import Object, endpoints, node, port, service, sticky, web
from tests.reconcile.one_node import OneNode

PROGRAMS = {Family.IPv4: "iptables", Family.IPv6: "ip6tables"}
MODE = "--proxy-mode=iptables"
NOTHING = "iptables mode, node here: nothing to change, the kernel holds what it should\n"
WEB_RULE = '-d 10.96.0.10/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80 -j '
FOREIGN = """\
*filter
:KUBE-FIREWALL - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -p tcp -m multiport --dports 22,443 -m comment --comment "an administrator's" -j ACCEPT
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
"""
KUBELETS_GUARD = """\
*filter
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"\
 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
"""
ROUTE_LOCALNET = "net.ipv4.conf.all.route_localnet"


class Machine:
    """A node on which kubelet uses a variant of iptables."""

    def __init__(self, here: OneNode, variant: Variant) -> None:
        self.here, self.variant = here, variant
        self.restore(HINT)

    def restore(self, text: str, family: Family = Family.IPv4) -> None:
        """Another program's iptables-restore."""
        program = f"{PROGRAMS[family]}-{self.variant}-restore"
        self.here.host.namespace.command(program, "--noflush", stdin=text)

    def iptables(self, *args: str) -> str:
        return self.here.host.exec(f"iptables-{self.variant}", "--wait", *args)

    def saved(self) -> list[str]:
        """Every rule of both families, without what is counted and when."""
        programs = (f"{name}-{self.variant}-save" for name in PROGRAMS.values())
        text = "".join(self.here.host.exec(program) for program in programs)
        return [re.sub(r" \[\d+:\d+\]$", "", line) for line in text.splitlines() if not line.startswith("#")]

    def sysctl(self, name: str) -> int:
        return int(self.here.host.exec("sysctl", "-n", name))

    def programmed(self, *objects: Object) -> Path:
        """The manifests of what the kernel holds."""
        path = self.here.manifests(*objects)
        done = self.here.kproxy("--once", MODE, f"--manifests={path}")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return path


@pytest.fixture(params=list(Variant))
def machine(request: pytest.FixtureRequest, here: OneNode) -> Machine:
    return Machine(here, request.param)


def test_after_a_sync_a_dry_run_finds_nothing_whether_it_is_told_the_mode_or_not(machine: Machine):
    path = machine.programmed(*web(), *sticky("shop", "10.96.0.20"))
    before = machine.saved()

    told = machine.here.kproxy("--dry-run", MODE, f"--manifests={path}")
    untold = machine.here.kproxy("--dry-run", f"--manifests={path}")

    assert (told.returncode, told.stdout, told.stderr) == (0, NOTHING, "")
    assert (untold.returncode, untold.stdout) == (0, NOTHING)
    assert "no mode is given: this is about iptables mode, whose rules are in place" in untold.stderr
    assert machine.saved() == before


def test_a_rule_that_is_deleted_by_hand_is_the_whole_difference_until_the_next_sync(machine: Machine):
    path = machine.programmed(*web(), *sticky("shop", "10.96.0.20"))
    before = machine.saved()
    [line] = [line for line in before if WEB_RULE in line]
    machine.here.host.exec("sh", "-c", f"iptables-{machine.variant} -w -t nat {line.replace('-A', '-D', 1)}")

    done = machine.here.kproxy("--dry-run", MODE, f"--manifests={path}")
    as_json = machine.here.kproxy("--dry-run", MODE, f"--manifests={path}", "-o", "json")

    rule = line.removeprefix("-A KUBE-SERVICES ")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "iptables mode, node here: 1 to add, 0 to remove, 0 to change (1 Service)",
        "",
        "Service default/web",
        f"  + iptables nat chain KUBE-SERVICES: {rule}",
    ]
    assert (as_json.returncode, json.loads(as_json.stdout)["counts"]) == (1, {"add": 1, "remove": 0, "change": 0})
    assert machine.saved() != before
    machine.programmed(*web(), *sticky("shop", "10.96.0.20"))
    assert machine.saved() == before


def test_cleanup_leaves_what_belongs_to_others_and_the_setting_as_it_was(machine: Machine):
    machine.restore(FOREIGN)
    machine.restore(FOREIGN, Family.IPv6)
    machine.restore(KUBELETS_GUARD)
    others = machine.saved()
    machine.programmed(*web(), *sticky("shop", "10.96.0.20"))
    programmed = machine.saved()
    assert machine.sysctl(ROUTE_LOCALNET) == 1

    listed = machine.here.kproxy("--cleanup", "--dry-run")
    assert (listed.returncode, listed.stderr) == (1, "")
    assert f"would remove iptables nat chain KUBE-SERVICES: {WEB_RULE}" in listed.stdout
    assert f"would remove sysctl {ROUTE_LOCALNET} = 1" in listed.stdout
    assert "KUBE-FIREWALL" not in listed.stdout
    assert machine.saved() == programmed

    done = machine.here.kproxy("--cleanup")
    assert (done.returncode, done.stdout) == (0, listed.stdout.replace("would remove", "removed"))
    assert machine.saved() == others
    assert machine.sysctl(ROUTE_LOCALNET) == 0

    again = machine.here.kproxy("--cleanup")
    assert (again.returncode, again.stdout) == (0, "there is nothing of kproxy's or kube-proxy's in the kernel\n")


@pytest.mark.parametrize(("action", "status"), [("--once", 1), ("--dry-run", 2)])
def test_without_the_programs_of_iptables_one_line_says_what_is_missing(here: OneNode, action: str, status: int):
    path = here.manifests(*web())
    done = here.kproxy(action, MODE, f"--manifests={path}", through=("/usr/bin/env", "PATH=/nowhere"))
    assert (done.returncode, done.stdout) == (status, "")
    assert re.fullmatch(
        r"kproxy: iptables mode: the programs iptables-nft-save.* are missing.*; install iptables\n", done.stderr
    ), done.stderr


def test_what_the_other_variant_may_hold_is_told_where_it_cannot_be_looked_at(here: OneNode, tmp_path: Path):
    here.host.exec("iptables-legacy", "--table", "nat", "--list")  # which makes the table
    here.host.exec("iptables-nft", "--table", "mangle", "--new-chain", "KUBE-IPTABLES-HINT")
    path = here.manifests(*web())
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("iptables", "ip6tables"):
        for action in ("save", "restore"):
            program = f"{name}-nft-{action}"
            (programs / program).symlink_to(str(shutil.which(program)))
    done = here.kproxy("--dry-run", MODE, f"--manifests={path}", through=("/usr/bin/env", f"PATH={programs}"))
    assert done.returncode == 1
    assert "whether the other variant of iptables holds rules of ours cannot be told" in done.stderr
    assert "iptables-legacy-save, iptables-legacy-restore missing" in done.stderr


@pytest.mark.parametrize("variant", list(Variant))
def test_with_more_than_a_thousand_endpoints_the_comments_about_them_go(netns: Namespace, variant: Variant):
    proxy = InProcess(netns, {"mode": "iptables", "hostnameOverride": "here"}, [Family.IPv4], variant)
    of_web = [f"10.1.{n // 100}.{n % 100}" for n in range(999)]
    slices = [endpoints("web", *of_web[n : n + 100], number=n // 100) for n in range(0, 900, 100)]
    proxy.apply(node(), service("shop", "10.96.0.20"), endpoints("shop", "10.0.0.3"))
    proxy.apply(service("web", "10.96.0.10"), *slices)

    def with_comments() -> list[bool]:
        """Of each rule about an endpoint."""
        saved = netns.command(f"iptables-{variant}-save", "-t", "nat").stdout.splitlines()
        assert any("default/shop cluster IP" in line for line in saved)
        return ["--comment" in line for line in saved if re.match(r"-A KUBE-(SVC|SEP)-", line)]

    for last, are_there in (of_web[900:], True), ([*of_web[900:], "10.2.0.1"], False), (of_web[900:], True):
        proxy.apply(endpoints("web", *last, number=9))
        proxy.sync()
        found = with_comments()
        assert len(found) == 3 * (1 + 900 + len(last))
        assert set(found) == {are_there}
    proxy.close()


class Neighbour:
    """Somebody on the same link as the node, with a pod's server on it."""

    NODE, ADDRESS, NODE_LINK = "192.168.5.1", "192.168.5.2", "02:00:00:00:00:01"

    def __init__(self, node: Host) -> None:
        self.host = Host("neighbour", self.ADDRESS)
        node.configure(
            f"link add near address {self.NODE_LINK} type veth peer name eth0 netns {self.host.namespace.path}",
            f"addr add {self.NODE}/24 dev near",
            "link set near up",
            f"route add 10.9.9.0/24 via {self.ADDRESS}",
        )
        node.sysctls({"net/ipv4/ip_forward": 1, "net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/near/rp_filter": 0})
        self.host.configure(
            f"addr add {self.ADDRESS}/24 dev eth0", "link set eth0 up", f"route add default via {self.NODE}"
        )
        self._to_node = bytes.fromhex(self.NODE_LINK.replace(":", ""))
        self._link = self.host.namespace.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self._link.settimeout(2.0)
        listener = self.host.socket("0.0.0.0")
        listener.bind((self.ADDRESS, 8080))
        listener.listen()
        self._server = PodServer("web-0", "hello", [listener], [])

    def emit(self, protocol: Protocol, destination: str, port: int, turn: Turn = Turn.OPEN) -> None:
        """Put a packet onto the link, whatever its destination."""
        packet = build(protocol, self.ADDRESS, 4000, destination, port, 1, turn)
        self._link.sendto(packet, ("eth0", 0x0800, 0, 0, self._to_node))

    def sees(self, destination: str) -> bool:
        """Whether the node forwards a packet to a destination before one that it surely does."""
        self.emit(Protocol.UDP, "10.9.9.99", 1)
        while True:
            data, where = self._link.recvfrom(2048)
            packet = parse(data)
            if packet and where[2] != socket.PACKET_OUTGOING and packet.destination in (destination, "10.9.9.99"):
                return packet.destination == destination

    def close(self) -> None:
        self._server.close()
        self._link.close()
        self.host.close()


@pytest.fixture
def neighbour(here: OneNode) -> Iterator[Neighbour]:
    made = Neighbour(here.host)
    yield made
    made.close()


def exposed() -> list[Object]:
    """A Service on a node port, with an endpoint at the neighbour."""
    shop = service("shop", "10.96.0.20", type="NodePort", ports=[port(80, node_port=30080)])
    return [shop, endpoints("shop", Neighbour.ADDRESS)]


def test_a_node_port_answers_on_localhost_and_neighbours_are_kept_from_what_listens_there(
    machine: Machine, neighbour: Neighbour
):
    host = machine.here.host
    with (
        host.socket("127.0.0.1", socket.SOCK_DGRAM) as private,
        host.socket(Neighbour.NODE, socket.SOCK_DGRAM) as open_,
    ):
        private.bind(("127.0.0.1", 5353))
        private.setblocking(False)
        open_.bind((Neighbour.NODE, 5354))
        open_.settimeout(2.0)

        def is_reached() -> bool:
            """What the neighbour sends to 127.0.0.1, before what it sends to an address that is open to it."""
            neighbour.emit(Protocol.UDP, "127.0.0.1", 5353)
            neighbour.emit(Protocol.UDP, Neighbour.NODE, 5354)
            open_.recv(64)
            try:
                return bool(private.recv(64))
            except BlockingIOError:
                return False

        machine.programmed(*exposed())

        assert host.get("http://127.0.0.1:30080/").pod == "web-0"
        assert not is_reached()
        machine.iptables("-F", "KUBE-FIREWALL")  # it is the rule that keeps them away
        assert is_reached()


def test_metrics_tell_of_rules_and_of_what_they_count(machine: Machine, neighbour: Neighbour):
    machine.here.api.put_all([*web(), *exposed()])
    proxy = machine.here.started(MODE)
    dropped = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"
    accepted = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total"
    before = proxy.scrape()
    assert (before[dropped], before[accepted]) == (0, 0)

    neighbour.emit(Protocol.TCP, "10.9.9.9", 80, Turn.ANSWER)  # a SYN ACK that answers nothing
    assert not neighbour.sees("10.9.9.9")
    assert machine.here.host.get("http://127.0.0.1:30080/").pod == "web-0"

    scraped = proxy.scrape()
    assert (scraped[dropped], scraped[accepted]) == (1, 1)
    for family, program in PROGRAMS.items():
        for table in "filter", "nat":
            saved = machine.here.host.exec(f"{program}-{machine.variant}-save", "-t", table).splitlines()
            ours = sum(line.startswith("-A") and "KUBE-" in line for line in saved)
            labels = f'{{ip_family="{family.name}",table="{table}"}}'
            assert scraped[f"kubeproxy_sync_proxy_rules_iptables_total{labels}"] == ours
            assert 0 < scraped[f"kubeproxy_sync_proxy_rules_iptables_last{labels}"] <= ours
        failures = f'kubeproxy_sync_proxy_rules_iptables_restore_failures_total{{ip_family="{family.name}"}}'
        assert scraped[failures] == 0


def test_where_connection_tracking_is_liberal_invalid_packets_are_left_alone(machine: Machine, neighbour: Neighbour):
    machine.here.host.sysctls({"net/netfilter/nf_conntrack_tcp_be_liberal": 1})
    machine.programmed(*web())
    neighbour.emit(Protocol.TCP, "10.9.9.9", 80, Turn.ANSWER)
    assert neighbour.sees("10.9.9.9")


def test_explain_knows_what_iptables_mode_does_otherwise(machine: Machine):
    path = machine.here.manifests(*web(), *exposed())
    for packet, fate in {
        ("10.0.0.9", "10.96.0.10:80"): "dnat",
        ("10.0.0.9", "10.96.0.10:81"): "pass",  # nftables mode rejects other ports of a cluster IP
        ("127.0.0.1", "127.0.0.1:30080"): "dnat",
    }.items():
        done = machine.here.kproxy("explain", MODE, f"--manifests={path}", *packet)
        assert done.stdout.splitlines()[-1] == fate, packet
    assert done.returncode == 0


def test_what_others_write_in_comments_is_theirs(machine: Machine):
    """Bytes that are no UTF-8, separators that Python takes for line ends, and line ends that look like tables."""
    for number, comment in enumerate((b"\xff", "x\u2028*mangle".encode(), b"x\n*mangle\n:INPUT", b'"\\')):
        chain = ("INPUT", "FORWARD", "OUTPUT")[number % 3]
        machine.here.host.namespace.command(
            f"iptables-{machine.variant}", "-A", chain, "-m", "comment", "--comment", comment, "-j", "ACCEPT"
        )
    path = machine.programmed(*web())
    count = f"iptables-{machine.variant}-save | grep --text --count -- '-j KUBE-'"
    jumps = machine.here.host.exec("sh", "-c", count)
    machine.programmed(*web())

    assert machine.here.host.exec("sh", "-c", count) == jumps
    done = machine.here.kproxy("--dry-run", MODE, f"--manifests={path}")
    assert (done.returncode, done.stdout) == (0, NOTHING)
    assert machine.here.kproxy("--cleanup").returncode == 0


def test_chains_that_others_refer_to_hold_up_nothing(machine: Machine):
    machine.restore("*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA -\n:MINE -\n-A MINE -j KUBE-SVC-AAAAAAAAAAAAAAAA\nCOMMIT\n")
    path = machine.programmed(*web())
    assert any(WEB_RULE in line for line in machine.saved())
    machine.iptables("-t", "nat", "-A", "MINE", "-p", "tcp", "--dport", "8080", "-j", "KUBE-MARK-MASQ")

    assert machine.here.kproxy("--once", "--proxy-mode=nftables", f"--manifests={path}").returncode == 0
    assert not [line for line in machine.saved() if "-j KUBE-" in line and not re.search("MINE|FIREWALL", line)]
    done = machine.here.kproxy("--cleanup")
    assert done.returncode == 1
    assert "chain KUBE-MARK-MASQ stays, empty: somebody else's rule jumps there" in done.stderr
    machine.iptables("-t", "nat", "-F", "MINE")
    assert machine.here.kproxy("--cleanup").returncode == 0
    assert {line for line in machine.saved() if line.startswith(":KUBE")} <= {
        ":KUBE-FIREWALL -",
        ":KUBE-IPTABLES-HINT -",
    }


def test_a_setting_that_others_need_stays(machine: Machine):
    """As on the nodes of kind, whose DNS is Docker's, at a loopback address."""
    machine.programmed(*web())
    machine.restore("*nat\n-A OUTPUT -d 192.0.2.53/32 -p udp -j DNAT --to-destination 127.0.0.11:53535\nCOMMIT\n")
    assert machine.here.kproxy("--cleanup").returncode == 0
    assert machine.sysctl(ROUTE_LOCALNET) == 1


def test_a_dry_run_makes_no_legacy_tables(here: OneNode):
    machine = Machine(here, Variant.LEGACY)
    tables = here.host.exec("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
    done = here.kproxy("--dry-run", MODE, f"--manifests={here.manifests(*web())}")
    assert done.returncode == 1
    assert here.host.exec("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names") == tables
    assert machine.saved()


def test_legacy_rules_that_cannot_be_looked_at_are_not_taken_for_none(here: OneNode, tmp_path: Path):
    machine = Machine(here, Variant.LEGACY)
    machine.programmed(*web())
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("iptables", "ip6tables"):
        for action in ("save", "restore"):
            (programs / f"{name}-nft-{action}").symlink_to(f"/usr/sbin/{name}-nft-{action}")
    done = here.kproxy("--cleanup", through=("/usr/bin/env", f"PATH={programs}"))
    assert done.returncode == 1
    assert "there are legacy tables of iptables, but iptables-legacy-save" in done.stderr
