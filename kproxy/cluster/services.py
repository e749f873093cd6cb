"""From a Service object to its service ports, for each family (reference: section 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kproxy.api.objects import PROXY_NAME_LABEL, Service, ServicePortSpec
from kproxy.model import (
    Family,
    Protocol,
    ServiceName,
    ServicePort,
    ServicePortName,
    canonical_address,
    canonical_cidr,
)

DEFAULT_AFFINITY_SECONDS = 10800
_TOO_MANY_SECONDS = 1 << 53  # in milliseconds, more than 64 bits
Note = Callable[[str], None]

# Stands for source ranges that cannot be read and leave a family without any: nobody sends from these addresses.
_NOBODY = {Family.IPv4: "0.0.0.0/32", Family.IPv6: "::/128"}


def is_ours(service: Service) -> bool:
    """Whether the Service has a cluster IP and is left to this proxy: not headless, ExternalName or another's."""
    spec = service.spec
    if spec.cluster_ip in ("", "None") or spec.type == "ExternalName":
        return False
    return PROXY_NAME_LABEL not in (service.metadata.labels or {})


def service_ports(
    service: Service, families: Iterable[Family], note: Note, *, allow_external_ips: bool = True
) -> tuple[ServicePort, ...]:
    """The service ports of a Service in the families that it has an address of. `note` hears what was left out."""
    if not is_ours(service):
        return ()
    ports: list[ServicePort] = []
    for family in families:
        cluster_ip = _cluster_ip(service, family, note)
        if cluster_ip:
            ports.extend(_ports_of_family(service, family, cluster_ip, note, allow_external_ips))
    return tuple(ports)


def _cluster_ip(service: Service, family: Family, note: Note) -> str:
    spec = service.spec
    candidate = ""
    if not spec.ip_families:
        candidate = spec.cluster_ip
    elif family.name in spec.ip_families:
        index = spec.ip_families.index(family.name)
        cluster_ips = spec.cluster_ips or []
        candidate = cluster_ips[index] if index < len(cluster_ips) else ""
    if not candidate:
        return ""
    try:
        address = canonical_address(candidate)
    except ValueError as error:
        note(f"spec.clusterIP {candidate!r} is not an address: {error}")
        return ""
    return address if Family.of(address) is family else ""


def _ports_of_family(
    service: Service, family: Family, cluster_ip: str, note: Note, allow_external_ips: bool
) -> Iterable[ServicePort]:
    spec = service.spec
    name = ServiceName(service.metadata.namespace, service.metadata.name)
    external_ips = _addresses(spec.external_ips or [], family, "spec.externalIPs", note)
    vips = _addresses(
        [i.ip for i in service.status.load_balancer.ingress or [] if i.ip and i.ip_mode in (None, "VIP")],
        family,
        "status.loadBalancer.ingress",
        note,
    )
    reachable_by_spec = spec.type in ("LoadBalancer", "NodePort") or bool(spec.external_ips)
    external_local = spec.external_traffic_policy == "Local" and reachable_by_spec
    source_ranges = _source_ranges(spec.load_balancer_source_ranges or [], family, note)
    affinity_seconds = _affinity_seconds(service, note)
    seen: set[tuple[str, Protocol]] = set()
    for port in spec.ports or []:
        protocol = _protocol(port, note)
        if protocol is None or not _is_port(port.port, f"port {port.name or port.port}: port", note):
            continue
        if (port.name, protocol) in seen:
            note(f"port {port.name or port.port}: a second one with this name and protocol is left out")
            continue
        seen.add((port.name, protocol))
        node_port = port.node_port
        if node_port and not _is_port(node_port, f"port {port.name or port.port}: nodePort", note):
            node_port = 0
        yield ServicePort(
            name=ServicePortName(name.namespace, name.name, port.name, protocol),
            family=family,
            cluster_ip=cluster_ip,
            port=port.port,
            node_port=node_port,
            external_ips=external_ips if allow_external_ips else (),
            load_balancer_ips=vips,
            source_ranges=source_ranges,
            affinity_seconds=affinity_seconds,
            internal_local=spec.internal_traffic_policy == "Local",
            external_local=external_local,
            health_check_node_port=_health_check_port(service, external_local),
            externally_accessible=bool(node_port or vips or external_ips),
            created=service.metadata.creation_timestamp or "",
        )


def _protocol(port: ServicePortSpec, note: Note) -> Protocol | None:
    try:
        return Protocol(port.protocol)
    except ValueError:
        note(f"port {port.name or port.port}: protocol {port.protocol!r} is not TCP, UDP or SCTP")
        return None


def _is_port(number: int, field: str, note: Note) -> bool:
    if 0 < number < 1 << 16:
        return True
    note(f"{field} {number} is not in the range 1 to 65535 and is left out")
    return False


def _addresses(texts: Iterable[str], family: Family, field: str, note: Note) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in texts:
        try:
            address = canonical_address(text.strip())
        except ValueError:
            if text.strip():
                note(f"{field}: {text!r} is not an address and is left out")
            continue
        if Family.of(address) is family:
            found[address] = None
    return tuple(found)


def _source_ranges(texts: list[str], family: Family, note: Note) -> tuple[str, ...]:
    cidrs: list[str] = []
    for text in texts:
        try:
            cidrs.append(canonical_cidr(text))
        except ValueError as error:
            note(f"spec.loadBalancerSourceRanges: {text!r} is left out: {error}")
    ours = tuple(dict.fromkeys(cidr for cidr in cidrs if Family.of(cidr) is family))
    if not ours and len(cidrs) < len(texts):  # what cannot be read may have been meant for this family
        note(f"spec.loadBalancerSourceRanges: no {family.name} range can be read, so nobody is let in by it")
        return (_NOBODY[family],)
    return () if any(cidr.endswith("/0") for cidr in ours) else ours


def _affinity_seconds(service: Service, note: Note) -> int:
    if service.spec.session_affinity != "ClientIP":
        return 0
    config = service.spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if not seconds:
        return DEFAULT_AFFINITY_SECONDS
    if not 0 < seconds < _TOO_MANY_SECONDS:
        note(f"timeoutSeconds {seconds} of the session affinity cannot be: {DEFAULT_AFFINITY_SECONDS} it is")
        return DEFAULT_AFFINITY_SECONDS
    return seconds


def _health_check_port(service: Service, external_local: bool) -> int:
    wanted = service.spec.type == "LoadBalancer" and external_local
    return service.spec.health_check_node_port if wanted else 0
