"""The actions that end by themselves: sync once, dry run, explain, clean up, initialise."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from kproxy import sysctl
from kproxy.cli import difference
from kproxy.cli.assembly import api_connection, gather, machine, source
from kproxy.cli.invocation import Invocation, UsageError
from kproxy.config.v1alpha1 import Configuration, ProxyMode
from kproxy.conntrack import load_module
from kproxy.dataplane.base import ApplyError, UnsupportedError
from kproxy.explain import Action, Node, Packet
from kproxy.model import Family, Protocol, canonical_address
from kproxy.modes.iptables import Iptables
from kproxy.modes.remains import Succession, places
from kproxy.node_addresses import local_addresses, supported_families
from kproxy.observers import Cleaned, Logged

log = structlog.get_logger(__name__)


def conntrack_limits(configuration: Configuration) -> sysctl.ConntrackLimits:
    """The configuration's conntrack part as the sysctls want it."""
    part = configuration.conntrack
    return sysctl.ConntrackLimits(
        max_per_core=part.max_per_core,
        min=part.min,
        tcp_established_timeout=part.tcp_established_timeout.seconds,
        tcp_close_wait_timeout=part.tcp_close_wait_timeout.seconds,
        tcp_be_liberal=part.tcp_be_liberal,
        udp_timeout=part.udp_timeout.seconds,
        udp_stream_timeout=part.udp_stream_timeout.seconds,
    )


def initialise(configuration: Configuration, more: Sequence[sysctl.Setting] = ()) -> None:
    """Write the sysctls that the configuration asks for, and those of a mode: all, or none. Raises SysctlError."""
    load_module()
    settings = sysctl.conntrack_settings(conntrack_limits(configuration), sysctl.host_cpus())
    for setting in sysctl.apply([*settings, *more]):
        log.info("set", file=f"/{setting.path}", value=setting.value)


def init_only(invocation: Invocation) -> None:
    """Do what needs more than CAP_NET_ADMIN, for a proxy that has no more. Raises what the start of one raises."""
    initialise(invocation.configuration)
    match invocation.configuration.mode:
        case ProxyMode.IPTABLES:
            Iptables(invocation.configuration, supported_families(), writes=True).open_localhost()
        case ProxyMode.IPVS:
            from kproxy.modes.ipvs import Ipvs  # with pyroute2: 22 MB that other modes do without

            opened = Ipvs(invocation.configuration, invocation.settings, supported_families())
            opened.prepare()
            opened.close()
        case _:
            pass


def sync_once(invocation: Invocation) -> int:
    """Bring the kernel up to date and return. 1 if a Service was refused. Raises what a sync raises."""
    connection = api_connection(invocation)  # first: without it nothing is written
    parts = machine(invocation, writes=True)
    gather(parts, source(invocation, connection))
    cleaned = Cleaned(parts.reconciler, local_addresses, None)
    started = time.monotonic()
    report = parts.reconciler.sync()
    seconds = time.monotonic() - started
    for observer in (Logged(), cleaned):
        observer.sync_done(report, seconds)
    cleaned.clean_now()
    succession = Succession(
        parts.families,
        parts.mode,
        excluded=parts.configuration.ipvs.exclude_cidrs,
        masquerade_mark=parts.reconciler.facts.masquerade_mark,
    )
    if succession.remove_now():
        log.warning("what stays of ipvs mode goes when kproxy starts again, or with --cleanup")
    return 1 if parts.reconciler.quarantine else 0


def dry_run(invocation: Invocation, *, as_json: bool, color: bool) -> int:
    """Print what a sync would change, and change nothing. 0: nothing, 1: something."""
    parts = machine(invocation, writes=False)
    gather(parts, source(invocation, api_connection(invocation)))
    differences = parts.reconciler.plan()
    dataplane = parts.opened.dataplane
    remains = []
    excluded = parts.configuration.ipvs.exclude_cidrs
    for place in places(parts.families, but=parts.mode, excluded=excluded, ahead=True):
        try:
            if found := place():
                remains.append(found)
        except (UnsupportedError, OSError) as error:
            log.warning("cannot tell what another mode left", error=str(error))
    mode, node = parts.mode.value, parts.state.node_name
    if as_json:
        print(difference.as_json(differences, remains, dataplane, mode=mode, node=node))
    else:
        for line in difference.as_text(differences, remains, dataplane, mode=mode, node=node, color=color):
            print(line)
    return 1 if differences or remains else 0


