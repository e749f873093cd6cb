"""What a kube-proxy or kproxy in ipvs mode left (reference: section 4.2.6).

Rules, in both variants of iptables, and the rest. Rules go first: a set cannot be destroyed while one names it. Unlike
kube-proxy's, this leaves others' virtual servers alone, and takes away the IPv6 sets, too. Some chains are those of
iptables mode as well, under the same names: while that is in place they stay, without what came from ipvs mode.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kproxy.dataplane.base import ApplyError, Change, Entries, Key, UnsupportedError, Value, diff
from kproxy.dataplane.iptables import commands
from kproxy.dataplane.iptables import entries as iptables_mode
from kproxy.dataplane.iptables import jumps as iptables_jumps
from kproxy.dataplane.iptables import names as iptables_names
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey
from kproxy.dataplane.iptables.names import Table
from kproxy.dataplane.iptables.refusal import RefusedError
from kproxy.dataplane.iptables.rule import Jump, OpaqueRule, Rule, SetMatch
from kproxy.dataplane.iptables.variant import contents
from kproxy.dataplane.ipvs import device, ipset, tables
from kproxy.dataplane.ipvs.addresses import usable
from kproxy.dataplane.ipvs.describe import describe
from kproxy.dataplane.ipvs.entries import STRAY, DeviceKey, RealServerKey, RuleKey, SetKey, SetType, VirtualServerKey
from kproxy.dataplane.ipvs.jumps import CHAINS, JUMPS
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.dataplane.ipvs.ownership import Ownership
from kproxy.model import Family, Protocol
from kproxy.node_addresses import local_addresses

_SHARED = frozenset(where for where in CHAINS if where in iptables_mode.DISPATCH or where in iptables_mode.FIXED)
_OWN = frozenset(CHAINS) - _SHARED
_OF_IPTABLES_MODE = ("nat", iptables_names.NODE_PORTS)  # a chain that ipvs mode never has


def rules_left(variant: Variant, families: Sequence[Family]) -> list[Change]:
    """Chains, rules and jumps to remove of one variant. Changes nothing. Raises UnsupportedError and OSError."""
    held = contents(variant, families).chains
    ours = {family for family, table, chain in held if (table, chain) in _OWN}
    if not ours:
        return []
    if absent := commands.missing(variant, families):
        raise UnsupportedError(
            f"the {variant} variant of iptables holds rules of ipvs mode, but {', '.join(absent)} missing"
        )
    in_use = {family for family in families if (family, *_OF_IPTABLES_MODE) in held}
    found = tables.read(variant, [family for family in families if family in ours])
    return [change for change in diff({}, found) if _goes(change.key, change.old, in_use)]


def remove_rules(variant: Variant, changes: Iterable[Change]) -> None:
    """Remove what `rules_left` found. Raises ApplyError."""
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
    """Virtual servers, the device and sets to remove. Changes nothing, loads no module. Raises OSError.

    Real servers, addresses and members go with them. `excluded`: CIDRs whose virtual servers stay.
    """
    sets = ipset.read(families) if Path("/sys/module/ip_set").exists() else {}
    noted = sets | dict.fromkeys(device.addresses(), EXISTS)
    found: dict[Key, Value] = {}
    if noted and Path("/proc/thread-self/net/ip_vs").exists():
        found |= _virtual_servers(families, noted, Ownership(excluded))
    if device.index():
        found[DeviceKey()] = EXISTS
    found |= {key: value for key, value in sets.items() if isinstance(value, SetType)}
    return diff({}, found)


def _virtual_servers(families: Sequence[Family], noted: Entries, ownership: Ownership) -> dict[Key, Value]:
    from kproxy.dataplane.ipvs.servers import Servers  # with pyroute2, which machines without ipvs mode need not load

    known = local_addresses(DEVICE)
    local = {address for family in families for address in usable(known, family)}
    with Servers() as servers:
        present = {server.key: server.value for server in servers.virtual_servers()}
    candidates = [key for key in present if key.family in families]
    return {key: present[key] for key in ownership.ours(candidates, noted, local)}


def quiesce(changes: Iterable[Change]) -> set[VirtualServerKey]:
    """Of the virtual servers to remove, those with TCP connections; these get no new ones. Raises ApplyError."""
    from kproxy.dataplane.ipvs.servers import Servers

    busy: set[VirtualServerKey] = set()
    try:
        with Servers() as servers:
            for change in changes:
                if isinstance(change.key, VirtualServerKey) and change.key.protocol is Protocol.TCP:
                    in_use = [real.key for real in servers.real_servers(change.key) if real.connections]
                    if in_use:
                        busy.add(change.key)
                        servers.quiesce(in_use)
    except (OSError, UnsupportedError) as error:
        raise ApplyError(str(error), transient=True) from error
    return busy


def remove_servers(changes: Sequence[Change]) -> None:
    """Remove what `servers_left` found, as far as possible. Raises ApplyError."""
    virtual_servers = [change.key for change in changes if isinstance(change.key, VirtualServerKey)]
    sets = [change.key for change in changes if isinstance(change.key, SetKey)]
    values = {change.key: change.old for change in changes}
    try:
        failed: dict[Key, str] = {}
        if virtual_servers:
            from kproxy.dataplane.ipvs.servers import Servers

            with Servers() as servers:
                failed |= _explained(servers.remove(virtual_servers))
        if DeviceKey() in values:
            device.remove()
        if sets:
            failed |= {key: ipset.explain(code) for key, code in ipset.destroy(sets).items()}
    except (OSError, UnsupportedError) as error:
        raise ApplyError(str(error), transient=True) from error
    if failed:
        text = "; ".join(f"{describe(key, values[key])}: {why}" for key, why in failed.items())
        raise ApplyError(text, tuple(failed))


def _explained(codes: Mapping[VirtualServerKey | RealServerKey, int]) -> dict[Key, str]:
    return {key: os.strerror(code) for key, code in codes.items()}


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
