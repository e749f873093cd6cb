"""The chains: the fixed ones, and those that exist for each number of endpoints and each affinity timeout in use.

README.md shows how they hang together.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_address

from kproxy.dataplane.base import Entries
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables.containers import CONTAINERS, Container, container
from kproxy.dataplane.nftables.expressions import Piece, Rule, rule
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, Hook, SetKey, Table, TableKey
from kproxy.model import Family, LocalDetector, NodeFacts

REJECT = "reject-it"
# pick-1 … pick-16 exist from the start: a rule that looks up a map makes the kernel walk all that is in it, which takes
# 55 ms with 300,000 endpoints.
ALWAYS_THERE = 16
LOOPBACK = {Family.IPv4: "127.0.0.0/8", Family.IPv6: "::1/128"}


@lru_cache(maxsize=4096)
def pick_chain(endpoints: Container, name: str, count: int) -> tuple[ChainKey, Chain]:
    """Sends a connection to one of `count` endpoints.

    The second rule is for a packet that read the services just before a commit and the endpoints just after it, and
    drew a slot that went.
    """
    return ChainKey(endpoints.family, name), Chain(None, (rule(x.dnat(endpoints, count)), rule(x.dnat(endpoints, 1))))


@lru_cache(maxsize=1024)
def learn_chain(family: Family, seconds: int) -> tuple[ChainKey, Chain]:
    """Notes which endpoint a client got, for `seconds` from now."""
    update = x.update_affinity(container(family, "affinity"), seconds)
    return ChainKey(family, f"learn-{seconds}"), Chain(None, (rule(update),))


def base_entries(facts: NodeFacts) -> Entries:
    """What is there whatever the Services are: tables, sets, maps, fixed chains, the addresses for node ports."""
    entries: Entries = {}
    for family in facts.families:
        entries[TableKey(family)] = Table()
        for found in CONTAINERS.values():
            if found.family is family:
                entries[SetKey(family, found.name)] = found
        for name, chain in _FixedChains(family, facts).chains():
            entries[ChainKey(family, name)] = chain
        for count in range(1, ALWAYS_THERE + 1):
            key, pick = pick_chain(container(family, "endpoints"), f"pick-{count}", count)
            entries[key] = pick
        for address in facts.node_port_addresses.get(family) or ():
            entries[container(family, "nodeport-ips").key(ip_address(address).packed)] = ""
    return entries


class _FixedChains:
    def __init__(self, family: Family, facts: NodeFacts) -> None:
        self.family = family
        self.facts = facts
        self.mark = facts.masquerade_mark
        self.detector = facts.detector(family)

    def _in(self, name: str) -> Piece:
        return x.in_set(container(self.family, name))

    def _vmap(self, name: str) -> Rule:
        return rule(x.vmap(container(self.family, name)))

    def chains(self) -> Iterator[tuple[str, Chain]]:
        family = self.family
        for name, rules in self._jumped().items():
            yield name, Chain(None, tuple(rules))
        new = x.ct_new()
        yield "filter-prerouting", Chain(Hook("filter", "prerouting", -110), (rule(new, x.jump("firewall")),))
        yield "filter-pre-output", Chain(Hook("filter", "output", -110), (rule(new, x.jump("firewall")),))
        yield "nat-prerouting", Chain(Hook("nat", "prerouting", -100), (rule(x.jump("services")),))
        yield "nat-output", Chain(Hook("nat", "output", -100), (rule(x.jump("services")),))
        yield "filter-input", Chain(Hook("filter", "input", 0), (rule(new, x.jump("new-input")),))
        yield "filter-forward", Chain(Hook("filter", "forward", 0), (rule(new, x.jump("new-forward")),))
        yield "filter-output", Chain(Hook("filter", "output", 0), (rule(new, x.jump("new-forward")),))
        masquerade = x.masquerade()
        yield (
            "nat-postrouting",
            Chain(
                Hook("nat", "postrouting", 100),
                (
                    rule(x.mark_is_set(self.mark), x.mark_xor(self.mark), masquerade),
                    rule(x.ct_dnat(), x.in_set(container(family, "hairpin")), masquerade, comment="hairpin"),
                ),
            ),
        )

    def _jumped(self) -> dict[str, list[Rule]]:
        mark, sticky = rule(x.mark_or(self.mark)), rule(x.dnat_affinity(container(self.family, "affinity")))
        return {
            REJECT: [rule(x.reject(self.family))],
            "masq": [mark],
            "sticky": [sticky],
            "masq-sticky": [mark, rule(x.goto("sticky"))],
            "local": self._local("local-services"),
            "local-sticky": self._local("local-services", sticky),
            "local-nodeport": self._local("local-nodeports"),
            "local-nodeport-sticky": self._local("local-nodeports", sticky),
            "nodeport": [self._vmap("nodeport-policies"), self._vmap("nodeports")],
            "services": self._services(),
            "firewall": [
                rule(
                    self._in("firewalled"),
                    x.not_in_set(container(self.family, "source-ranges")),
                    x.drop(),
                    comment="loadBalancerSourceRanges",
                )
            ],
            "remember": [self._vmap("learn"), self._vmap("learn-nodeports")],
            "new-forward": self._new_forward(),
            "new-input": [
                self._vmap("no-endpoints"),
                rule(*self._node_port(), x.vmap(container(self.family, "no-endpoint-nodeports"))),
                rule(x.ct_dnat(), x.jump("remember")),
            ],
        }

    def _services(self) -> list[Rule]:
        rules = []
        if self.facts.masquerade_all:
            rules.append(
                rule(self._in("cluster-ips"), x.mark_or(self.mark), comment="masquerade all cluster IP traffic")
            )
        elif self.detector:
            rules.append(
                rule(
                    self._in("cluster-ips"),
                    self._pod(self.detector, inverted=True),
                    x.mark_or(self.mark),
                    comment="masquerade cluster IP traffic from outside the cluster",
                )
            )
        rules += [self._vmap("policies"), self._vmap("services")]
        rules.append(rule(*self._node_port(), x.jump("nodeport")))
        return rules

    def _local(self, services: str, sticky: Rule | None = None) -> list[Rule]:
        """externalTrafficPolicy Local: this node's pods and processes go on as with Cluster, others stay here."""
        leave = x.goto("sticky") if sticky else x.return_()
        rules = []
        if self.detector:
            rules.append(rule(self._pod(self.detector), leave, comment="short-circuit pod traffic"))
        local = x.saddr_is_local()
        rules.append(rule(local, x.mark_or(self.mark), comment="masquerade local traffic"))
        rules.append(rule(local, leave, comment="short-circuit local traffic"))
        if sticky:
            rules.append(sticky)
        return [*rules, self._vmap(services), rule(x.accept())]

    def _new_forward(self) -> list[Rule]:
        rules = [
            self._vmap("no-endpoints"),
            rule(self._in("cluster-ips"), x.reject(self.family), comment="unknown port of a cluster IP"),
        ]
        rules.extend(
            rule(x.daddr(cidr), x.drop(), comment="unallocated cluster IP")
            for cidr in self.facts.service_cidrs.get(self.family, ())
        )
        return [*rules, rule(x.ct_dnat(), x.jump("remember"))]

    def _node_port(self) -> tuple[Piece, ...]:
        if self.facts.node_port_addresses.get(self.family) is not None:
            return (self._in("nodeport-ips"),)
        return (x.daddr_is_local(), x.not_daddr(LOOPBACK[self.family]))

    @staticmethod
    def _pod(detector: LocalDetector, *, inverted: bool = False) -> Piece:
        if detector.cidr:
            return x.not_saddr(detector.cidr) if inverted else x.saddr(detector.cidr)
        name = detector.interface or detector.interface_prefix
        prefix = not detector.interface
        return x.not_iifname(name, prefix=prefix) if inverted else x.iifname(name, prefix=prefix)
