"""Names of chains must be kube-proxy's, or its rules would not be recognised."""

from __future__ import annotations

import pytest

from kproxy.dataplane.iptables.names import hash16, identity
from kproxy.model import Protocol, ServicePortName


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (ServicePortName("kube-system", "kube-dns", "dns", Protocol.UDP), "TCOU7JCQXEZGVUNU"),
        (ServicePortName("kube-system", "kube-dns", "dns-tcp", Protocol.TCP), "ERIFXISQEP7F7OF4"),
        (ServicePortName("default", "kubernetes", "https", Protocol.TCP), "NPX46M4PTMTKRN6Y"),
        (ServicePortName("default", "nginx", "", Protocol.TCP), "2CMXP7HKUVJN7L6M"),
        (ServicePortName("ns1", "svc1", "p80", Protocol.TCP), "XPGD46QRK7WJZT7O"),
        (ServicePortName("ns1", "svc1", "p80", Protocol.UDP), "OJWW7NSBVZTDHXNW"),
        (ServicePortName("ns1", "svc1", "p80", Protocol.SCTP), "GFCIFIA5VTFSTMSM"),
    ],
    ids=str,
)
def test_of_a_service_port(name: ServicePortName, expected: str) -> None:
    assert hash16(identity(name)) == expected


@pytest.mark.parametrize(
    ("name", "endpoint", "expected"),
    [
        (ServicePortName("default", "kubernetes", "https", Protocol.TCP), "172.18.0.2:6443", "V2PECCYPB6X2GSCW"),
        (ServicePortName("kube-system", "kube-dns", "dns", Protocol.UDP), "10.244.0.2:53", "YIL6JZP7A3QYXJU2"),
        (ServicePortName("kube-system", "kube-dns", "dns", Protocol.UDP), "[fd00:10:244::2]:53", "2RL23PDDHWGDTTIH"),
    ],
    ids=str,
)
def test_of_an_endpoint(name: ServicePortName, endpoint: str, expected: str) -> None:
    assert hash16(identity(name) + endpoint) == expected
