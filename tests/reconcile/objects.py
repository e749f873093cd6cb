"""Small Services, their slices and a Node, as the API has them, and a configuration."""

from __future__ import annotations

from typing import Any

from tests.lab.cluster_objects import port, service

Object = dict[str, Any]

WEB_IP = "10.96.0.10"
NODE = "here"
NODE_IPS = ("192.168.0.2", "fd00::c0a8:2")
DAY = 86400
CONFIGURATION: Object = {  # what a kproxy on that node needs of a configuration file
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    "oomScoreAdj": 0,
    "conntrack": {"maxPerCore": 0},
    "hostnameOverride": NODE,
}


def endpoints(service_name: str, *addresses: str, target: int = 8080, port_name: str = "", number: int = 1) -> Object:
    """A slice of a Service with ready IPv4 endpoints on other nodes."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{number}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": "IPv4",
        "ports": [{"name": port_name, "port": target, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "nodeName": "elsewhere"} for address in addresses],
    }


def web(*addresses: str) -> list[Object]:
    """The Service default/web on 10.96.0.10:80, with two endpoints unless told otherwise."""
    return [service("web", WEB_IP), endpoints("web", *(addresses or ("10.0.0.1", "10.0.0.2")))]


def services(count: int) -> list[Object]:
    """Services default/svc-0, default/svc-1 … on 10.97.0.0:80 and following, with one endpoint each."""
    made: list[Object] = []
    for n in range(count):
        made += [service(f"svc-{n}", f"10.97.{n >> 8}.{n & 255}"), endpoints(f"svc-{n}", f"10.1.{n >> 8}.{n & 255}")]
    return made


def sticky(name: str, cluster_ip: str, seconds: int = DAY) -> list[Object]:
    """A Service whose clients stay with their endpoint, with one endpoint."""
    config = {"clientIP": {"timeoutSeconds": seconds}}
    wanted = service(name, cluster_ip, sessionAffinity="ClientIP", sessionAffinityConfig=config)
    return [wanted, endpoints(name, "10.0.0.66")]


def refused(name: str = "refused", cluster_ip: str = "10.96.0.66", *, seconds: int = 10**11) -> list[Object]:
    """The kernel refuses this: it counts timeouts in nanoseconds, and has 64 bits for them."""
    return sticky(name, cluster_ip, seconds)


def node(*, pod_cidrs: tuple[str, ...] = (), name: str = NODE) -> Object:
    """The Node that the tests are on."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDRs": list(pod_cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in NODE_IPS]},
    }


__all__ = [
    "DAY",
    "NODE",
    "NODE_IPS",
    "WEB_IP",
    "Object",
    "endpoints",
    "node",
    "port",
    "refused",
    "service",
    "services",
    "sticky",
    "web",
]
