"""Who may receive the traffic of a service port on this node (reference: sections 2.1 and 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

from kproxy.model import Endpoint, Frontend, FrontendKind, Route, ServicePort, TopologyMode


def route(
    service_port: ServicePort,
    endpoints: Sequence[Endpoint],
    *,
    node_name: str,
    zone: str,
    frontends: tuple[tuple[FrontendKind, Frontend], ...] = (),
) -> Route:
    """The route of a service port: the endpoints for cluster-wide and for local traffic, in the given order."""
    ready = [e for e in endpoints if e.ready]
    mode, reason = TopologyMode.NONE, ""
    cluster: list[Endpoint] = []
    local: list[Endpoint] = []
    has_any = False
    if service_port.uses_cluster_endpoints:
        mode, reason = topology(ready, node_name, zone)
        cluster = [e for e in ready if _near(e, mode, node_name, zone)]
        if not cluster:
            cluster = [e for e in endpoints if e.usable_while_terminating]
        has_any = bool(cluster)
    if service_port.uses_local_endpoints:
        local = [e for e in ready if e.local]
        if not local:
            local = [e for e in endpoints if e.local and e.usable_while_terminating]
        has_any = has_any or bool(ready) or any(e.usable_while_terminating for e in endpoints)
    return Route(
        service_port=service_port,
        cluster=tuple(cluster),
        local=tuple(local),
        has_any=has_any,
        here=tuple(e for e in endpoints if e.local),
        ready_here=tuple(e.address for e in ready if e.local) if service_port.health_check_node_port else (),
        topology=mode,
        topology_reason=reason,
        frontends=frontends,
    )


def topology(ready: Sequence[Endpoint], node_name: str, zone: str) -> tuple[TopologyMode, str]:
    """Which hints hold among the ready endpoints, and why the others do not."""
    if not any(e.zone_hints or e.node_hints for e in ready):
        return TopologyMode.NONE, ""
    reasons = []
    if not all(e.node_hints for e in ready):
        reasons.append("not every ready endpoint has a node hint")
    elif any(node_name in e.node_hints for e in ready):
        return TopologyMode.SAME_NODE, f"endpoints are hinted for node {node_name}"
    else:
        reasons.append(f"no endpoint is hinted for node {node_name}")
    if not all(e.zone_hints for e in ready):
        reasons.append("not every ready endpoint has a zone hint")
    elif not zone:
        reasons.append("this node has no zone label")
    elif any(zone in e.zone_hints for e in ready):
        return TopologyMode.SAME_ZONE, f"endpoints are hinted for zone {zone}"
    else:
        reasons.append(f"no endpoint is hinted for zone {zone}")
    return TopologyMode.NONE, "; ".join(reasons)


def _near(endpoint: Endpoint, mode: TopologyMode, node_name: str, zone: str) -> bool:
    match mode:
        case TopologyMode.NONE:
            return True
        case TopologyMode.SAME_NODE:
            return node_name in endpoint.node_hints
        case TopologyMode.SAME_ZONE:
            return zone in endpoint.zone_hints


def frontends(service_port: ServicePort) -> tuple[tuple[FrontendKind, Frontend], ...]:
    """Every address under which clients reach a service port.

    An address that is both a load balancer's and an external IP counts as the load balancer's, so that its source
    ranges hold.
    """
    family, protocol, port = service_port.family, service_port.name.protocol, service_port.port
    found = {Frontend(family, service_port.cluster_ip, protocol, port): FrontendKind.CLUSTER_IP}
    for address in service_port.load_balancer_ips:
        found.setdefault(Frontend(family, address, protocol, port), FrontendKind.LOAD_BALANCER)
    for address in service_port.external_ips:
        found.setdefault(Frontend(family, address, protocol, port), FrontendKind.EXTERNAL_IP)
    if service_port.node_port:
        found[Frontend(family, "", protocol, service_port.node_port)] = FrontendKind.NODE_PORT
    return tuple((kind, frontend) for frontend, kind in found.items())
