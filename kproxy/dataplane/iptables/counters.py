"""The packet counters of rules, by frontend and endpoint.

Only a connection's first packet passes the nat table, so its counters count connections. Of a rule that only one
service port has, where it goes is all that matters here: such rules are too many to be taken apart at each scrape.

Who writes to a legacy table replaces it by one that has counted nothing, and adds the old counts a moment later. A
reader comes in between more often than one would think: every fourth time, with 7,000 rules and somebody who writes all
the time. The jumps to our chains tell: all that was counted passed them, and nobody writes them anew.
"""

from __future__ import annotations

import errno
import subprocess
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

from kproxy.dataplane.iptables import names
from kproxy.dataplane.iptables.commands import TornError, Variant, attempts, program
from kproxy.dataplane.iptables.entries import BUILT_IN
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.parse import parse_rule
from kproxy.dataplane.iptables.rule import Jump, Network, Rule, Transport
from kproxy.dataplane.iptables.variant import legacy_tables
from kproxy.model import Family, Frontend, Protocol

_DNAT = "-j DNAT --to-destination "
_JUMP = "-j "
_BALANCED_IN = (names.CLUSTER_POLICY, names.LOCAL_POLICY)
_SECONDS = 1.0  # in which to meet a legacy table that has its counts, or an nf_tables that has no commit in hand


class Taken(NamedTuple):
    """First packets that a frontend's rule has taken to a service port's chains."""

    chain: str
    packets: int

    @property
    def hash16(self) -> str:
        """Tells the service port: `names.hash16`."""
        return _hash16(self.chain)


class Given(NamedTuple):
    """First packets that were sent to an endpoint."""

    hash16: str
    rule: int  # another where the rule is another one
    destination: str  # address:port
    packets: int


class Translated(NamedTuple):
    """What the nat table has counted in one family."""

    frontends: dict[Frontend, Taken]
    endpoints: list[Given]


class RuleCounters:
    """Reads the counters of one variant in the calling thread's network namespace, without a lock."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._came: dict[tuple[Family, Table], int] = {}  # what the jumps to our chains had counted

    def translated(self, family: Family) -> Translated:
        """Read the nat table. Raises OSError.

        Taken are also packets that no rule translated in the end; `dropped` has them.
        """
        frontends: dict[Frontend, Taken] = {}
        balanced: dict[str, str] = {}  # an endpoint's chain: the hash of the service port that jumps there
        given: dict[str, tuple[int, str, int]] = {}
        for packets, chain, rule in self._rules(family, "nat"):
            if chain.startswith(names.ENDPOINT):
                _, found, destination = rule.rpartition(_DNAT)
                if found and destination.rpartition(":")[2].isdigit():
                    given.setdefault(chain, (hash(rule), destination, packets))
            elif chain.startswith(_BALANCED_IN):
                target = rule.rpartition(_JUMP)[2]
                if target.startswith(names.ENDPOINT):
                    balanced[target] = _hash16(chain)
            elif chain == names.SERVICES:
                # An address that is a load balancer's and an external IP has a rule of each. Who meets the second has
                # passed the first.
                if taken := _taken(rule, packets, family):
                    frontends.setdefault(*taken)
            elif chain == names.NODE_PORTS and (taken := _taken(rule, packets, family)):
                frontend = taken[0]._replace(address="")  # loopback may have a rule of its own
                before = frontends.get(frontend)
                frontends[frontend] = Taken(taken[1].chain, packets + (before.packets if before else 0))
        endpoints = [Given(balanced[chain], *rest) for chain, rest in given.items() if chain in balanced]
        return Translated(frontends, endpoints)

    def dropped(self, family: Family) -> Counter[Frontend]:
        """Packets to frontends that the filter table has dropped after nat had taken them. Raises OSError.

        That is where source ranges leave a client out, or where the policy is Local and no endpoint is on this node.
        """
        found: Counter[Frontend] = Counter()
        for packets, chain, rule in self._rules(family, "filter"):
            if chain in (names.PROXY_FIREWALL, names.EXTERNAL_SERVICES):
                parsed = parse_rule(rule, family)
                frontend = _frontend(parsed, family) if isinstance(parsed, Rule) else None
                if frontend and parsed.target == Jump("DROP"):
                    found[frontend] += packets
        return found

    def _rules(self, family: Family, table: Table) -> Generator[tuple[int, str, str], None, None]:
        """The rules of our chains in a table: packets, chain, and what follows `-A CHAIN `."""
        known = self._came.get((family, table), 0) if self._variant is Variant.LEGACY else 0
        for last in attempts(_SECONDS):
            came = 0
            with closing(_saved(self._variant, family, table)) as saved:
                for packets, chain, rule in saved:
                    if (table, chain) in BUILT_IN:  # in legacy tables they come first
                        came += packets if rule.rpartition(_JUMP)[2].startswith("KUBE-") else 0
                    elif came < known and not last:
                        break
                    else:
                        yield packets, chain, rule
                else:
                    self._came[family, table] = came
                    return


def _saved(variant: Variant, family: Family, table: Table) -> Generator[tuple[int, str, str], None, None]:
    """All rules of a table as iptables-save prints them. Makes no table that there is not."""
    if variant is Variant.LEGACY and table not in legacy_tables(family):
        return
    command = [program(variant, family, "save"), "--counters", "--table", table]
    for _ in attempts(_SECONDS):
        try:
            yield from _printed(command)
        except TornError:
            continue
        return
    raise TornError(errno.EAGAIN, f"{' '.join(command)} prints chains twice, again and again")


def _printed(command: Sequence[str]) -> Generator[tuple[int, str, str], None, None]:
    """What the program prints. Raises TornError before anything else, if at all."""
    pipe = subprocess.PIPE
    line, complete = "", False
    chains: set[str] = set()
    begun = False
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace") as saving:
        for line in saving.stdout or ():
            if line.startswith("["):
                begun = True
                counters, _, chain, *rule = line.rstrip("\n").split(" ", 3)
                yield int(counters[1:].partition(":")[0]), chain, rule[0] if rule else ""
            elif line.startswith(":") and not begun:  # after that it is a line of somebody's comment
                chain = line.partition(" ")[0]
                if chain in chains:
                    raise TornError
                chains.add(chain)
            complete = complete or line == "COMMIT\n"
        reason = "".join(saving.stderr or ()).strip() or line.strip()
    if saving.returncode or not complete:  # a table that it does not understand is no error to iptables-nft-save
        raise OSError(f"{' '.join(command)}: {reason or f'exit status {saving.returncode}'}")


def _taken(text: str, packets: int, family: Family) -> tuple[Frontend, Taken] | None:
    """The frontend of a rule that takes everyone who comes to it to chains of a service port."""
    rule = parse_rule(text, family)
    if not isinstance(rule, Rule) or not isinstance(rule.target, Jump) or rule.source or rule.in_interface:
        return None
    frontend = _frontend(rule, family)
    if frontend is None or not rule.target.to.startswith(names.SERVICE_PREFIXES):
        return None
    return frontend, Taken(rule.target.to, packets)


def _frontend(rule: Rule, family: Family) -> Frontend | None:
    for match in rule.matches:
        if isinstance(match, Transport) and match.destination_port:
            address = _address(rule.destination)
            return Frontend(family, address, Protocol(match.protocol.upper()), match.destination_port)
    return None


def _address(destination: Network | None) -> str:
    return destination.cidr.partition("/")[0] if destination else ""


def _hash16(chain: str) -> str:
    return chain.rpartition("-")[2]
