"""Random clusters and what happens to them, in the terms of scenario files so that each can be written down as one.

Everything comes from small pools: names, addresses and ports meet again and again, and what is rare in a real cluster
(two Services that want one address, an external IP that is the node's own, a pod that reaches itself) is common here.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import Any, NamedTuple, TypeVar

import yaml
from hypothesis import strategies as st

from kproxy.model import Family, Protocol
from tests.lab.scenario import NODE_NAME, Objects

T = TypeVar("T")

V4, V6 = Family.IPv4, Family.IPv6

CLUSTER_IPS = ("172.30.0.11", "172.30.0.12", "172.30.0.13", "172.30.0.14")
UNALLOCATED = "172.30.0.99"
PRIMARY, SECOND, SOMETIMES = "192.168.0.2", "192.168.1.2", "192.168.7.7"  # the last is also a load balancer's
NODE_ADDRESSES = (PRIMARY, SECOND, SOMETIMES)
LOAD_BALANCER_IPS = ("1.2.3.4", "1.2.3.5", SOMETIMES)
EXTERNAL_IPS = ("198.51.100.80", "1.2.3.4", PRIMARY, SECOND, CLUSTER_IPS[1], CLUSTER_IPS[3])
NOBODY = "198.51.100.81"

HERE_PODS = ("10.0.1.1", "10.0.1.2", "10.0.1.3")
OTHER_PODS = ("10.0.2.1", "10.0.2.2")
OTHER_NODE = "192.168.0.3"
CLIENTS = ("203.0.113.9", "203.0.113.99", "198.51.100.7")
ENDPOINTS = {  # where each lives; None: nobody says
    **dict.fromkeys((*HERE_PODS, PRIMARY), NODE_NAME),
    **dict.fromkeys((*OTHER_PODS, OTHER_NODE), "elsewhere"),
    "10.0.3.1": None,
}

PORTS = (  # name, protocol, and the numbers that it may have in a Service and in a slice
    ("http", Protocol.TCP, (80, 30081), (8080, 8081)),
    ("dns", Protocol.UDP, (53, 30080), (5353,)),
    ("dns", Protocol.TCP, (53, 80), (5353, 8080)),
    ("sig", Protocol.SCTP, (80,), (8080,)),
    ("", Protocol.TCP, (80, 443), (8443,)),
)
NODE_PORTS = (30080, 30081)
UNKNOWN_PORT = 81
SOURCE_RANGES = (
    "203.0.113.0/24",
    " 203.0.113.0/28",
    "203.0.113.9/32",
    "203.0.113.8/29 ",
    "192.168.0.2/32",
    "192.168.0.0/16",
    "10.0.1.0/24",
    "1.2.3.4/32",
    "0.0.0.0/0",
    "not a range",
)
ZONES = ("z1", "z2")
POD_NETWORK, HERE_NETWORK, SERVICE_NETWORK = "10.0.0.0/8", "10.0.1.0/24", "172.30.0.0/16"
TIMEOUTS = (600, 10800)


def in_family(address: str, family: Family) -> str:
    """An IPv4 address, or its IPv6 twin as in scenario files."""
    return address if family is V4 else str(IPv6Address(f"fd00::{address}"))


def range_in_family(cidr: str, family: Family) -> str:
    """A CIDR, or its IPv6 twin. What is none stays as it is."""
    address, slash, length = cidr.strip().partition("/")
    if family is V4 or not slash:
        return cidr
    return f"{in_family(address, V6)}/{int(length) + 96}" if address != "0.0.0.0" else "::/0"


class _Plain(yaml.SafeDumper):
    """Without anchors; what is empty is left out before."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


class Step(NamedTuple):
    """What happens next. `drift`: someone else changes the kernel, the number decides how; 0: nobody does."""

    changes: Objects = Objects()
    restart: bool = False
    drift: int = 0


class History(NamedTuple):
    """A cluster and what happens to it. `luck` decides which packets are tried."""

    given: Objects
    steps: tuple[Step, ...]
    luck: int

    def __repr__(self) -> str:
        """As a scenario of a scenario file; drift stands in the text."""
        steps = []
        for step in self.steps:
            when = f"somebody else changes the kernel ({step.drift})" if step.drift else "it changes"
            again = {"restart": True} if step.restart else {}
            steps.append({"when": when, **again, "changes": _without_empty(step.changes)})
        story = {"name": "?", "families": ["IPv4"], "given": _without_empty(self.given), "steps": steps}
        return f"luck {self.luck}\n" + yaml.dump(
            [story], Dumper=_Plain, sort_keys=False, default_flow_style=None, width=120
        )


def histories(steps: int) -> st.SearchStrategy[History]:
    """Histories of at most so many steps."""
    return _history(_worlds(), _list(_steps(), at_most=steps))


