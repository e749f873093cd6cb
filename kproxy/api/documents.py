"""From the text of a manifest to objects: YAML or JSON, several documents, lists of objects.

YAML is read as Kubernetes means it rather than as YAML 1.1: `on` and `yes` are strings, a number with a leading zero is
a string and not octal, and a timestamp without quotes stays a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from json import JSONDecodeError, JSONDecoder
from types import NoneType
from typing import Any, NamedTuple

import msgspec
import yaml
from msgspec.structs import replace

from kproxy.api import validation
from kproxy.api.decode import object_name
from kproxy.api.objects import KINDS, EndpointSlice, Kind, Object, Service, ServiceSpec
from kproxy.model import Family

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

API_VERSIONS: dict[Kind, str] = {
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "Node": "v1",
    "ServiceCIDR": "networking.k8s.io/v1",
}
_NAMESPACED = ("Service", "EndpointSlice")


class ObjectKey(NamedTuple):
    """Identity of an object among manifests."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return object_name(self.kind, self.namespace, self.name)


class Content(msgspec.Struct):
    """What a manifest says.

    `documents` tells where each object is; `others` counts objects of kinds that are not read here; `notes` are about
    objects that will do less than their author may expect.
    """

    objects: dict[ObjectKey, Object] = {}
    documents: dict[ObjectKey, str] = {}
    others: dict[str, int] = {}
    notes: list[str] = []
    errors: list[str] = []


def read(text: bytes, *, is_json: bool) -> Content:
    """The objects of a manifest. Errors are collected, all of them, with document, object and field."""
    content = Content()
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        content.errors.append(f"byte {error.start}: not UTF-8")
        return content
    number = 0
    try:
        for number, document in enumerate(_json(decoded) if is_json else _yaml(decoded), 1):
            _add(content, document, f"document {number}")
    except _SyntaxError as error:
        content.errors.append(f"document {number + 1}: {error}")
    except RecursionError:
        content.errors.append(f"document {max(number, 1)}: nested too deeply")
    return content


class _SyntaxError(Exception):
    pass


def _json(text: str) -> Iterator[object]:
    decoder = JSONDecoder(object_pairs_hook=_unique)
    at = _JSON_SPACE.match(text).end()  # type: ignore[union-attr]  # it matches everything
    while at < len(text):
        try:
            document, at = decoder.raw_decode(text, at)
        except JSONDecodeError as error:
            raise _SyntaxError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
        except ValueError as error:  # a number of thousands of digits
            raise _SyntaxError(f"a value cannot be read: {error}") from error
        yield document
        at = _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]


_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without its nulls: Kubernetes reads a member that is null as one that is not there."""
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _SyntaxError(f"the key {twice!r} is there twice")
    return {key: value for key, value in pairs if value is not None} if None in members.values() else members


def _yaml(text: str) -> Iterator[object]:
    try:
        yield from yaml.load_all(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _SyntaxError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise _SyntaxError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # The library relies on what a tag says.
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise _SyntaxError(f"a value cannot be read: {name}{error}") from error


class _Loader(_SafeLoader):
    """Types of unquoted values are those of JSON, nulls are left out, a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        members = super().construct_mapping(node, deep)
        return {key: value for key, value in members.items() if value is not None}


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", list("-0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), _first)


def _add(content: Content, document: object, where: str) -> None:
    """Add the objects of a document, or of a list in it."""
    if document is None:
        return  # nothing between two `---`
    if not isinstance(document, dict):
        content.errors.append(f"{where}: Expected an object, got {_type_name(document)}")
        return
    kind, api_version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or not kind:
        content.errors.append(f"{where}: kind: Required")
    elif not isinstance(api_version, str) or not api_version:
        content.errors.append(f"{where}: apiVersion: Required")
    elif _is_list(kind) and isinstance(document.get("items"), list | NoneType):
        inherited = {} if kind == "List" else {"kind": kind.removesuffix("List"), "apiVersion": api_version}
        for number, item in enumerate(document.get("items") or [], 1):
            # items of a typed list need not repeat what they are
            _add(content, {**inherited, **item} if isinstance(item, dict) else item, f"{where}, item {number}")
    elif kind not in KINDS or _group(api_version) != _group(API_VERSIONS[kind]):
        other = f"{api_version} {kind}"
        content.others[other] = content.others.get(other, 0) + 1
    else:
        _add_object(content, kind, document, where)


def _is_list(kind: str) -> bool:
    return kind == "List" or (kind.endswith("List") and kind.removesuffix("List") in KINDS)


def _add_object(content: Content, kind: Kind, document: dict[str, Any], where: str) -> None:
    where = f"{where} ({_named(kind, document)})"
    if document["apiVersion"] != API_VERSIONS[kind]:
        content.errors.append(f"{where}: apiVersion: Expected {API_VERSIONS[kind]}, got {document['apiVersion']}")
        return
    try:
        given = msgspec.convert(document, KINDS[kind])
    except msgspec.ValidationError:
        content.errors += [f"{where}: {error}" for error in validation.form_errors(document, KINDS[kind])]
        return
    found = list(validation.errors(given))
    item = _defaulted(given)
    key = ObjectKey(kind, item.metadata.namespace, item.metadata.name)
    if earlier := content.documents.get(key):
        found.append(f"already in {earlier}")
    if found:
        content.errors += [f"{where}: {error}" for error in found]
        return
    content.notes += [f"{where}: {note}" for note in _notes(item)]
    content.objects[key] = item
    content.documents[key] = where.partition(" (")[0]


def _named(kind: Kind, document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    name = namespace = ""
    if isinstance(metadata, dict):
        name, namespace = (text if isinstance(text := metadata.get(key), str) else "" for key in ("name", "namespace"))
    return object_name(kind, (namespace or "default") if kind in _NAMESPACED else "", name)


def _defaulted(item: Object) -> Object:
    """With what an API server would have filled in, where it matters to a proxy."""
    match item:
        case Service():
            metadata = replace(item.metadata, namespace=item.metadata.namespace or "default")
            return replace(item, metadata=metadata, spec=_defaulted_spec(item.spec))
        case EndpointSlice():
            metadata = replace(item.metadata, namespace=item.metadata.namespace or "default")
            ports = [replace(port, name=port.name or "") for port in item.ports or ()]
            return replace(item, metadata=metadata, ports=ports)
        case _:
            return replace(item, metadata=replace(item.metadata, namespace=""))


def _defaulted_spec(spec: ServiceSpec) -> ServiceSpec:
    cluster_ip = spec.cluster_ip or (spec.cluster_ips[0] if spec.cluster_ips else "")
    cluster_ips = spec.cluster_ips or ([cluster_ip] if cluster_ip else None)
    families = spec.ip_families
    if not families and cluster_ips and cluster_ip != "None":
        families = [Family.of(address).name for address in cluster_ips]
    return replace(spec, cluster_ip=cluster_ip, cluster_ips=cluster_ips, ip_families=families)


def _notes(item: Object) -> Iterator[str]:
    if not isinstance(item, Service) or item.spec.type == "ExternalName":
        return
    if not item.spec.cluster_ip:
        yield "spec.clusterIP: not given, and only an API server allocates one, so this Service is not served"
    for index, port in enumerate(item.spec.ports or ()):
        if item.spec.type == "NodePort" and not port.node_port:
            yield f"spec.ports[{index}].nodePort: not given, and only an API server allocates one"


def _group(api_version: str) -> str:
    return api_version.rpartition("/")[0]


def _type_name(value: object) -> str:
    return json.dumps(value)[:40] if isinstance(value, str | int | float | bool) else type(value).__name__