def clean_up(invocation: Invocation) -> int:
    """Remove what a kproxy or kube-proxy left in any mode, or only list it.

    What cannot be removed does not keep the rest; it is told at the end. Returns 1 if something is only listed. Raises
    ApplyError.
    """
    faults = []
    found = []
    only_list = invocation.only_list
    for place in places(supported_families(), excluded=invocation.configuration.ipvs.exclude_cidrs):
        try:
            remains = place()
            if remains is None:
                continue
            if not only_list:
                remains.remove()
            found.append(remains)
        except PermissionError:  # nothing else will be permitted
            raise
        except (ApplyError, UnsupportedError, OSError) as error:
            faults.append(str(error))
    done = "would remove" if only_list else "removed"
    for what in found:
        for change in what.changes:
            print(f"{done} {what.describe(change.key, change.old)}")
    if faults:
        raise ApplyError("\n".join(faults))
    if not found:
        print("there is nothing of kproxy's or kube-proxy's in the kernel")
    return 1 if found and only_list else 0


def explain_packet(invocation: Invocation) -> int:
    """Print what happens to one packet: `explain SOURCE DESTINATION:PORT[/PROTOCOL] [INTERFACE]`. 0 if it arrives."""
    packet = _packet(invocation.operands)
    parts = machine(invocation, writes=False)
    gather(parts, source(invocation, api_connection(invocation)))
    addresses = local_addresses()
    if not packet.interface and packet.source not in addresses:
        packet = Packet(packet.source, packet.destination, packet.port, packet.protocol, "?")
    routes = [route for service in parts.state.services() for route in parts.state.routes(service)]
    found = parts.opened.explain(packet, routes, Node(parts.reconciler.facts, addresses))
    for reason in found.reasons:
        print(reason)
    for endpoint in found.endpoints:
        masquerade = ", masqueraded" if found.is_masqueraded(endpoint) else ""
        print(f"→ {endpoint} (1 in {len(found.endpoints)}{masquerade})")
    print(found.action)
    return 0 if found.action in (Action.DNAT, Action.PASS) else 1


def _packet(operands: tuple[str, ...]) -> Packet:
    form = "explain SOURCE DESTINATION:PORT[/PROTOCOL] [INTERFACE]"
    if not 2 <= len(operands) <= 3:
        raise UsageError([f"expected {form}, for instance explain 10.244.1.7 10.96.0.10:53/UDP"])
    source_text, target, *interface = operands
    where, _, protocol = target.partition("/")
    address, _, port = where.rpartition(":")
    if not address:
        raise UsageError([f"expected {form}: {where!r} has no port"])
    try:
        packet = Packet(_address(source_text), _address(address), _port(port), _protocol(protocol), *interface)
    except ValueError as error:
        raise UsageError([f"expected {form}: {error}"]) from error
    if Family.of(packet.source) is not packet.family:
        raise UsageError([f"explain: {packet.source} and {packet.destination} are not of one family"])
    return packet


def _address(text: str) -> str:
    try:
        return canonical_address(text.removeprefix("[").removesuffix("]"))
    except ValueError as error:
        raise ValueError(f"{text!r} is not an IP address") from error


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 1 << 16:
        return int(text)
    raise ValueError(f"{text!r} is not a port number")


def _protocol(text: str) -> Protocol:
    try:
        return Protocol(text.upper() or "TCP")
    except ValueError as error:
        raise ValueError(f"{text!r} is none of {', '.join(Protocol)}") from error