def sticky_histories(steps: int) -> st.SearchStrategy[History]:
    """Histories in which endpoints come and go behind Services that clients stick to."""
    services = {"a": _services("a", affinity=True), "b": _services("b", affinity=True)}
    changes = _objects(
        services=_some(services, at_most=1),
        slices=_some(_all_slices(("a", "b")), at_most=2),
        node=st.one_of(st.just({}), st.just({}), _nodes()),
    )
    worlds = _objects(
        config=_configs(),
        node=_nodes(),
        services=st.fixed_dictionaries(services),
        slices=st.fixed_dictionaries(_all_slices(("a", "b"))),
    )
    step = _step(changes=changes, restart=st.sampled_from((False, False, False, False, True)))
    return _history(worlds, _list(step, at_most=steps))


@st.composite
def _history(draw: st.DrawFn, given: st.SearchStrategy[Objects], steps: st.SearchStrategy[list[Step]]) -> History:
    return History(draw(given), tuple(draw(steps)), draw(st.integers(min_value=0, max_value=999)))


@st.composite
def _step(draw: st.DrawFn, **fields: st.SearchStrategy[Any]) -> Step:
    return Step(**{name: draw(value) for name, value in fields.items()})


@st.composite
def _objects(draw: st.DrawFn, **fields: st.SearchStrategy[Any]) -> Objects:
    return Objects(**{name: draw(value) for name, value in fields.items()})


def _worlds() -> st.SearchStrategy[Objects]:
    return _objects(
        config=_configs(),
        node=_nodes(),
        services=_some(_all_services(), at_most=3),
        slices=_some(_all_slices(), at_most=8),
        service_cidrs=_service_cidrs(),
    )


def _steps() -> st.SearchStrategy[Step]:
    or_gone = st.none()
    services = {name: st.one_of(_services(name), _services(name), or_gone) for name in "abc"}
    slices = {name: st.one_of(made, made, or_gone) for name, made in _all_slices().items()}
    changes = _objects(
        services=_some(services, at_most=2),
        slices=_some(slices, at_most=3),
        node=st.one_of(st.just({}), _nodes()),
        service_cidrs=st.one_of(st.none(), _service_cidrs()),
    )
    change = _step(changes=changes, restart=st.sampled_from((False, False, True)))
    restart = _step(restart=st.just(True))
    drift = _step(drift=st.integers(min_value=1, max_value=9999))
    return st.one_of(change, change, restart, drift)


def _all_services() -> dict[str, st.SearchStrategy[dict[str, Any]]]:
    return {name: _services(name) for name in "abc"}


def _all_slices(services: tuple[str, ...] = ("a", "b", "c")) -> dict[str, st.SearchStrategy[dict[str, Any]]]:
    return {
        f"{service}-{family.value}-{number}": _slices(service, family)
        for service in services
        for family in Family
        for number in (1, 2)
    }


def _configs() -> st.SearchStrategy[dict[str, Any]]:
    detection = st.sampled_from(
        (
            {"clusterCIDR": f"{POD_NETWORK},{range_in_family(POD_NETWORK, V6)}"},
            {"clusterCIDR": POD_NETWORK},
            {"detectLocalMode": "NodeCIDR"},
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "pods"}},
            {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"interfaceNamePrefix": "po"}},
            {},
        )
    )
    node_ports = st.sampled_from((["0.0.0.0/0", "::/0"], [], ["192.168.0.0/16"], ["192.168.1.0/24", "fd00::/64"]))
    masquerade = st.sampled_from(({}, {"masqueradeAll": True}, {"masqueradeBit": 31}))
    return st.builds(
        lambda detected, addresses, masquerade: (
            detected | {"nodePortAddresses": addresses, "nftables": masquerade, "iptables": masquerade}
        ),
        detection,
        node_ports,
        masquerade,
    )


def _nodes() -> st.SearchStrategy[dict[str, Any]]:
    addresses = st.sampled_from(((PRIMARY, SECOND), (SECOND, PRIMARY), (PRIMARY, SECOND, SOMETIMES)))
    labels = st.sampled_from(({}, {"topology.kubernetes.io/zone": "z1"}, {"topology.kubernetes.io/zone": "z2"}))
    return st.builds(
        lambda chosen, labels: {
            "addresses": [in_family(address, family) for family in Family for address in chosen],
            "labels": labels,
            "podCIDRs": [HERE_NETWORK, range_in_family(HERE_NETWORK, V6)],
        },
        addresses,
        labels,
    )


def _service_cidrs() -> st.SearchStrategy[list[str]]:
    return st.sampled_from(([SERVICE_NETWORK, range_in_family(SERVICE_NETWORK, V6)], [SERVICE_NETWORK], []))


