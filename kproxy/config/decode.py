"""From a parsed document to a typed section, with every problem found and named by its field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import EnumMeta
from typing import Any, NamedTuple, TypeVar, cast, get_args

import msgspec

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
        if isinstance(field.type, type) and issubclass(field.type, Section):
            if isinstance(value, Mapping):
                values[field.name] = _section(field.type, value, f"{path}.", problems)
            else:
                problems.unreadable.append(FieldError(path, f"expected an object, got {_shown(value)}"))
            continue
        try:
            decoded = msgspec.convert(value, field.type, dec_hook=_read_duration)
        except msgspec.ValidationError as error:
            problems.unreadable.append(FieldError(path, _reason(error, field.type, value)))
        else:
            if decoded or path in POINTER_FIELDS:
                values[field.name] = decoded
    return kind(**values)


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


def _reason(error: msgspec.ValidationError, field_type: Any, value: object) -> str:
    for member in get_args(field_type) or (field_type,):
        if isinstance(member, EnumMeta):
            return f"{_shown(value)} is not one of {', '.join(choice.value for choice in member)}"  # type: ignore[var-annotated]
    text, _, place = str(error).replace("`", "").partition(" - at $")
    text = text[:1].lower() + text[1:]
    at = f" (at {place})" if place else ""
    return f"{text}{at}" if text.startswith('"') or "got" in text else f"{text}{at}, got {_shown(value)}"


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
