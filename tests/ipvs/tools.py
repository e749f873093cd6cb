"""Sets and rules of ipvs mode written and read with the tools that administrators have."""

from __future__ import annotations

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.entries import ChainKey, JumpKey
from kproxy.dataplane.ipvs.chains import chain_entries, laid_out
from kproxy.dataplane.ipvs.entries import MemberKey, RuleKey, SetKey, SetKind, SetType
from kproxy.model import Family
from tests.iptables.tables import BUILT_IN, Tables, read_tables, restore_text
from tests.lab.namespaces import Namespace

_PROGRAM = {Family.IPv4: "iptables", Family.IPv6: "ip6tables"}
_HASH_FAMILY = {Family.IPv4: "inet", Family.IPv6: "inet6"}
_EMPTY = "*filter\nCOMMIT\n*nat\nCOMMIT\n"


def write(netns: Namespace, variant: str, entries: Entries, family: Family) -> None:
    """Make the sets, with their members, and the rules of one family."""
    sets, members = [], []
    for key, value in entries.items():
        match key, value:
            case SetKey(name), SetType(SetKind.PORT, of):
                sets += [f"create {name} bitmap:port range 0-65535"] if of is family else []
            case SetKey(name), SetType(kind, of):
                sets += [f"create {name} {kind} family {_HASH_FAMILY[of]}"] if of is family else []
            case MemberKey(name, member), _:
                members.append(f"add {name} {member}")
    netns.command("ipset", "restore", stdin="\n".join([*sets, *members, ""]))
    tables: Tables = {table: {chain: [] for chain in chains} for table, chains in BUILT_IN.items()}
    for key, rules in laid_out(entries).items():
        if key.family is family:
            tables[key.table][key.chain] = list(rules)
    for key, value in entries.items():
        if isinstance(key, JumpKey) and key.family is family:
            tables[key.table][key.chain].append(value)
    netns.command(f"{_PROGRAM[family]}-{variant}-restore", stdin=restore_text(tables))


def read(netns: Namespace, variant: str, family: Family) -> Entries:
    """The rules, and the members with their text in the place of `Member`."""
    saved = netns.command(f"{_PROGRAM[family]}-{variant}-save").stdout.splitlines()
    entries = chain_entries(family, read_tables(saved, family))
    for line in netns.command("ipset", "save").stdout.splitlines():
        verb, name, text, *_ = line.split()
        if verb == "add":
            entries[MemberKey(name, text)] = True
    return entries


def readable(entries: Entries, family: Family) -> Entries:
    """What `read` gives back of entries that were written."""
    found: Entries = {}
    for key, value in entries.items():
        match key:
            case ChainKey(of) | RuleKey(of) | JumpKey(of):
                if of is family:
                    found[key] = value
            case MemberKey(name, member):
                found[MemberKey(name, str(member))] = True
    return found


def forget(netns: Namespace, variant: str, family: Family) -> None:
    """Remove everything again."""
    netns.command(f"{_PROGRAM[family]}-{variant}-restore", stdin=_EMPTY)
    netns.command("ipset", "destroy")
