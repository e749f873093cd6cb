"""Where the watched kinds are served, and which of their objects concern a proxy (reference: section 1.1)."""

from __future__ import annotations

import msgspec

from kproxy.api.objects import HEADLESS_LABEL, PROXY_NAME_LABEL, EndpointSlice, Kind, Object, Service


class Resource(msgspec.Struct, frozen=True):
    """A kind of objects, its path and its selectors. An `optional` one may be missing or forbidden."""

    kind: Kind
    path: str
    selectors: dict[str, str] = {}
    optional: bool = False


def watched(node_name: str) -> tuple[Resource, ...]:
    """What a proxy on a node watches."""
    return (
        Resource(
            "Service",
            "/api/v1/services",
            {"labelSelector": f"!{PROXY_NAME_LABEL}", "fieldSelector": "spec.clusterIP!=None"},
        ),
        Resource("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices", {"labelSelector": f"!{HEADLESS_LABEL}"}),
        Resource("Node", "/api/v1/nodes", {"fieldSelector": f"metadata.name={node_name}"}),
        Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", optional=True),
    )


def concerns_us(item: Object) -> bool:
    """Whether an object passes the selectors, for servers that ignore them and for manifests.

    Of Nodes all pass: whoever keeps the state knows which one is ours.
    """
    match item:
        case Service():
            return PROXY_NAME_LABEL not in (item.metadata.labels or ()) and item.spec.cluster_ip != "None"
        case EndpointSlice():
            return HEADLESS_LABEL not in (item.metadata.labels or ())
        case _:
            return True
