"""Configuration files: read strictly, then leniently where only strictness fails; and written.

A file is YAML or JSON with one `KubeProxyConfiguration` document, and at most one more of kind `KproxyConfiguration`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kproxy.config.decode import decode
from kproxy.config.defaults import defaulted
from kproxy.config.effects import without_effect
from kproxy.config.errors import ConfigError, FieldError
from kproxy.config.v1alpha1 import (
    API_VERSION,
    KIND,
    KPROXY_API_VERSION,
    KPROXY_KIND,
    Configuration,
    KproxyConfiguration,
    to_kproxy_v1alpha1,
    to_v1alpha1,
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
        documents, duplicates = _parse(text)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    chosen, errors = _by_kind(documents)
    if errors:
        raise ConfigError([f"{path}: {error}" for error in errors])

    config, problems = decode(Configuration, chosen.get(KIND, {}))
    config = defaulted(config)
    errors += map(str, problems.unreadable)
    errors += map(str, validate(config, frozenset(error.field for error in problems.unreadable)))
    settings, own_problems = decode(KproxyConfiguration, chosen.get(KPROXY_KIND, {}))
    own_errors = own_problems.unreadable or validate_settings(settings)
    errors += (f"{KPROXY_KIND}: {error}" for error in own_errors)
    if errors:
        raise ConfigError([f"{path}: {error}" for error in errors])
    warnings = _lenience(duplicates, [*problems.unknown, *own_problems.unknown]) + without_effect(config)
    return ConfigFile(config, settings, tuple(f"{path}: {warning}" for warning in warnings))


def config_yaml(config: Configuration, settings: KproxyConfiguration) -> str:
    """The text of a file that means the same; kproxy's own document is there only if it says something."""
    documents = [to_v1alpha1(config)]
    if settings != KproxyConfiguration():
        documents.append(to_kproxy_v1alpha1(settings))
    return yaml.safe_dump_all(documents, default_flow_style=False, allow_unicode=True)


def _lenience(duplicates: Iterable[str], unknown: Iterable[FieldError]) -> list[str]:
    return [f"{problem}; ignored" for problem in [*duplicates, *map(str, unknown)]]


def _by_kind(documents: Iterable[Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The documents by kind, without the two fields that say it."""
    versions = {KIND: API_VERSION, KPROXY_KIND: KPROXY_API_VERSION}
    found: dict[str, dict[str, Any]] = {}
    errors = []
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            errors.append(f"document {number}: expected an object with apiVersion and kind")
            continue
        api_version, kind = document.pop("apiVersion", None), document.pop("kind", None)
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


def _parse(text: str) -> tuple[list[Any], list[str]]:
    """The documents, and fields that were set twice (the last one counts). Raises ValueError."""
    duplicates: list[str] = []
    if text.lstrip().startswith("{"):

        def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            duplicates.extend(f"{name}: set twice" for name in dict.fromkeys(names) if names.count(name) > 1)
            return dict(pairs)

        try:
            return [json.loads(text, object_pairs_hook=collect)], duplicates
        except json.JSONDecodeError:
            pass  # YAML's flow notation begins with a brace too
    loader = _Loader(text)
    try:
        documents = []
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    return [document for document in documents if document is not None], loader.duplicates


class _Loader(yaml.SafeLoader):
    """Notes fields that are set twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                self.duplicates.append(f"line {key.start_mark.line + 1}: {key.value}: set twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
