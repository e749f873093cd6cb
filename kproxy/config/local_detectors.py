"""How traffic of local pods is told from the rest, per family (reference: sections 3.3 and 8.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kproxy.config.errors import ConfigError
from kproxy.config.v1alpha1 import Configuration
from kproxy.model import DetectLocalMode, Family, LocalDetector, canonical_cidr


def local_detectors(
    config: Configuration, pod_cidrs: Sequence[str], families: Sequence[Family]
) -> dict[Family, LocalDetector]:
    """The detectors of the families that are served; a family without a CIDR has none.

    `pod_cidrs` are the node's `spec.podCIDRs`, for NodeCIDR mode. Raises ConfigError where a mode lacks what it needs.
    """
    match config.detect_local_mode:
        case DetectLocalMode.BRIDGE_INTERFACE:
            return dict.fromkeys(families, LocalDetector(interface=config.detect_local.bridge_interface))
        case DetectLocalMode.INTERFACE_NAME_PREFIX:
            return dict.fromkeys(families, LocalDetector(interface_prefix=config.detect_local.interface_name_prefix))
        case DetectLocalMode.CLUSTER_CIDR:
            cidrs = config.cluster_cidr.split(",") if config.cluster_cidr else []
            return _of_served_families("clusterCIDR", cidrs, families)
        case DetectLocalMode.NODE_CIDR:
            if not pod_cidrs:
                raise ConfigError(["detectLocalMode: NodeCIDR needs spec.podCIDRs of the Node, and the Node has none"])
            return _of_served_families("spec.podCIDRs of the Node", pod_cidrs, families)


def _of_served_families(source: str, cidrs: Iterable[str], families: Sequence[Family]) -> dict[Family, LocalDetector]:
    first: dict[Family, LocalDetector] = {}
    for cidr in map(canonical_cidr, cidrs):
        first.setdefault(Family.of(cidr), LocalDetector(cidr=cidr))
    served = {family: first[family] for family in families if family in first}
    if first and not served:
        cidrs = ", ".join(detector.cidr for detector in first.values())
        raise ConfigError([f"{source}: {cidrs}: none is {families[0].name}, the only family that this node serves"])
    return served
