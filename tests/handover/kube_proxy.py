"""What a kube-proxy of version 1.36 leaves in the kernel, as text for iptables-restore and nft.

Written down from how kube-proxy names and orders things, without a line of kproxy's own rendering: so a hand-over is
tested against something else than itself. Services are of type NodePort, TCP, with policy Cluster and one unnamed port.
"""

from __future__ import annotations

from base64 import b32encode
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from kproxy.model import Family

COUNTERS = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")
COUNTED = "[7000:420000]"  # what each rule has counted when it is left behind


class Served(NamedTuple):
    """A Service with its endpoints in one family."""

    name: str  # namespace/name
    cluster_ip: str
    node_port: int
    endpoints: Sequence[str]  # addresses; all serve port 80
    here: Sequence[str]  # those of them that are on this node


def iptables_text(family: Family, pods: str, services: Iterable[Served], *, counters: bool) -> str:
    """The rules of iptables mode, for `--noflush --counters`. `counters`: the kernel has those of nfacct."""
    served = list(services)
    lines = ["*mangle", ":KUBE-PROXY-CANARY - [0:0]", "COMMIT", "*filter"]
    filter_chains = ("SERVICES", "EXTERNAL-SERVICES", "FORWARD", "NODEPORTS", "PROXY-FIREWALL", "PROXY-CANARY")
    lines += [f":KUBE-{chain} - [0:0]" for chain in filter_chains]
    lines += [f"-I {jump}" for jump in _FILTER_JUMPS]
    accounted = f" -m nfacct --nfacct-name {COUNTERS[0]}" if counters else ""
    lines += [
        f"-A KUBE-FORWARD -m conntrack --ctstate INVALID{accounted} -j DROP",
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
        (
            '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule"'
            " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        ),
    ]
    for service in served:
        lines += [] if service.endpoints else _refusals(family, service)
    lines += ["COMMIT", "*nat"]
    lines += [f":KUBE-{chain} - [0:0]" for chain in ("SERVICES", "NODEPORTS", "POSTROUTING", "MARK-MASQ")]
    lines += [":KUBE-PROXY-CANARY - [0:0]"]
    with_endpoints = [service for service in served if service.endpoints]
    for service in with_endpoints:
        lines += [f":{chain} - [0:0]" for chain in _chains(service)]
    lines += [f"-I {jump}" for jump in _NAT_JUMPS]
    lines += _NAT_FIXED
    for service in with_endpoints:
        lines += _translations(family, pods, service, counters=counters)
    loopback = "" if family is Family.IPv4 else "! -d ::1/128 "
    last = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
    lines.append(
        f'-A KUBE-SERVICES {loopback}-m comment --comment "{last}" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
    )
    lines.append("COMMIT")
    return "".join(f"{COUNTED} {line}\n" if line.startswith("-A") else f"{line}\n" for line in lines)


# In the order in which they are put in, each on top of those before it.
_EXTERNAL = '-m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals"'
_FIREWALL = '-m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall"'
_FILTER_JUMPS = (
    f"INPUT {_EXTERNAL} -j KUBE-EXTERNAL-SERVICES",
    f"FORWARD {_EXTERNAL} -j KUBE-EXTERNAL-SERVICES",
    'INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS',
    'FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    'OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    'FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    *(f"{chain} {_FIREWALL} -j KUBE-PROXY-FIREWALL" for chain in ("INPUT", "OUTPUT", "FORWARD")),
)
_NAT_JUMPS = (
    'OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    'PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    'POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
)
_NAT_FIXED = (
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
)


def _hash(text: str, length: int) -> str:
    return b32encode(sha256(text.encode()).digest()).decode()[:length]


def _target(family: Family, address: str) -> str:
    return f"{address}:80" if family is Family.IPv4 else f"[{address}]:80"


def _chains(service: Served) -> list[str]:
    own = _hash(f"{service.name}tcp", 16)
    return [f"KUBE-SVC-{own}", f"KUBE-EXT-{own}", *(_endpoint_chain(service, a) for a in service.endpoints)]


def _endpoint_chain(service: Served, address: str) -> str:
    return f"KUBE-SEP-{_hash(f'{service.name}tcp{_target(Family.of(address), address)}', 16)}"


def _refusals(family: Family, service: Served) -> Iterator[str]:
    reply = "icmp-port-unreachable" if family is Family.IPv4 else "icmp6-port-unreachable"
    comment = f'-p tcp -m comment --comment "{service.name} has no endpoints"'
    reject = f"-j REJECT --reject-with {reply}"
    yield f"-A KUBE-SERVICES -d {service.cluster_ip}/{family.bits} {comment} -m tcp --dport 80 {reject}"
    yield (
        f"-A KUBE-EXTERNAL-SERVICES {comment} -m addrtype --dst-type LOCAL -m tcp --dport {service.node_port} {reject}"
    )


def _translations(family: Family, pods: str, service: Served, *, counters: bool) -> Iterator[str]:
    name, width = service.name, family.bits
    policy, external, *_ = _chains(service)
    at_cluster_ip = f'-d {service.cluster_ip}/{width} -p tcp -m comment --comment "{name} cluster IP" -m tcp --dport 80'
    at_node_port = f'-p tcp -m comment --comment "{name}" -m tcp --dport {service.node_port}'
    yield f"-A KUBE-SERVICES {at_cluster_ip} -j {policy}"
    if counters and family is Family.IPv4:
        yield f"-A KUBE-NODEPORTS -d 127.0.0.0/8 {at_node_port} -m nfacct --nfacct-name {COUNTERS[1]} -j {external}"
    yield f"-A KUBE-NODEPORTS {at_node_port} -j {external}"
    yield f"-A {policy} ! -s {pods} {at_cluster_ip} -j KUBE-MARK-MASQ"
    yield f'-A {external} -m comment --comment "masquerade traffic for {name} external destinations" -j KUBE-MARK-MASQ'
    yield f"-A {external} -j {policy}"
    ordered = sorted(service.endpoints, key=lambda address: _target(family, address))
    for position, address in enumerate(ordered):
        left = len(ordered) - position
        chance = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        chain, target = _endpoint_chain(service, address), _target(family, address)
        yield f'-A {policy} -m comment --comment "{name} -> {target}"{chance} -j {chain}'
        yield f'-A {chain} -s {address}/{width} -m comment --comment "{name}" -j KUBE-MARK-MASQ'
        yield f'-A {chain} -p tcp -m comment --comment "{name}" -m tcp -j DNAT --to-destination {target}'


def nftables_text(family: Family, pods: str, node_ip: str, services: Iterable[Served]) -> str:
    """The table of nftables mode, for `nft -f`. Node ports are on the primary address."""
    ip, kind = ("ip", "ipv4_addr") if family is Family.IPv4 else ("ip6", "ipv6_addr")
    reply = "reject" if family is Family.IPv4 else "reject with icmpv6 port-unreachable"
    served = list(services)
    with_endpoints = [service for service in served if service.endpoints]
    without = [service for service in served if not service.endpoints]
    at = f"{kind} . inet_proto . inet_service"
    cluster_ips = [service.cluster_ip for service in served]
    return f"""
table {ip} kube-proxy {{
  comment "rules for kube-proxy";
  set cluster-ips {{ type {kind}; comment "Active ClusterIPs"; {_elements(cluster_ips)} }}
  set nodeport-ips {{ type {kind}; comment "IPs that accept NodePort traffic"; elements = {{ {node_ip} }}; }}
  set hairpin-connections {{
    type {kind} . {kind} . inet_proto . inet_service; comment "service hairpin connections";
    {_elements(f"{address} . {address} . tcp . 80" for s in served for address in s.here)}
  }}
  map no-endpoint-services {{
    type {at} : verdict;
    {_elements(f'{s.cluster_ip} . tcp . 80 comment "{s.name}" : goto reject-chain' for s in without)}
  }}
  map no-endpoint-nodeports {{
    type inet_proto . inet_service : verdict;
    {_elements(f'tcp . {s.node_port} comment "{s.name}" : goto reject-chain' for s in without)}
  }}
  map firewall-ips {{ type {at} : verdict; }}
  map service-ips {{
    type {at} : verdict;
    {_elements(f"{s.cluster_ip} . tcp . 80 : goto {_nft_chain('service', s)}" for s in with_endpoints)}
  }}
  map service-nodeports {{
    type inet_proto . inet_service : verdict;
    {_elements(f"tcp . {s.node_port} : goto {_nft_chain('external', s)}" for s in with_endpoints)}
  }}
  chain reject-chain {{ {reply}; }}
  chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}
  chain service-endpoints-check {{ {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
  chain nodeport-endpoints-check {{
    {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports;
  }}
  chain cluster-ips-check {{
    {ip} daddr @cluster-ips {reply} comment "Reject traffic to invalid ports of ClusterIPs";
  }}
  chain masquerading {{
    meta mark and 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random;
    ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random;
  }}
  {"".join(_nft_service_chains(ip, s) for s in with_endpoints)}
  chain services {{
    {ip} daddr @cluster-ips {ip} saddr != {pods} meta mark set meta mark or 0x4000;
    {ip} daddr . meta l4proto . th dport vmap @service-ips;
    {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports;
  }}
  chain filter-prerouting-pre-dnat {{
    type filter hook prerouting priority -110; ct state new jump firewall-check;
  }}
  chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}
  chain filter-input {{
    type filter hook input priority 0;
    ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check;
  }}
  chain filter-forward {{
    type filter hook forward priority 0;
    ct state new jump service-endpoints-check; ct state new jump cluster-ips-check;
  }}
  chain filter-output {{
    type filter hook output priority 0;
    ct state new jump service-endpoints-check; ct state new jump cluster-ips-check;
  }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
  chain nat-output {{ type nat hook output priority -100; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
"""


def _elements(elements: Iterable[str]) -> str:
    text = ", ".join(elements)
    return f"elements = {{ {text} }};" if text else ""


def _nft_chain(prefix: str, service: Served) -> str:
    path = f"{service.name}/tcp/"
    return f"{prefix}-{_hash(path, 8)}-{path}"


def _nft_service_chains(ip: str, service: Served) -> str:
    targets = ", ".join(f"{slot} : {address} . 80" for slot, address in enumerate(sorted(service.endpoints)))
    draw = f"numgen random mod {len(service.endpoints)} map {{ {targets} }}"
    own = _nft_chain("service", service)
    return f"""
  chain {own} {{ meta l4proto tcp dnat {ip} addr . port to {draw}; }}
  chain {_nft_chain("external", service)} {{
    meta mark set meta mark or 0x4000 comment "masquerade";
    goto {own};
  }}
"""
