"""Names of tables and chains (reference: sections 4.1.2 and 4.1.3)."""

from __future__ import annotations

from base64 import b32encode
from hashlib import sha256
from typing import Literal

from kproxy.model import ServicePortName

Table = Literal["filter", "nat", "mangle"]

SERVICES = "KUBE-SERVICES"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
FORWARD = "KUBE-FORWARD"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"
KUBELET_FIREWALL = "KUBE-FIREWALL"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQUERADE = "KUBE-MARK-MASQ"
CANARY = "KUBE-PROXY-CANARY"

CLUSTER_POLICY = "KUBE-SVC-"
LOCAL_POLICY = "KUBE-SVL-"
EXTERNAL = "KUBE-EXT-"
FIREWALL = "KUBE-FW-"
ENDPOINT = "KUBE-SEP-"
SERVICE_PREFIXES = (CLUSTER_POLICY, LOCAL_POLICY, EXTERNAL, FIREWALL, ENDPOINT)

HASHED_BYTES = 10  # 16 characters of base32


def hash16(text: str) -> str:
    """What makes a chain's name its own; the kernel's names are short."""
    return b32encode(sha256(text.encode()).digest()[:HASHED_BYTES]).decode()


def identity(name: ServicePortName) -> str:
    """What the names of a service port's chains are made from; for those of its endpoints, `address:port` follows."""
    return f"{name}{name.protocol.lower()}"
