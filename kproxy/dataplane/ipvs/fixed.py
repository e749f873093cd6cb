"""What is there whatever the Services are: the device, sets, chains, jumps, most rules (reference: section 4.2)."""

from __future__ import annotations

from kproxy.dataplane.base import Entries
from kproxy.dataplane.iptables.entries import EXISTS, ChainKey, JumpKey
from kproxy.dataplane.ipvs.blocks import blocks
from kproxy.dataplane.ipvs.entries import DeviceKey
from kproxy.dataplane.ipvs.jumps import BUILT_IN, CHAINS, jumps_from
from kproxy.dataplane.ipvs.options import Options
from kproxy.dataplane.ipvs.sets import render_sets
from kproxy.model import NodeFacts


def render_base(facts: NodeFacts, options: Options) -> Entries:
    """The entries of every family that is served."""
    entries: Entries = {DeviceKey(): EXISTS}
    for family in facts.families:
        entries |= render_sets(family)
        for table, chain in CHAINS:
            entries[ChainKey(family, table, chain)] = EXISTS
        for block in blocks(family, facts, options):
            if not block.while_filled:
                entries[block.key] = block.rules
        for table, chain in BUILT_IN:
            for place, jump in enumerate(jumps_from(table, chain)):
                entries[JumpKey(family, table, chain, place)] = jump.rule
    return entries
