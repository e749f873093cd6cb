"""Puts the parts together: source, state, node facts, dataplane, reconciler."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from kproxy.api.errors import ManifestError
from kproxy.api.events import Changed, Event, Listed, Source, Unavailable
from kproxy.api.objects import KINDS, Kind
from kproxy.cli.invocation import Action, Invocation
from kproxy.cluster import ClusterState
from kproxy.config.defaults import with_mode
from kproxy.config.errors import ConfigError
from kproxy.config.v1alpha1 import Configuration, ProxyMode
from kproxy.dataplane.base import UnsupportedError
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.dataplane.nftables.kernel import COUNTED_ENDPOINTS
from kproxy.facts import Facts
from kproxy.model import Family, NodeFacts
from kproxy.modes.base import Mode
from kproxy.modes.iptables import Iptables
from kproxy.modes.nftables import Nftables
from kproxy.modes.remains import in_place
from kproxy.node_addresses import local_addresses, supported_families
from kproxy.proxy import StartError
from kproxy.reconcile import Reconciler

if TYPE_CHECKING:
    from kproxy.api.client import Connection

log = structlog.get_logger(__name__)

GATHER_SECONDS = 10.0  # without any news of what is missing


def node_name(configuration: Configuration) -> str:
    """The name of this node: as configured, else the host's, in lower case. Raises ConfigError for none."""
    name = configuration.hostname_override or socket.gethostname().strip().lower()
    if not name:
        raise ConfigError(["this host has no name; give one with --hostname-override"])
    return name


def open_mode(invocation: Invocation, families: Sequence[Family], *, writes: bool) -> tuple[ProxyMode, Mode]:
    """The mode that is asked for, open, and its kernel settings as they were. Raises UnsupportedError and OSError.

    Where none is asked for: nftables if the kernel can, else iptables; if nothing is to be written, that which is in
    place.
    """
    mode = invocation.configuration.mode
    if mode is None and not writes:
        mode = in_place(families)
        if mode in (ProxyMode.IPTABLES, ProxyMode.IPVS):
            log.warning(
                f"no mode is given: this is about {mode.value} mode, whose rules are in place;"
                " a kproxy that runs without a mode takes nftables where the kernel can"
            )
    if mode is None or mode is ProxyMode.NFTABLES:
        try:
            return ProxyMode.NFTABLES, _open_nftables(invocation, families, writes=writes)
        except UnsupportedError as error:
            if mode:
                raise
            log.warning("nftables mode, the default, is not possible here; taking iptables mode", reason=str(error))
    if mode is ProxyMode.IPVS:
        from kproxy.modes.ipvs import Ipvs  # with pyroute2: 22 MB that other modes do without

        return mode, Ipvs(invocation.configuration, invocation.settings, families)
    configuration = with_mode(invocation.configuration, ProxyMode.IPTABLES)
    return ProxyMode.IPTABLES, Iptables(configuration, families, writes=writes)


def _open_nftables(invocation: Invocation, families: Sequence[Family], *, writes: bool) -> Mode:
    metrics = invocation.settings.service_metrics
    opened = Nftables(families, max(COUNTED_ENDPOINTS, metrics.limit) if metrics.enabled else 0)
    if writes:
        opened.kernel.probe()
    return opened


class Machine(msgspec.Struct):
    """A proxy for this machine that has not begun to sync."""

    configuration: Configuration
    mode: ProxyMode
    families: tuple[Family, ...]
    state: ClusterState
    opened: Mode
    facts: Facts
    reconciler: Reconciler


def _own_addresses() -> frozenset[str]:
    """This node's addresses, without those that belong to Services."""
    return local_addresses(exclude=DEVICE)


def machine(
    invocation: Invocation,
    *,
    writes: bool,
    addresses: Callable[[], frozenset[str]] = _own_addresses,
) -> Machine:
    """Everything but the source. `writes`: make ready for writing, and try first whether the kernel can do it.

    Raises UnsupportedError, ConfigError, SysctlError and OSError.
    """
    families = supported_families()
    mode, opened = open_mode(invocation, families, writes=writes)
    if writes:
        opened.prepare()
    configuration = with_mode(invocation.configuration, mode)

    def note(text: str) -> None:
        log.warning(text)

    state = ClusterState(
        node_name(configuration),
        families,
        note=note,
        started=time.time(),
        allow_external_ips=configuration.allow_external_ips,
    )
    warn = note if invocation.action is Action.RUN else _ignore
    facts = Facts(configuration, mode, families, state, addresses, warn, opened.large_families(state))
    provisional = facts() or NodeFacts(name=state.node_name, families=families)
    return Machine(
        configuration,
        mode,
        families,
        state,
        opened,
        facts,
        Reconciler(state, opened.dataplane, provisional),
    )


def _ignore(_: str) -> None:
    """For what concerns only a proxy that runs."""


def api_connection(
    invocation: Invocation, answered: Callable[[str, str, str, float], None] | None = None
) -> Connection | None:
    """The connection to the API server, which tells of its answers; None where manifests take its place.

    Nothing is sent yet. Raises ApiConfigError and ManifestError.
    """
    if invocation.manifests:
        if not invocation.manifests.exists():
            raise ManifestError((f"{invocation.manifests}: No such file or directory",))
        return None
    from kproxy.api.client import connect  # with kubernetes, which takes 34 MB

    client = invocation.configuration.client_connection
    return connect(invocation.kubeconfig, invocation.master, qps=client.qps, burst=client.burst, answered=answered)


def source(invocation: Invocation, connection: Connection | None) -> Source:
    """Where the objects come from. Each is loaded where it is used. Raises ConfigError."""
    if connection is None:
        assert invocation.manifests is not None  # noqa: S101 - else there is a connection
        from kproxy.api.manifests import ManifestSource

        return ManifestSource(invocation.manifests)
    from kproxy.api.server import ApiServerSource
    from kproxy.api.watch import Pace

    pace = Pace(relist=invocation.configuration.config_sync_period.seconds)
    return ApiServerSource(connection, node_name=node_name(invocation.configuration), pace=pace)


def gather(machine: Machine, source: Source) -> None:
    """Take in everything there is, once, and what it says of the node. Raises StartError if it does not come."""
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    source.start(inbox.put)
    deadline = time.monotonic() + GATHER_SECONDS
    missing: set[Kind] = set(KINDS)
    trouble = ""
    try:
        while missing:
            try:
                event = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                kinds = ", ".join(sorted(missing))
                raise StartError(f"gave up after {GATHER_SECONDS:.0f} s without a list of {kinds}{trouble}") from None
            machine.state.apply(event)
            match event:
                case Changed(kind) if kind in missing:  # a long list is on its way
                    deadline = time.monotonic() + GATHER_SECONDS
                case Listed(kind):
                    missing.discard(kind)
                case Unavailable(_, message):
                    trouble = f": {message.partition('; trying again')[0]}"
                case _:
                    pass
    finally:
        source.stop()
    facts = machine.facts()
    if facts is None:
        raise StartError(f"Node {machine.state.node_name} has no pod CIDRs, which detectLocalMode NodeCIDR needs")
    machine.reconciler.set_facts(facts)
