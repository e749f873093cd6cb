"""The text of a configuration file as plain values, each problem named by its place.

Scalars mean what they mean to kube-proxy's reader (sigs.k8s.io/yaml): of YAML 1.1 without dates and numbers to the base
60, and then as JSON has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import yaml

from kproxy.config.errors import FieldError

_PREFIX = "tag:yaml.org,2002:"
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), ("null", None)),
    **{form: ("bool", True) for word in ("y", "yes", "true", "on") for form in (word, word.title(), word.upper())},
    **{form: ("bool", False) for word in ("n", "no", "false", "off") for form in (word, word.title(), word.upper())},
    **{sign + name: ("float", float(sign + "inf")) for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), ("float", float("nan"))),
}
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
_LONGEST_INTEGER = 100  # digits; Python refuses to read very long ones, and no field takes them
_JSON_SHOWS_WHOLE = 1e21  # below it, Go writes a float without a fraction as an integer


class Document(NamedTuple):
    """What a document says; `repeated` fields hold what was said last, `unreadable` ones hold nothing."""

    value: Any
    repeated: list[FieldError]
    unreadable: list[FieldError]


def parse(text: str) -> list[Document]:
    """Read YAML or JSON. Raises ValueError with the reason where the text is neither."""
    try:
        if text.lstrip().startswith("{"):
            try:
                return [_json(text)]
            except json.JSONDecodeError:
                pass  # YAML's flow notation begins with a brace too
        return _yaml(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"is not YAML: line {line} has the character #x{error.character:02x}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error


def to_yaml(documents: Iterable[Any]) -> str:
    """The text of a file that says this, to kube-proxy as well."""
    return yaml.dump_all(documents, Dumper=_Dumper, default_flow_style=False, allow_unicode=True)


def _json(text: str) -> Document:
    repeated: list[FieldError] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        again = (name for name in dict.fromkeys(names) if names.count(name) > 1)
        repeated.extend(FieldError(name, "set twice; the last one counts") for name in again)
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=collect, parse_int=_integer, parse_float=_float)
    return Document(value, repeated, [])


def _yaml(text: str) -> list[Document]:
    loader = _Loader(text)
    documents = []
    try:
        while loader.check_node():
            if node := loader.get_node():
                reading = _Reading(loader)
                documents.append(Document(reading.value(node, ""), reading.repeated, reading.unreadable))
    except (yaml.YAMLError, RecursionError):
        raise
    except Exception as error:  # the parser stumbles in other ways, too: over an escape beyond Unicode, for instance
        raise ValueError(f"is not YAML: line {loader.line + 1} cannot be read") from error
    return [document for document in documents if document.value is not None or document.unreadable]


class _Loader(yaml.SafeLoader):
    """Composes the nodes, with kube-proxy's idea of what is a number."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return f"{_PREFIX}merge" if value == "<<" else f"{_PREFIX}{_scalar(value)[0]}"
        return super().resolve(kind, value, implicit)  # type: ignore[no-any-return, no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that is something else without them, by this reading or by PyYAML's."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and (found := _scalar(value)[0]) != "str":
            return f"{_PREFIX}{found}"
        return super().resolve(kind, value, implicit)  # type: ignore[no-any-return, no-untyped-call]


class _Reading:
    """Turns nodes into values, each once: a node may stand in many places, also within itself."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._values: dict[int, Any] = {}
        self._nodes: list[yaml.Node] = []  # kept, so that no other gets one's id
        self.repeated: list[FieldError] = []
        self.unreadable: list[FieldError] = []

    def value(self, node: yaml.Node, path: str) -> Any:
        """What a node says; None, and an entry in `unreadable`, if that makes no sense."""
        if id(node) not in self._values:
            self._nodes.append(node)
            self._values[id(node)] = _UNFINISHED
            self._values[id(node)] = self._read(node, path)
        value = self._values[id(node)]
        if value is _UNFINISHED:
            return self._cannot(path, node, "contains itself")
        return value

    def _read(self, node: yaml.Node, path: str) -> Any:
        match node:
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                return dict(self._pairs(node, path))
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                return [self.value(member, f"{path}[{number}]") for number, member in enumerate(node.value)]
            case yaml.ScalarNode():
                return self._scalar(node, path)
        return self._cannot(path, node, f"cannot be a {_short(node.tag)}")

    def _pairs(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # below
            if key.value in seen:
                reason = f"set twice; the last one, in line {key.start_mark.line + 1}, counts"
                self.repeated.append(FieldError(_below(path, key.value), reason))
            seen.add(key.value)
        self._loader.flatten_mapping(node)  # what is merged comes first
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, self.value(value, _below(path, key.value))
            else:
                self._cannot(path, key, "has a field whose name is not text")

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        tag = node.tag.removeprefix(_PREFIX)
        if tag == "str":
            return node.value
        if tag not in ("null", "bool", "int", "float"):
            return self._cannot(path, node, f"cannot be a {_short(node.tag)}")
        found, value = _scalar(node.value)
        if found == tag or (found, tag) == ("int", "float"):
            return value
        return self._cannot(path, node, f'"{node.value}" is not a {_short(node.tag)}')

    def _cannot(self, path: str, node: yaml.Node, reason: str) -> None:
        self.unreadable.append(FieldError(path or f"line {node.start_mark.line + 1}", reason))


_UNFINISHED = object()


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(tag: str) -> str:
    return tag.replace(_PREFIX, "!!")


def _scalar(text: str) -> tuple[str, Any]:
    """What an unquoted text means, and the name of its type."""
    if constant := _CONSTANTS.get(text):
        return constant
    plain = text.replace("_", "") if text[0] in "+-0123456789" else text
    if _INTEGER.fullmatch(plain):
        return "int", _integer(plain)
    if _FLOAT.fullmatch(plain):
        return "float", _float(plain)
    return "str", text


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER:
        return float("-inf" if text.startswith("-") else "inf")
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _JSON_SHOWS_WHOLE else value
