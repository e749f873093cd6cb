"""Configuration files: read strictly, then leniently where only strictness fails; and written.

A file is YAML or JSON with one `KubeProxyConfiguration` document, and at most one more of kind `KproxyConfiguration`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kproxy.config.decode import decode
from kproxy.config.defaults import defaulted
from kproxy.config.documents import Document, parse, to_yaml
from kproxy.config.effects import without_effect
from kproxy.config.errors import ConfigError, FieldError
from kproxy.config.v1alpha1 import (
    API_VERSION,
    KIND,
    KPROXY_API_VERSION,
    KPROXY_KIND,
    POINTER_FIELDS,
    Configuration,
    KproxyConfiguration,
    paths,
    to_kproxy_v1alpha1,
    to_v1alpha1,
    value_at,
)
from kproxy.config.validation import validate, validate_settings


class ConfigFile(NamedTuple):
    """What a file says, complete and valid, and what should be told about it."""

    configuration: Configuration
    settings: KproxyConfiguration
    warnings: tuple[str, ...]


def read_config_file(path: Path) -> ConfigFile:
    """Read, complete and validate a file. Raises ConfigError with the file and field of every problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from error
    try:
        documents = parse(text)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    chosen, errors = _by_kind(documents)
    if errors:
        raise ConfigError([f"{path}: {error}" for error in errors])

    document = chosen.get(KIND, _ABSENT)
    config, problems = decode(Configuration, document.value)
    unreadable = _each_field_once([*document.unreadable, *problems.unreadable])
    blank = [FieldError("hostnameOverride", "is blank")] if config.hostname_override.isspace() else []
    config = defaulted(config)
    broken = validate(config, frozenset(error.field for error in unreadable))
    errors += map(str, [*unreadable, *blank, *broken])

    own = chosen.get(KPROXY_KIND, _ABSENT)
    settings, own_problems = decode(KproxyConfiguration, own.value)
    unreadable = _each_field_once([*own.unreadable, *own_problems.unreadable])
    broken = validate_settings(settings, frozenset(error.field for error in unreadable))
    errors += (f"{KPROXY_KIND}: {error}" for error in [*unreadable, *broken])
    if errors:
        raise ConfigError([f"{path}: {error}" for error in errors])

    warnings = [
        *map(str, document.repeated),
        *(f"{error}; ignored" for error in problems.unknown),
        *(f"{KPROXY_KIND}: {error}" for error in own.repeated),
        *(f"{KPROXY_KIND}: {error}; ignored" for error in own_problems.unknown),
        *without_effect(config),
    ]
    return ConfigFile(config, settings, tuple(f"{path}: {warning}" for warning in warnings))


def config_yaml(config: Configuration, settings: KproxyConfiguration) -> str:
    """The text of a file that means the same; kproxy's own document is there only if it says something."""
    documents = [to_v1alpha1(config)]
    if settings != KproxyConfiguration():
        documents.append(to_kproxy_v1alpha1(settings))
    return to_yaml(documents)


def lost_in_a_file(config: Configuration) -> list[str]:
    """Fields with a zero that flags can ask for, and that in a file means the default."""
    default = defaulted(Configuration())
    fields = (field for field in paths(config) if field not in POINTER_FIELDS)
    return [field for field in fields if not value_at(config, field) and value_at(default, field)]


_ABSENT = Document({}, [], [])


def _each_field_once(errors: Iterable[FieldError]) -> list[FieldError]:
    """What was noticed first about each field."""
    first: dict[str, FieldError] = {}
    for error in errors:
        first.setdefault(error.field, error)
    return list(first.values())


def _by_kind(documents: Iterable[Document]) -> tuple[dict[str, Document], list[str]]:
    """The documents by kind, without the two fields that say it."""
    versions = {KIND: API_VERSION, KPROXY_KIND: KPROXY_API_VERSION}
    found: dict[str, Document] = {}
    errors = []
    for number, document in enumerate(documents, 1):
        value = document.value
        if not isinstance(value, dict):
            errors.append(f"document {number}: expected an object with apiVersion and kind")
            continue
        api_version, kind = value.pop("apiVersion", None), value.pop("kind", None)
        if not isinstance(kind, str) or versions.get(kind) != api_version:
            known = " or ".join(f"{version} {kind}" for kind, version in versions.items())
            errors.append(f'document {number}: expected {known}, got "{api_version or ""}" "{kind or ""}"')
        elif kind in found:
            errors.append(f"document {number}: a second {kind}; one is possible")
        else:
            found[kind] = document
    if not found and not errors:
        errors.append(f"is empty; expected a {KIND} ({API_VERSION})")
    return found, errors
