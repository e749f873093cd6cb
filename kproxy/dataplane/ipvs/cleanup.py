"""What a kube-proxy or kproxy in ipvs mode left (reference: section 4.2.6).

To be removed in this order: virtual servers and the device with its addresses; the rules, in both variants of iptables;
the sets, which cannot go while a rule names them. So the rule that refuses other ports outlasts the addresses. Unlike
kube-proxy's, this leaves others' virtual servers alone, and takes away the IPv6 sets, too. Some chains are those of
iptables mode as well, under the same names: while that is in place they stay, without what came from ipvs mode.

Where connections shall last, their virtual servers stay, and the device with the addresses of these. While it is there,
so is what guards it, and what the node itself connects to these addresses is masqueraded: it has them as its source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kproxy.dataplane.base import ApplyError, Change, Entries, Key, UnsupportedError, Value, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables import entries as iptables_mode
from kproxy.dataplane.iptables import jumps as iptables_jumps
from kproxy.dataplane.iptables import names as iptables_names
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.refusal import RefusedError
from kproxy.dataplane.iptables.rule import Conntrack, Jump, OpaqueRule, Rule, SetMark, SetMatch
from kproxy.dataplane.iptables.variant import chains
from kproxy.dataplane.ipvs import device, ipset, names, tables
from kproxy.dataplane.ipvs.addresses import usable
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import (
    STRAY,
    AddressKey,
    DeviceKey,
    Member,
    MemberKey,
    RealServer,
    RuleKey,
    SetKey,
    SetType,
    VirtualServerKey,
)
from kproxy.dataplane.ipvs.jumps import CHAINS, JUMPS
from kproxy.dataplane.ipvs.ownership import Ownership
from kproxy.model import Family, Protocol
from kproxy.node_addresses import local_addresses

_SHARED = frozenset(where for where in CHAINS if where in iptables_mode.DISPATCH or where in iptables_mode.FIXED)
_OWN = frozenset(CHAINS) - _SHARED
_OF_IPTABLES_MODE = ("nat", iptables_names.NODE_PORTS)  # a chain that ipvs mode never has

# While the device is there: what refuses ports of its addresses that no Service has, and what masquerades.
GUARDS: frozenset[tuple[Table, str]] = frozenset({("filter", names.IPVS_FILTER), ("filter", names.IPVS_OUT_FILTER)})
# Sets of what the first one lets pass; and all that they name.
_SERVED = (names.LOAD_BALANCER_SET, names.CLUSTER_IP_SET, names.EXTERNAL_IP_SET, names.EXTERNAL_IP_LOCAL_SET)
_NAMED = (*_SERVED, names.HEALTH_CHECK_SET, names.ADDRESSES_SET)


def rules_left(variant: Variant, families: Sequence[Family], *, iptables_mode_comes: bool = False) -> list[Change]:
    """Chains, rules and jumps to remove of one variant. Changes nothing. Raises UnsupportedError and OSError.

    `iptables_mode_comes`: it is in place, or will be before they are removed.
    """
    held = chains(variant, families)
    ours = {family for family, table, chain in held if (table, chain) in _OWN}
    if not ours:
        return []
    if absent := commands.missing(variant, families):
        raise UnsupportedError(
            f"the {variant} variant of iptables holds rules of ipvs mode, but {', '.join(absent)} missing"
        )
    in_use = {family for family in families if iptables_mode_comes or (family, *_OF_IPTABLES_MODE) in held}
    found = tables.read(variant, [family for family in families if family in ours])
    return [change for change in diff({}, found) if _goes(change.key, change.old, in_use)]


def needed_rules(found: Iterable[Change], mark: int) -> Entries:
    """What is to stay of what `rules_left` found, or to come, while virtual servers are busy.

    `mark`: the packet mark by which the mode that is in place now masquerades.
    """
    needed: Entries = {}
    for change in found:
        match change.key:
            case RuleKey(_, "filter", names.IPVS_OUT_FILTER):
                pass
            case ChainKey(family, "filter", names.IPVS_OUT_FILTER):
                needed[change.key] = EXISTS
                addresses = SetMatch(names.set_name(names.ADDRESSES_SET, family), "src")
                masqueraded = Rule((Conntrack("NEW"), addresses), SetMark(mark, mark))
                # As it is found again; ipvs mode, should it come back, does not want it.
                key = RuleKey(family, "filter", names.IPVS_OUT_FILTER, STRAY, str(masqueraded))
                needed[key] = (masqueraded,)
            case key if is_needed(change):
                needed[key] = change.old
    return needed


def write_rules(variant: Variant, changes: Iterable[Change]) -> None:
    """Make changes to what `rules_left` found. Raises ApplyError."""
    by_family: dict[Family, list[Change]] = {}
    for change in changes:
        match change.key:
            case ChainKey(family) | RuleKey(family) | JumpKey(family):
                by_family.setdefault(family, []).append(change)
            case key:
                raise TypeError(f"{key!r} has nothing to do with iptables")
    for family, of_family in by_family.items():
        try:
            tables.write(variant, family, of_family)
        except RefusedError as error:
            raise ApplyError(str(error), error.culprits, transient=error.transient) from error
        except OSError as error:
            raise ApplyError(str(error), transient=True) from error


def servers_left(families: Sequence[Family], excluded: Iterable[str] = ()) -> list[Change]:
    """Virtual servers and the device to remove. Changes nothing, loads no module. Raises OSError.

    Real servers and addresses go with them. `excluded`: CIDRs whose virtual servers stay.
    """
    noted = _sets(families) | dict.fromkeys(device.addresses(), EXISTS)
    found: dict[Key, Value] = {}
    if noted and Path("/proc/thread-self/net/ip_vs").exists():
        found |= _virtual_servers(families, noted, Ownership(excluded, {}))
    if device.index():
        found[DeviceKey()] = EXISTS
    return diff({}, found)


def sets_left(families: Sequence[Family]) -> list[Change]:
    """Sets to remove; their members go with them. Changes nothing, loads no module. Raises OSError."""
    return diff({}, {key: value for key, value in _sets(families).items() if isinstance(value, SetType)})


def _sets(families: Iterable[Family]) -> Entries:
    return ipset.read(families) if Path("/sys/module/ip_set").exists() else {}


def _virtual_servers(families: Sequence[Family], noted: Entries, ownership: Ownership) -> dict[Key, Value]:
    from kproxy.dataplane.ipvs.servers import Servers  # with pyroute2, which machines without ipvs mode need not load

    known = local_addresses(names.DEVICE)
    local = {address for family in families for address in usable(known, family)}
    with Servers() as servers:
        present = {server.key: server.value for server in servers.virtual_servers()}
    candidates = [key for key in present if key.family in families]
    return {key: present[key] for key in ownership.ours(candidates, noted, local)}


def busy(changes: Iterable[Change]) -> set[VirtualServerKey]:
    """Of the virtual servers to remove, those with TCP connections. Raises UnsupportedError and OSError."""
    candidates = [change.key for change in changes if isinstance(change.key, VirtualServerKey)]
    if not candidates:
        return set()
    from kproxy.dataplane.ipvs.servers import Servers

    with Servers() as servers:
        return {
            key
            for key in candidates
            if key.protocol is Protocol.TCP and any(real.connections for real in servers.real_servers(key))
        }


def is_needed(change: Change) -> bool:
    """Whether an entry is needed while virtual servers are busy: the device, its guard, what tells which are ours."""
    match change.key:
        case DeviceKey():
            return True
        case ChainKey(_, table, chain) | RuleKey(_, table, chain):
            return (table, chain) in GUARDS
        case JumpKey():
            return isinstance(change.old, Rule) and change.old.target in [Jump(chain) for _, chain in GUARDS]
        case SetKey(name):
            # The last one tells which virtual servers on the node's own addresses are ours.
            return name in _in_kernel(*_NAMED, names.NODE_PORT_SET[Protocol.TCP])
        case _:
            return False


def remove_servers(changes: Iterable[Change], staying: Collection[VirtualServerKey] = ()) -> None:
    """Remove what `servers_left` found, as far as possible. Raises ApplyError.

    `staying`: busy virtual servers. They get no new connections, and keep those that they have, with their addresses.
    """
    going = {change.key: change.old for change in changes if isinstance(change.key, VirtualServerKey)}
    failed: dict[Key, str] = {}
    try:
        # Before the virtual servers: the rules still let their ports pass, and something else may listen there.
        if staying:
            failed |= _leave_only(staying)
        else:
            device.remove()
        if going:
            from kproxy.dataplane.ipvs.servers import Servers

            with Servers() as servers:
                failed |= _refused(going, servers.remove(going))
    except (OSError, UnsupportedError) as error:
        raise ApplyError(str(error), transient=True) from error
    if failed:
        raise ApplyError("; ".join(failed.values()), tuple(failed))


def _leave_only(staying: Collection[VirtualServerKey]) -> dict[Key, str]:
    """Leave no other address on the device, and no other port that the guard lets pass. Returns what was refused."""
    from kproxy.dataplane.ipvs.servers import Servers

    with Servers() as servers:
        real = dict.fromkeys((real.key for key in staying for real in servers.real_servers(key)), RealServer(0))
        failed = _refused(real, servers.quiesce(real))
    needed = {AddressKey(key.family, key.address) for key in staying}
    sets = _sets({key.family for key in staying})
    shut = {key: EXISTS for key in sets if isinstance(key, MemberKey) and _lets_pass(key, needed, staying)}
    failed |= _refused(shut, ipset.delete(shut), ipset.explain)
    unused = dict.fromkeys(device.addresses() - needed, EXISTS)
    failed |= _refused(unused, device.unbind(unused))
    unguarded = {
        MemberKey(names.set_name(names.ADDRESSES_SET, family), Member(address)): EXISTS for family, address in unused
    }
    return failed | _refused(unguarded, ipset.delete(unguarded), ipset.explain)


def _lets_pass(key: MemberKey, needed: Collection[AddressKey], staying: Collection[VirtualServerKey]) -> bool:
    """Whether it is for a member of a set that the guard lets a port pass which nobody serves any more."""
    address, protocol, port, _ = key.member
    if not protocol or key.set_name not in _in_kernel(*_SERVED):
        return False
    family = Family.of(address)
    return AddressKey(family, address) in needed and VirtualServerKey(family, address, protocol, port) not in staying


def _in_kernel(*sets: str) -> set[str]:
    return {names.set_name(name, family) for name in sets for family in Family}


def remove_sets(changes: Iterable[Change]) -> None:
    """Remove what `sets_left` found, as far as possible. Raises ApplyError."""
    values = {change.key: change.old for change in changes if isinstance(change.key, SetKey)}
    try:
        failed = _refused(values, ipset.destroy(values), ipset.explain)
    except OSError as error:
        raise ApplyError(str(error), transient=True) from error
    if failed:
        raise ApplyError("; ".join(failed.values()), tuple(failed))


def _refused(
    values: Mapping[Any, Value], codes: Mapping[Any, int], explain: Callable[[int], str] = os.strerror
) -> dict[Key, str]:
    return {key: f"{describe(key, values[key])}: {explain(code)}" for key, code in codes.items()}


def _goes(key: Key, value: Value | None, in_use: set[Family]) -> bool:
    """Whether an entry goes. `in_use`: the families in which iptables mode is in place."""
    match key:
        case ChainKey(family, table, chain):
            return family not in in_use or (table, chain) in _OWN
        case RuleKey(family, table, chain, place):
            if family not in in_use or (table, chain) in _OWN:
                return True
            return place != STRAY and any(map(_is_ipvs_mode, value if isinstance(value, tuple) else ()))
        case JumpKey(family, table, chain):
            return family not in in_use or (
                value in _rules_of(JUMPS, table, chain) and value not in _rules_of(iptables_jumps.JUMPS, table, chain)
            )
        case _:
            return False


def _is_ipvs_mode(rule: Rule | OpaqueRule) -> bool:
    """Whether a rule in a chain that both modes have makes no sense in iptables mode."""
    if isinstance(rule, OpaqueRule):
        return False
    own = {chain for _, chain in _OWN}
    return any(isinstance(match, SetMatch) for match in rule.matches) or (
        isinstance(rule.target, Jump) and rule.target.to in own
    )


def _rules_of(jumps: Sequence[iptables_jumps.BuiltInJump], table: Table, chain: str) -> list[Rule]:
    return [jump.rule for jump in jumps if (jump.table, jump.chain) == (table, chain)]
