"""The last known state of the cluster, fed by events, asked for routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from kproxy.api.events import Alive, Changed, Deleted, Event, Listed, Unavailable
from kproxy.api.objects import (
    SERVICE_NAME_LABEL,
    TRIGGER_TIME_ANNOTATION,
    ZONE_LABEL,
    EndpointSlice,
    Kind,
    Node,
    Object,
    Service,
    ServiceCIDR,
)
from kproxy.cluster.claims import Claims
from kproxy.cluster.services import service_ports
from kproxy.cluster.slices import Slice, merge, read_slice
from kproxy.model import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    Protocol,
    Route,
    ServiceName,
    ServicePort,
    ServicePortName,
    canonical_cidr,
)
from kproxy.routing import frontends, route

ObjectKey = tuple[str, str]  # namespace, name

# Nothing is written before these were listed once.
REQUIRED: frozenset[Kind] = frozenset({"Service", "EndpointSlice"})


class ClusterState:
    """Services, endpoints and the Node as last heard; marks the Services that an event touches as dirty.

    `note` receives one sentence for each part of an object that had to be left out, and for each lost address.
    `started` is a POSIX time: trigger times of endpoints before it are not measured.
    """

    def __init__(
        self,
        node_name: str,
        families: Iterable[Family] = (Family.IPv4, Family.IPv6),
        *,
        note: Callable[[str], None],
        started: float = 0.0,
        allow_external_ips: bool = True,
    ) -> None:
        self.node_name = node_name
        self.families = tuple(families)
        self.node: Node | None = None
        self.service_events = 0
        self.slice_events = 0
        self.dirty: set[ServiceName] = set()
        self.changed_services: set[ServiceName] = set()  # for metrics, which empty these two after a sync
        self.changed_slices: set[ObjectKey] = set()
        self.facts_changed = False  # node or service CIDRs: what NodeFacts is made of
        self.trigger_times: dict[ServiceName, list[float]] = {}
        self._note = note
        self._started = started
        self._allow_external_ips = allow_external_ips
        self._listed: set[Kind] = set()
        self._zone = ""
        self.udp_services: set[ServiceName] = set()
        self._services: dict[ServiceName, tuple[ServicePort, ...]] = {}
        self._slices: dict[ServiceName, dict[str, Slice]] = {}
        self._service_of_slice: dict[ObjectKey, ServiceName] = {}
        self._service_cidrs: dict[str, tuple[str, ...]] = {}
        self._claims = Claims(note)

    @property
    def complete(self) -> bool:
        """Whether Services and EndpointSlices have been listed, so that what is missing is known to be gone."""
        return self._listed >= REQUIRED

    @property
    def surroundings_listed(self) -> bool:
        """Whether Nodes and ServiceCIDRs have been listed too: what is not known of them does not exist."""
        return self._listed >= {"Node", "ServiceCIDR"}

    @property
    def zone(self) -> str:
        """This node's zone; empty where the Node has no such label or is not known."""
        return self._zone

    def services(self) -> Iterable[ServiceName]:
        """The Services that have service ports."""
        return self._services.keys()

    def service_ports(self, service: ServiceName) -> tuple[ServicePort, ...]:
        """The service ports of a Service, of all families."""
        return self._services.get(service, ())

    def endpoints(self, port: ServicePort) -> list[Endpoint]:
        """All endpoints of a service port, usable or not, sorted by their text."""
        return merge(self._slices.get(port.name.service, {}), port.name, port.family)

    def frontends(self, port: ServicePort) -> tuple[tuple[FrontendKind, Frontend], ...]:
        """The addresses and ports that a service port owns; what another Service has taken is not among them."""
        return self._claims.owned(port)

    def owner(self, frontend: Frontend) -> ServicePortName | None:
        """The service port that a frontend belongs to; from any thread."""
        return self._claims.owner(frontend)

    def routes(self, service: ServiceName) -> list[Route]:
        """The routes of a Service's ports; empty for a Service that is not known or not ours."""
        return [
            route(
                port,
                self.endpoints(port),
                node_name=self.node_name,
                zone=self._zone,
                frontends=self.frontends(port),
            )
            for port in self._services.get(service, ())
        ]

    def service_cidrs(self, family: Family) -> tuple[str, ...]:
        """The cluster's service address ranges of a family; empty where not known."""
        return tuple(sorted({c for cidrs in self._service_cidrs.values() for c in cidrs if Family.of(c) is family}))

    def mark_all_dirty(self) -> None:
        """Every Service is to be looked at again."""
        self.dirty.update(self._services)

    def apply(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Changed(_, changed):
                self._put(changed)
            case Deleted(_, gone):
                self._drop(gone)
            case Listed(kind, keys):
                self._keep_only(kind, keys)
            case Alive() | Unavailable():
                pass

    def _put(self, item: Object) -> None:
        match item:
            case Service():
                self.service_events += 1
                self._put_service(item)
            case EndpointSlice():
                self.slice_events += 1
                self._put_slice(item)
            case Node():
                self._put_node(item)
            case ServiceCIDR():
                self._put_service_cidr(item)

    def _drop(self, item: Object) -> None:
        key = (item.metadata.namespace, item.metadata.name)
        match item:
            case Service():
                self.service_events += 1
                self._set_service_ports(ServiceName(*key), ())
            case EndpointSlice():
                self.slice_events += 1
                self._drop_slice(key)
            case Node():
                if item.metadata.name == self.node_name:
                    self._note(f"Node {self.node_name} was deleted; what was last known of it stays in force")
            case ServiceCIDR():
                self.facts_changed |= self._service_cidrs.pop(item.metadata.name, None) is not None

    def _keep_only(self, kind: Kind, listed: frozenset[ObjectKey]) -> None:
        match kind:
            case "Service":
                for service in [s for s in self._services if s not in listed]:
                    self._set_service_ports(service, ())
            case "EndpointSlice":
                for key in [k for k in self._service_of_slice if k not in listed]:
                    self._drop_slice(key)
            case "ServiceCIDR":
                for name in [n for n in self._service_cidrs if ("", n) not in listed]:
                    del self._service_cidrs[name]
                    self.facts_changed = True
            case "Node":
                pass  # a Node that is gone stays in force
        self._listed.add(kind)

    def _put_service(self, service: Service) -> None:
        name = ServiceName(service.metadata.namespace, service.metadata.name)

        def note(text: str) -> None:
            self._note(f"Service {name}: {text}")

        ports = service_ports(service, self.families, note, allow_external_ips=self._allow_external_ips)
        self._set_service_ports(name, ports)

    def _set_service_ports(self, name: ServiceName, ports: tuple[ServicePort, ...]) -> None:
        known = self._services.get(name, ())
        if known == ports:
            return
        for port in known:
            self.dirty.update(self._claims.release(port))
        for port in ports:
            self.dirty.update(self._claims.claim(port, frontends(port)))
        if ports:
            self._services[name] = ports
        else:
            del self._services[name]
        if any(port.name.protocol is Protocol.UDP for port in ports):
            self.udp_services.add(name)
        else:
            self.udp_services.discard(name)
        self.dirty.add(name)
        self.changed_services.add(name)

    def _put_slice(self, item: EndpointSlice) -> None:
        metadata = item.metadata
        service_name = (metadata.labels or {}).get(SERVICE_NAME_LABEL, "")
        key = (metadata.namespace, metadata.name)
        if not (service_name and all(key)):
            self._drop_slice(key)
            return

        def note(text: str) -> None:
            self._note(f"EndpointSlice {metadata.namespace}/{metadata.name}: {text}")

        piece = read_slice(item, self.node_name, note)
        if piece is None or piece.family not in self.families:
            self._drop_slice(key)
            return
        service = ServiceName(metadata.namespace, service_name)
        previous = self._service_of_slice.get(key)
        if previous not in (None, service):
            self._drop_slice(key)
        slices = self._slices.setdefault(service, {})
        if slices.get(metadata.name) == piece:
            return
        slices[metadata.name] = piece
        self._service_of_slice[key] = service
        self.dirty.add(service)
        self.changed_slices.add(key)
        self._record_trigger_time(service, (metadata.annotations or {}).get(TRIGGER_TIME_ANNOTATION, ""))

    def _drop_slice(self, key: ObjectKey) -> None:
        service = self._service_of_slice.pop(key, None)
        if service is None:
            return
        slices = self._slices[service]
        del slices[key[1]]
        if not slices:
            del self._slices[service]
        self.dirty.add(service)
        self.changed_slices.add(key)
        self.trigger_times.pop(service, None)

    def _record_trigger_time(self, service: ServiceName, text: str) -> None:
        if not text:
            return
        try:
            time = datetime.fromisoformat(text).timestamp()
        except ValueError:
            self._note(f"Service {service}: trigger time {text!r} of a slice cannot be read and is not measured")
            return
        if time > self._started:
            self.trigger_times.setdefault(service, []).append(time)

    def _put_node(self, node: Node) -> None:
        if node.metadata.name != self.node_name:
            return
        self.node = node
        self.facts_changed = True
        zone = (node.metadata.labels or {}).get(ZONE_LABEL, "")
        if zone != self._zone:
            self._zone = zone
            self.mark_all_dirty()

    def _put_service_cidr(self, item: ServiceCIDR) -> None:
        cidrs = []
        for text in item.spec.cidrs or []:
            try:
                cidrs.append(canonical_cidr(text))
            except ValueError as error:
                self._note(f"ServiceCIDR {item.metadata.name}: {text!r} is left out: {error}")
        if self._service_cidrs.get(item.metadata.name) != tuple(cidrs):
            self._service_cidrs[item.metadata.name] = tuple(cidrs)
            self.facts_changed = True