@st.composite
def _services(draw: st.DrawFn, name: str, *, affinity: bool | None = None) -> dict[str, Any]:
    kind = draw(st.sampled_from(("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer")))
    families = draw(st.sampled_from(((V4,), (V6,), (V4, V6), (V6, V4))))
    usual = CLUSTER_IPS["abc".index(name)]
    cluster_ip = draw(st.sampled_from((usual, usual, usual, CLUSTER_IPS[0])))
    cluster_ips = [in_family(cluster_ip, family) for family in families]
    service: dict[str, Any] = {
        "type": kind,
        "clusterIP": cluster_ips[0],
        "clusterIPs": cluster_ips,
        "ipFamilies": [family.name for family in families],
        "ports": draw(_service_ports(node_ports=kind != "ClusterIP")),
    }
    service |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "internalTrafficPolicy": st.sampled_from(("Local", "Cluster")),
                "externalTrafficPolicy": st.sampled_from(("Local", "Local", "Cluster")),
                "externalIPs": _addresses(EXTERNAL_IPS),
                "created": st.sampled_from(("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")),
            },
        )
    )
    if draw(st.booleans()) if affinity is None else affinity:
        timeout = draw(st.sampled_from(TIMEOUTS))
        service |= {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout}}}
    if kind == "LoadBalancer":
        modes = st.sampled_from(({}, {"ipMode": "VIP"}, {"ipMode": "VIP"}, {"ipMode": "Proxy"}))
        ingress = st.builds(lambda ip, mode: {"ip": ip} | mode, _address(LOAD_BALANCER_IPS), modes)
        service["ingress"] = draw(st.lists(ingress, max_size=2))
        ranges = st.builds(range_in_family, st.sampled_from(SOURCE_RANGES), st.sampled_from(Family))
        service["loadBalancerSourceRanges"] = draw(st.one_of(st.just([]), st.lists(ranges, max_size=4)))
    return service


@st.composite
def _service_ports(draw: st.DrawFn, *, node_ports: bool) -> list[dict[str, Any]]:
    chosen = draw(st.lists(st.sampled_from(PORTS), min_size=1, max_size=3, unique=True))
    ports = []
    for name, protocol, numbers, _ in chosen:
        port: dict[str, Any] = {"name": name, "protocol": str(protocol), "port": draw(st.sampled_from(numbers))}
        if node_ports:
            port["nodePort"] = draw(st.sampled_from((*NODE_PORTS, *NODE_PORTS, 0)))
        ports.append(port)
    return ports


@st.composite
def _slices(draw: st.DrawFn, service: str, family: Family) -> dict[str, Any]:
    ports = []
    for name, protocol, _, numbers in PORTS:
        if draw(st.integers(0, 3)):
            ports.append({"name": name, "protocol": str(protocol), "port": draw(st.sampled_from(numbers))})
    hint_everyone = draw(st.sampled_from((None, None, "forZones", "forNodes", "some")))
    endpoints = draw(_list(_endpoints(family, hint_everyone), at_most=6))
    return {"service": service, "addressType": family.name, "ports": ports, "endpoints": endpoints}


@st.composite
def _endpoints(draw: st.DrawFn, family: Family, hinted: str | None) -> dict[str, Any]:
    address = draw(st.sampled_from(tuple(ENDPOINTS)))
    endpoint: dict[str, Any] = {"addresses": [in_family(address, family)]}
    if ENDPOINTS[address]:
        endpoint["nodeName"] = ENDPOINTS[address]
    conditions = draw(
        st.sampled_from(
            (
                {},
                {},
                {"ready": True, "serving": True, "terminating": False},
                {"ready": True, "serving": True, "terminating": False},
                {"ready": True, "terminating": True},
                {"ready": False},
                {"ready": False, "serving": True, "terminating": True},
                {"ready": False, "serving": True, "terminating": True},
                {"ready": False, "serving": False, "terminating": True},
                {"ready": False, "serving": False},
            )
        )
    )
    if conditions:
        endpoint["conditions"] = conditions
    hints = {
        "forZones": st.sampled_from((["z1"], ["z2"], list(ZONES))),
        "forNodes": st.sampled_from(([NODE_NAME], ["elsewhere"])),
    }
    match hinted:
        case "some":
            given = draw(st.fixed_dictionaries({}, optional=hints))
        case str():
            given = {hinted: draw(hints[hinted])}
        case None:
            given = {}
    if given:
        endpoint["hints"] = {kind: [{"name": name} for name in names] for kind, names in given.items()}
    return endpoint


def _address(pool: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.builds(in_family, st.sampled_from(pool), st.sampled_from(Family))


def _addresses(pool: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(_address(pool), max_size=3, unique=True)


def _list(members: st.SearchStrategy[T], *, at_most: int, unique: bool = False) -> st.SearchStrategy[list[T]]:
    """Lists of every length alike: hypothesis's own are mostly short."""
    lengths = st.integers(min_value=0, max_value=at_most)
    return lengths.flatmap(lambda length: st.lists(members, min_size=length, max_size=length, unique=unique))


def _some(named: Mapping[str, st.SearchStrategy[Any]], *, at_most: int) -> st.SearchStrategy[dict[str, Any]]:
    """A few of them, by name."""

    def chosen(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({name: named[name] for name in sorted(names)})

    return _list(st.sampled_from(tuple(named)), at_most=at_most, unique=True).flatmap(chosen)


def _without_empty(objects: Objects) -> dict[str, Any]:
    shown = {name: getattr(objects, name) for name in objects.__struct_fields__}
    return {name: value for name, value in shown.items() if value}
