"""Services for the cluster lab, with the fields that an API server would have filled in."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]


def port(number: int, *, target: int | str = 80, node_port: int = 0, protocol: str = "TCP", name: str = "") -> Object:
    """A port of a Service."""
    spec: Object = {"name": name, "protocol": protocol, "port": number, "targetPort": target}
    return spec | {"nodePort": node_port} if node_port else spec


def service(name: str, *cluster_ips: str, app: str = "", ports: list[Object] | None = None, **spec: Any) -> Object:
    """A Service of type ClusterIP, or what `spec` says; it selects the pods with the label app=<app or its name>.

    The first address decides the primary family; two make it dual-stack.
    """
    families = ["IPv6" if ":" in address else "IPv4" for address in cluster_ips]
    defaults: Object = {
        "type": "ClusterIP",
        "clusterIP": cluster_ips[0],
        "clusterIPs": list(cluster_ips),
        "ipFamilies": families,
        "ipFamilyPolicy": "RequireDualStack" if len(families) > 1 else "SingleStack",
        "selector": {"app": app or name},
        "sessionAffinity": "None",
        "internalTrafficPolicy": "Cluster",
        "ports": ports or [port(80)],
    }
    if spec.get("type") in ("NodePort", "LoadBalancer"):
        defaults["externalTrafficPolicy"] = "Cluster"
    return _object(name, defaults | spec)


def load_balancer(name: str, cluster_ip: str, ingress: str, **spec: Any) -> Object:
    """A Service of type LoadBalancer to which a cloud has given an address."""
    made = service(name, cluster_ip, type="LoadBalancer", allocateLoadBalancerNodePorts=False, **spec)
    return made | {"status": {"loadBalancer": {"ingress": [{"ip": ingress, "ipMode": "VIP"}]}}}


def headless(name: str, *, app: str) -> Object:
    """A Service that names pods in the DNS and has no address of its own."""
    return service(name, "None", app=app, ipFamilies=["IPv4"])


def external_name(name: str, target: str) -> Object:
    """A Service that is an alias in the DNS."""
    return _object(name, {"type": "ExternalName", "externalName": target})


def _object(name: str, spec: Object) -> Object:
    metadata = {"name": name, "namespace": "default", "labels": {}}
    return {"kind": "Service", "apiVersion": "v1", "metadata": metadata, "spec": spec}
