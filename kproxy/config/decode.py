"""From a parsed document to a typed section, with every problem found and named by its field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import EnumMeta
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec import UNSET

from kproxy.config.duration import Duration, FlushFrequency
from kproxy.config.errors import FieldError
from kproxy.config.v1alpha1 import POINTER_FIELDS, Section

SectionT = TypeVar("SectionT", bound=Section)


class Problems(NamedTuple):
    """`unreadable` fields keep their default; `unknown` ones are what only a strict reader refuses."""

    unreadable: list[FieldError]
    unknown: list[FieldError]


def decode(kind: type[SectionT], document: Mapping[str, Any]) -> tuple[SectionT, Problems]:
    """Read a section and the sections in it.

    Null, and Go's zero value in a field that is not a pointer in the API, mean "not set": the default stays.
    """
    problems = Problems([], [])
    return _section(kind, document, "", problems), problems


def _section(kind: type[SectionT], document: Mapping[str, Any], prefix: str, problems: Problems) -> SectionT:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    values = {}
    for name, value in document.items():
        path = f"{prefix}{name}"
        if name not in fields:
            problems.unknown.append(FieldError(path, "unknown field"))
            continue
        field = fields[name]
        if value is None or (value == "" and _is_text(field.type)):
            continue
        decoded = _value(field.type, value, path, problems)
        if decoded is not UNSET and (decoded or path in POINTER_FIELDS):
            values[field.name] = decoded
    return kind(**values)


def _value(kind: Any, value: object, path: str, problems: Problems) -> Any:
    """What a field says; of a list of sections or a map, what can be read of it; UNSET if nothing can."""
    member = (get_args(kind) or (None,))[-1 if get_origin(kind) is dict else 0]
    match value:
        case Mapping() if _is_section(kind):
            return _section(kind, value, f"{path}.", problems)
        case Mapping() if get_origin(kind) is dict:
            return dict(_readable(member, value.items(), f"{path}.{{}}", problems))
        case list() if _is_section(member):
            return tuple(each for _, each in _readable(member, enumerate(value), f"{path}[{{}}]", problems))
    if _is_section(kind):
        problems.unreadable.append(FieldError(path, f"expected an object, got {_shown(value)}"))
        return UNSET
    try:
        return msgspec.convert(value, kind, dec_hook=_read_duration)
    except msgspec.ValidationError as error:
        text, _, place = str(error).replace("`", "").partition(" - at $")
        problems.unreadable.append(FieldError(f"{path}{place}", _reason(text, kind, value)))
        return UNSET


def _readable(
    kind: Any, members: Iterable[tuple[object, object]], path: str, problems: Problems
) -> Iterator[tuple[object, Any]]:
    """The members, by name or number, that can be read to the end."""
    for name, member in members:
        known = len(problems.unreadable)
        decoded = _value(kind, member, path.format(name), problems)
        if len(problems.unreadable) == known:
            yield name, decoded


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _is_text(field_type: Any) -> bool:
    return any(member is str or isinstance(member, EnumMeta) for member in get_args(field_type) or (field_type,))


def _read_duration(kind: type, value: object) -> Duration:
    """msgspec calls this for types it does not know, which are the durations."""
    duration = cast("type[Duration]", kind)
    if isinstance(value, str):
        return duration.parse(value)
    if duration is FlushFrequency and isinstance(value, int) and not isinstance(value, bool):
        return FlushFrequency(value)
    raise ValueError(f"expected a duration such as 30s, got {_shown(value)}")


def _reason(text: str, kind: Any, value: object) -> str:
    for member in get_args(kind) or (kind,):
        if isinstance(member, EnumMeta):
            return f"{_shown(value)} is not one of {', '.join(choice.value for choice in member)}"  # type: ignore[var-annotated]
    text = text[:1].lower() + text[1:]
    return text if text.startswith('"') or "got" in text else f"{text}, got {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping | list) and value:  # which may hold itself, or be endless by its aliases
        return "an object" if isinstance(value, Mapping) else "a list"
    return json.dumps(value, ensure_ascii=False, default=str)
