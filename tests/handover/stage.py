"""A node on which proxies follow each other: pods behind it and beside it, clients, and what belongs to others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.iptables import accounting
from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.handover import kube_proxy
from tests.handover.kube_proxy import Served
from tests.lab.cluster import CLUSTER_CIDR, Cluster, Pod
from tests.lab.cluster_objects import port, service
from tests.lab.proxy_process import METRICS_PORT, ProxyProcess, kproxy_command, kproxy_environment
from tests.lab.waiting import eventually
from tests.reconcile.one_node import generation

WEB = {Family.IPv4: "10.96.0.10", Family.IPv6: "fd00:96::10"}
EMPTY = {Family.IPv4: "10.96.0.11", Family.IPv6: "fd00:96::11"}
WEB_NODE_PORT, EMPTY_NODE_PORT = 30080, 30081
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
PODS = dict(zip(Family, CLUSTER_CIDR.split(","), strict=True))
_IPTABLES = {Family.IPv4: "iptables", Family.IPv6: "ip6tables"}
_EMPTY_TABLE = re.compile(r"^\*\w+\n(:[A-Z]+ ACCEPT\n)*COMMIT\n", re.MULTILINE)
_COUNTERS = re.compile(r"^(:.*) \[\d+:\d+\]$|^#.*\n", re.MULTILINE)

# What kubelet, a container runtime, a CNI plugin and an administrator have.
_KUBELETS = """\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -i eth1 -m comment --comment "let's see" -j MARK --set-xmark 0x80/0x80
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -p tcp -m multiport --dports 22,443 -m comment --comment "an administrator's" -j ACCEPT
-A FORWARD -j DOCKER-USER
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -m limit --limit 5/min -j LOG --log-prefix "odd "
-A DOCKER-USER -j RETURN
{guard}COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s {bridge} ! -o docker0 -j MASQUERADE
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 8081 -j DNAT --to-destination {hostport}
COMMIT
"""
_FOREIGN = {
    Family.IPv4: _KUBELETS.format(
        bridge="172.17.0.0/16",
        hostport="172.17.0.2:80",
        guard="-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8"
        ' -m comment --comment "block incoming localnet connections"'
        " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n",
    ),
    Family.IPv6: _KUBELETS.format(bridge="fd00:17::/64", hostport="[fd00:17::2]:80", guard=""),
}
_FOREIGN_NFT = """
table inet others {
  chain input { type filter hook input priority 5; policy accept; tcp dport 9999 drop; }
}
table ip kube-proxy-tools {
  set mine { type ipv4_addr; elements = { 192.0.2.1 }; }
}
"""


class Stage:
    """The node; a context manager. `variant` is that of iptables here, as kubelet shows it."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._closing = ExitStack()
        self._proxies: list[ProxyProcess] = []
        self.cluster = self._closing.enter_context(Cluster(2))
        self.node, elsewhere = self.cluster.nodes
        self.client = self.cluster.client
        self.visitor = self.cluster.run_pod("visitor", self.node, tcp=())
        places = (self.node, self.node, elsewhere)
        self.pods = [self.cluster.run_pod(f"web-{n}", place, {"app": "web"}) for n, place in enumerate(places)]
        self.cluster.apply(
            service("web", *WEB.values(), type="NodePort", ports=[port(80, node_port=WEB_NODE_PORT)]),
            service("empty", *EMPTY.values(), type="NodePort", ports=[port(80, node_port=EMPTY_NODE_PORT)]),
        )
        self.manifests = folder / "manifests.yaml"
        self.write_manifests()
        self.restore_others("filter", "nat", "mangle")
        self.nft(_FOREIGN_NFT)
        self.others = self.rules()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_proxies()
        self._closing.close()

    # Proxies

    def write_manifests(self) -> None:
        """Tell kproxy of the cluster as it is now."""
        kinds = ("Service", "EndpointSlice", "Node")
        items = [
            item
            for kind in kinds
            for item in self.cluster.api.objects(kind)
            if "kubernetes" not in str(item["metadata"]["name"])
        ]
        draft = self.manifests.with_suffix(".draft")
        draft.write_text("\n---\n".join(map(json.dumps, items)))
        draft.rename(self.manifests)

    def proxy(self, mode: ProxyMode, *flags: str) -> ProxyProcess:
        """A kproxy; not started yet."""
        log = self._folder / f"kproxy-{len(self._proxies)}.log"
        self._proxies.append(ProxyProcess(self.node, [*self._flags(mode), *flags], log))
        return self._proxies[-1]

    def started(self, mode: ProxyMode, *flags: str) -> ProxyProcess:
        """A kproxy that has synced."""
        made = self.proxy(mode, *flags)
        made.start()
        made.wait_until_synced()
        return made

    def _flags(self, mode: ProxyMode) -> list[str]:
        return [
            f"--proxy-mode={mode.value}",
            f"--manifests={self.manifests}",
            f"--hostname-override={self.node.name}",
            f"--cluster-cidr={CLUSTER_CIDR}",
            f"--metrics-bind-address=127.0.0.1:{METRICS_PORT}",
            "--conntrack-max-per-core=0",  # these two would change the machine, not the namespace
            "--oom-score-adj=0",
        ]

    def kube_proxys_iptables(self) -> None:
        """A kube-proxy in iptables mode has been here."""
        counters = self.node.namespace.run(accounting.ensure_counters, kube_proxy.COUNTERS)
        for family in Family:
            text = kube_proxy.iptables_text(family, PODS[family], self._served(family), counters=bool(counters))
            self.restore(text, "--noflush", "--counters", family=family)
        self.node.namespace.sysctl(ROUTE_LOCALNET, 1)

    def kube_proxys_nftables(self) -> None:
        """A kube-proxy in nftables mode has been here."""
        addresses = {Family.IPv4: self.node.ipv4, Family.IPv6: self.node.ipv6}
        for family, address in addresses.items():
            self.nft(kube_proxy.nftables_text(family, PODS[family], address, self._served(family)))

    def _served(self, family: Family) -> list[Served]:
        def address(pod: Pod) -> str:
            return pod.ipv4 if family is Family.IPv4 else pod.ipv6

        everywhere = [address(pod) for pod in self.pods]
        here = [address(pod) for pod in self.pods if pod.node is self.node]
        return [
            Served("default/empty", EMPTY[family], EMPTY_NODE_PORT, [], []),
            Served("default/web", WEB[family], WEB_NODE_PORT, everywhere, here),
        ]

    def end_proxies(self) -> None:
        """End those that still run, and print what they said."""
        for proxy in self._proxies:
            proxy.stop()
            print(f"--- {proxy.log.name}\n{proxy.log_end()}")  # pytest shows it where a test has failed
        self._proxies.clear()

    def clean_up(self) -> None:
        """Remove what proxies left. Raises AssertionError if that is not all, or more."""
        done = self.node.namespace.command(*kproxy_command(["--cleanup"]), env=kproxy_environment(), check=False)
        assert done.returncode == 0, done.stderr
        assert self.rules() == self.others

    # The kernel

    def iptables(self, *args: str, family: Family = Family.IPv4) -> str:
        """Run iptables as somebody else on the node would."""
        return self.node.exec(f"{_IPTABLES[family]}-{self.variant}", "--wait", *args)

    def restore(self, text: str, *flags: str, family: Family = Family.IPv4) -> None:
        """Run iptables-restore as somebody else on the node would; without `--noflush` it replaces whole tables."""
        self.node.namespace.command(f"{_IPTABLES[family]}-{self.variant}-restore", "--wait", *flags, stdin=text)

    def restore_others(self, *tables: str) -> None:
        """Give kubelet, the container runtime and the others back what they have in tables of iptables."""
        for family, text in _FOREIGN.items():
            sections = [
                found for found in re.findall(r"\*.*?COMMIT\n", text, re.DOTALL) if found[1:].startswith(tables)
            ]
            if "-j KUBE-FIREWALL" in self.saved(families=[family]):  # kproxy has brought that back already
                sections = [re.sub(r".*KUBE-FIREWALL.*\n", "", section) for section in sections]
            self.restore("".join(sections), "--noflush", family=family)

    def nft(self, text: str) -> str:
        """Run nft as somebody else on the node would."""
        return self.node.namespace.command("nft", "-f", "-", stdin=text).stdout

    def saved(self, *flags: str, variant: Variant | None = None, families: Iterable[Family] = Family) -> str:
        """What iptables-save prints; without times and the counters of built-in chains."""
        names = (f"{_IPTABLES[family]}-{variant or self.variant}-save" for family in families)
        texts = [self.node.exec(name, *flags) for name in names]
        return _COUNTERS.sub(lambda found: found[1] or "", "".join(texts))

    def tables(self) -> set[str]:
        """The tables that nft lists, but for those of iptables-nft."""
        listed = self.node.exec("nft", "list", "tables").splitlines()
        return {line.removeprefix("table ") for line in listed if line.split()[2] not in ("filter", "nat", "mangle")}

    def rules(self) -> str:
        """Everything that is in the kernel, in both variants and in nftables."""
        listed = [self.node.exec("nft", "list", "table", *table.split()) for table in sorted(self.tables())]
        saved = [_EMPTY_TABLE.sub("", self.saved(variant=variant)) for variant in Variant]
        return "".join([*saved, *listed])

    def others_are_untouched(self) -> bool:
        """Whether what belongs to others is there as it was, line by line and in its order."""
        now = iter(self.rules().splitlines())
        return all(line in now for line in self.others.splitlines())

    def generation(self) -> int:
        """How many transactions nf_tables has committed here."""
        return generation(self.node.namespace)

    def chains_of_proxies(self, variant: Variant | None = None) -> set[str]:
        """The chains of kube-proxy and kproxy in iptables."""
        chains = set(re.findall(r"^:(KUBE-\S+)", self.saved(variant=variant), re.MULTILINE))
        return chains - {"KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"}

    def endpoint_chain(self, pod: Pod) -> str:
        """The chain that translates to a pod's IPv4 address."""
        [chain] = re.findall(rf"^-A (KUBE-SEP-\S+) .*--to-destination {pod.ipv4}:80$", self.saved(), re.MULTILINE)
        return str(chain)

    def is_gone(self, mode: ProxyMode) -> bool:
        """Whether nothing is left of a mode."""
        if mode is ProxyMode.NFTABLES:
            return self.tables().isdisjoint(
                {f"{ip} {name}" for ip in ("ip", "ip6") for name in ("kproxy", "kube-proxy")}
            )
        return not any(self.chains_of_proxies(variant) for variant in Variant)

    def wait_until_gone(self, mode: ProxyMode) -> None:
        """Wait until nothing is left of a mode. Raises AssertionError."""
        eventually(lambda: self.is_gone(mode), f"{mode.value} mode's rules are removed")
