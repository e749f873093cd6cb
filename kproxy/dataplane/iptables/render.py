"""From routes to the rules that kube-proxy writes for a service port (reference: section 4.1.6). Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network

from msgspec.structs import replace

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.entries import BlockKey, ChainKey
from kproxy.dataplane.iptables.localhost import LOOPBACK
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.options import LOCALHOST_ACCEPTED, Options
from kproxy.dataplane.iptables.parse import HOST_MASK, REJECT_REPLY
from kproxy.dataplane.iptables.rule import (
    AddressType,
    Comment,
    Dnat,
    Interface,
    Jump,
    Match,
    Network,
    Nfacct,
    Recent,
    Reject,
    Rule,
    Statistic,
    Target,
    Transport,
    probability,
)
from kproxy.model import Endpoint, NodeFacts, Outcome, Route

_MARK = Jump(names.MARK_MASQUERADE)
_DROP = Jump("DROP")
_FROM_NODE = AddressType(source="LOCAL")


def render_route(route: Route, facts: NodeFacts, options: Options) -> Entries:
    """The entries of one service port."""
    return _ServicePort(route, facts, options).entries()


@lru_cache(maxsize=4096)
def _one_of(count: int) -> Statistic:
    return Statistic(probability(count))


class _ServicePort:
    def __init__(self, route: Route, facts: NodeFacts, options: Options) -> None:
        self.route = route
        self.port = route.service_port
        self.family = route.service_port.family
        self.options = options
        self.masquerade_all = facts.masquerade_all
        self.detector = facts.detector(self.family)
        self.node_ip = facts.node_ip(self.family)
        self.text = str(self.port.name)
        self.protocol = self.port.name.protocol.lower()
        self.identity = names.identity(self.port.name)
        digest = names.hash16(self.identity)
        self.cluster_chain = names.CLUSTER_POLICY + digest
        self.local_chain = names.LOCAL_POLICY + digest
        self.external_chain = names.EXTERNAL + digest
        self.firewall_chain = names.FIREWALL + digest
        self.internal_policy = self.local_chain if self.port.internal_local else self.cluster_chain
        self.external_policy = self.local_chain if self.port.external_local else self.cluster_chain
        # An address that is a load balancer's and an external IP has the rules of both, as with kube-proxy.
        owned = {frontend.address for _, frontend in route.frontends}
        self.cluster_ips = [ip for ip in (self.port.cluster_ip,) if ip in owned]
        self.external_ips = [ip for ip in self.port.external_ips if ip in owned]
        self.load_balancers = [ip for ip in self.port.load_balancer_ips if ip in owned]
        self.has_node_port = "" in owned
        self.has_firewall = route.has_any and bool(self.load_balancers and self.port.source_ranges)
        self.plain_comment = Comment(self.text)
        self.endpoint_chains = {
            text: names.ENDPOINT + names.hash16(self.identity + text)
            for text in dict.fromkeys(map(str, (*route.cluster, *route.local)))
        }

    def entries(self) -> Entries:
        entries: Entries = {}
        blocks: defaultdict[tuple[Table, str], list[Rule]] = defaultdict(list)
        for table, chain, rule in self._dispatch():
            blocks[table, chain].append(rule)
        for (table, chain), rules in blocks.items():
            entries[BlockKey(self.family, table, chain, self.text, rules[0].protocol)] = tuple(rules)
        for chain, chain_rules in self._chains():
            entries[ChainKey(self.family, "nat", chain)] = tuple(chain_rules)
        return entries

    def _dispatch(self) -> Iterator[tuple[Table, str, Rule]]:
        """Rules of the chains that all services share."""
        route = self.route
        for address in self.cluster_ips:
            match route.internal:
                case Outcome.CLUSTER | Outcome.LOCAL:
                    rule = self._to(address, f"{self.text} cluster IP", Jump(self.internal_policy))
                    yield "nat", names.SERVICES, rule
                case outcome:
                    yield "filter", names.SERVICES, self._refused(outcome, address)
        for address in self.external_ips:
            if route.has_any:
                rule = self._to(address, f"{self.text} external IP", Jump(self.external_chain))
                yield "nat", names.SERVICES, rule
            yield from self._unless_external(address)
        for address in self.load_balancers:
            if route.has_any:
                first = self.firewall_chain if self.has_firewall else self.external_chain
                yield "nat", names.SERVICES, self._to(address, f"{self.text} loadbalancer IP", Jump(first))
            if self.has_firewall:
                comment = f"{self.text} traffic not accepted by {self.firewall_chain}"
                yield "filter", names.PROXY_FIREWALL, self._to(address, comment, _DROP)
            yield from self._unless_external(address)
        if self.has_node_port:
            yield from self._node_port()
        if self.port.health_check_node_port:
            health = (
                Comment(f"{self.text} health check node port"),
                Transport("tcp", self.port.health_check_node_port),
            )
            yield "filter", names.NODE_PORTS, Rule(health, Jump("ACCEPT"), "tcp")

    def _node_port(self) -> Iterator[tuple[Table, str, Rule]]:
        at_port = Transport(self.protocol, self.port.node_port)
        if self.route.has_any:
            target = Jump(self.external_chain)
            if self.options.guards_localhost(self.family) and LOCALHOST_ACCEPTED in self.options.counters:
                counted = (self.plain_comment, at_port, Nfacct(LOCALHOST_ACCEPTED))
                rule = Rule(counted, target, self.protocol, destination=Network(LOOPBACK[self.family]))
                yield "nat", names.NODE_PORTS, rule
            yield "nat", names.NODE_PORTS, Rule((self.plain_comment, at_port), target, self.protocol)
        if self.route.external in (Outcome.DROP, Outcome.REJECT):
            comment, verdict = self._verdict(self.route.external)
            matches = (comment, AddressType(destination="LOCAL"), at_port)
            yield "filter", names.EXTERNAL_SERVICES, Rule(matches, verdict, self.protocol)

    def _unless_external(self, address: str) -> Iterator[tuple[Table, str, Rule]]:
        if self.route.external in (Outcome.DROP, Outcome.REJECT):
            yield "filter", names.EXTERNAL_SERVICES, self._refused(self.route.external, address)

    def _refused(self, outcome: Outcome, address: str) -> Rule:
        comment, verdict = self._verdict(outcome)
        return self._to(address, comment.text, verdict)

    def _verdict(self, outcome: Outcome) -> tuple[Comment, Target]:
        if outcome is Outcome.REJECT:
            return Comment(f"{self.text} has no endpoints"), Reject(REJECT_REPLY[self.family])
        return Comment(f"{self.text} has no local endpoints"), _DROP

    def _to(self, address: str, comment: str, target: Target) -> Rule:
        matches = (Comment(comment), Transport(self.protocol, self.port.port))
        return Rule(matches, target, self.protocol, destination=self._host(address))

    def _host(self, address: str) -> Network:
        return Network(f"{address}/{self.family.bits}")

    def _chains(self) -> Iterator[tuple[str, Sequence[Rule]]]:
        """The chains of this service port alone."""
        route = self.route
        if route.cluster:
            yield self.cluster_chain, [*self._marks(self.cluster_chain), *self._balance(route.cluster)]
        if route.local:
            yield self.local_chain, [*self._marks(self.local_chain), *self._balance(route.local)]
        if route.has_any and self.port.externally_accessible:
            yield self.external_chain, list(self._external())
        if self.has_firewall:
            yield self.firewall_chain, list(self._firewall())
        for text, chain in self.endpoint_chains.items():
            yield chain, self._endpoint(text, chain)

    def _marks(self, chain: str) -> Iterator[Rule]:
        """Masquerades connections to the cluster IP that do not come from a pod."""
        if chain != self.internal_policy or not (self.masquerade_all or self.detector):
            return
        for address in self.cluster_ips:
            rule = self._to(address, f"{self.text} cluster IP", _MARK)
            yield rule if self.masquerade_all else self._from_pods(rule, inverted=True)

    def _from_pods(self, rule: Rule, *, inverted: bool = False) -> Rule:
        """The same rule for local pods, or for everyone else."""
        if self.detector.cidr:
            return replace(rule, source=Network(self.detector.cidr, inverted))
        name = self.detector.interface or f"{self.detector.interface_prefix}+"
        return replace(rule, in_interface=Interface(name, inverted))

    def _external(self) -> Iterator[Rule]:
        destinations = f"{self.text} external destinations"
        if self.port.external_local:
            everywhere = Jump(self.cluster_chain)
            if self.detector:
                yield self._from_pods(Rule((Comment(f"pod traffic for {destinations}"),), everywhere))
            yield Rule((Comment(f"masquerade LOCAL traffic for {destinations}"), _FROM_NODE), _MARK)
            yield Rule((Comment(f"route LOCAL traffic for {destinations}"), _FROM_NODE), everywhere)
        else:
            yield Rule((Comment(f"masquerade traffic for {destinations}"),), _MARK)
        if self.route.external in (Outcome.CLUSTER, Outcome.LOCAL):
            yield Rule((), Jump(self.external_policy))

    def _firewall(self) -> Iterator[Rule]:
        """Who may use the load balancer's addresses. If the node may, so may they, should they be on this node."""
        comment = Comment(f"{self.text} loadbalancer IP")
        target = Jump(self.external_chain)
        sources = [Network(cidr) for cidr in self.port.source_ranges]
        if any(ip_address(self.node_ip) in ip_network(cidr) for cidr in self.port.source_ranges):
            sources += map(self._host, self.load_balancers)
        for source in sources:
            yield Rule((comment,), target, source=source)
        yield Rule((Comment(f"other traffic to {self.text} will be dropped by {names.PROXY_FIREWALL}"),))

    def _balance(self, endpoints: Sequence[Endpoint]) -> Iterator[Rule]:
        texts = [str(endpoint) for endpoint in endpoints]
        chains = [self.endpoint_chains[text] for text in texts]
        comments = [self._endpoint_comment(f"{self.text} -> {text}") for text in texts]
        if self.port.affinity_seconds:
            for chain, comment in zip(chains, comments, strict=True):
                known = Recent(chain, HOST_MASK[self.family], self.port.affinity_seconds)
                yield Rule((*comment, known), Jump(chain))
        left = len(endpoints)
        for chain, comment in zip(chains, comments, strict=True):
            yield Rule((*comment, _one_of(left)) if left > 1 else comment, Jump(chain))
            left -= 1

    def _endpoint(self, text: str, chain: str) -> tuple[Rule, Rule]:
        matches = self._endpoint_comment(self.text)
        # Who reaches itself through its service must be masqueraded, or it answers itself.
        address = text.rpartition(":")[0].strip("[]")
        hairpin = Rule(matches, _MARK, source=self._host(address))
        if self.port.affinity_seconds:
            matches += (Recent(chain, HOST_MASK[self.family]),)
        return hairpin, Rule((*matches, Transport(self.protocol)), Dnat(text), self.protocol)

    def _endpoint_comment(self, text: str) -> tuple[Match, ...]:
        return () if self.family in self.options.large_clusters else (Comment(text),)
