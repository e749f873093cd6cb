"""What a command line asks for: one action, and the configuration for it. Nothing is printed or changed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any

import msgspec

from kproxy.cli.flags import FLAGS, Color, Output, defaults_by_flags
from kproxy.cli.pflag import Flag, Scanned, read_value, scan
from kproxy.config.defaults import HEALTHZ_PORT, METRICS_PORT, with_port
from kproxy.config.effects import NO_EFFECT, gates_without_effect
from kproxy.config.errors import ConfigError
from kproxy.config.files import read_config_file
from kproxy.config.v1alpha1 import Configuration, KproxyConfiguration, replaced
from kproxy.config.validation import KUBERNETES_VERSION, validate, validate_settings


class Action(Enum):
    """What to do."""

    RUN = auto()
    ONCE = auto()
    DRY_RUN = auto()
    CLEANUP = auto()
    INIT_ONLY = auto()
    WRITE_CONFIG = auto()
    EXPLAIN = auto()
    VERSION = auto()
    HELP = auto()


class Invocation(msgspec.Struct, frozen=True, kw_only=True):
    """A command line that makes sense; `configuration` is complete and valid."""

    action: Action
    configuration: Configuration = defaults_by_flags()
    settings: KproxyConfiguration = KproxyConfiguration()
    config_file: Path | None = None
    write_config_to: Path | None = None
    master: str = ""
    output: Output = Output.TEXT
    color: Color = Color.AUTO
    only_list: bool = False  # `--cleanup` with `--dry-run`
    operands: tuple[str, ...] = ()  # of `explain`
    warnings: tuple[str, ...] = ()

    @property
    def kubeconfig(self) -> str:
        """Path of the kubeconfig; empty: in-cluster, unless `master` is given."""
        return self.configuration.client_connection.kubeconfig

    @property
    def manifests(self) -> Path | None:
        """What takes the place of the API server, if anything does."""
        return Path(self.settings.manifests) if self.settings.manifests else None


class UsageError(ConfigError):
    """A command line, or the configuration file that it names, cannot be used."""


def version_text(version: str) -> str:
    """What `--version` prints: kproxy's version, then the line that tools which ask kube-proxy look for."""
    return f"kproxy {version}\nKubernetes {KUBERNETES_VERSION}"


def parse(argv: Sequence[str]) -> Invocation:
    """Read a command line, without the program's name, and the configuration file it names. Raises UsageError."""
    scanned = scan(argv, FLAGS)
    given, unread, problems = _values(scanned)
    if given.get("help"):
        return Invocation(action=Action.HELP, operands=scanned.operands)
    if given.get("version"):
        return Invocation(action=Action.VERSION)
    action, operands, misuse = _action(given, scanned.operands)
    problems += misuse
    path = given.get("config")
    try:
        if path:
            configuration, settings, warnings = _from_file(Path(path), given)
        else:
            configuration, settings, warnings = _from_flags(given, unread)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise UsageError(problems)
    return Invocation(
        action=action,
        configuration=configuration,
        settings=settings,
        config_file=Path(path) if path else None,
        write_config_to=Path(given["write-config-to"]) if given.get("write-config-to") else None,
        master=given.get("master", ""),
        output=given.get("output", Output.TEXT),
        only_list=action is Action.CLEANUP and bool(given.get("dry-run")),
        color=given.get("color", Color.AUTO),
        operands=operands,
        warnings=tuple(warnings),
    )


def _values(scanned: Scanned) -> tuple[dict[str, Any], frozenset[str], list[str]]:
    """The values by flag, the fields whose flags could not be read, and what is wrong."""
    flags = {flag.name: flag for flag in FLAGS}
    given: dict[str, Any] = {}
    unread: set[str] = set()
    problems = list(scanned.problems)
    for name, texts in scanned.texts.items():
        try:
            given[name] = read_value(flags[name].kind, texts)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
            unread.update(flags[name].fields)
    for name in ("hostname-override", "bind-address"):
        if given.get(name) == "":  # as if it were not there
            del given[name]
    if "hostname-override" in given and not given["hostname-override"].strip():
        problems.append("--hostname-override: is blank")
    return given, frozenset(unread), problems


def _action(given: Mapping[str, Any], operands: tuple[str, ...]) -> tuple[Action, tuple[str, ...], list[str]]:
    """The one action that is asked for, the operands of `explain`, and what is wrong."""
    problems = []
    actions = {
        "write-config-to": Action.WRITE_CONFIG,
        "cleanup": Action.CLEANUP,
        "init-only": Action.INIT_ONLY,
        "dry-run": Action.DRY_RUN,
        "once": Action.ONCE,
    }
    asked = {f"--{name}": action for name, action in actions.items() if given.get(name)}
    if operands[:1] == ("explain",):
        asked["explain"] = Action.EXPLAIN
        operands = operands[1:]
    else:
        problems += [f'unexpected argument "{operand}"' for operand in operands]
        operands = ()
    if asked.keys() == {"--dry-run", "--once"}:  # a dry run happens once
        return Action.DRY_RUN, operands, problems
    if asked.keys() == {"--dry-run", "--cleanup"}:
        return Action.CLEANUP, operands, problems
    if len(asked) > 1:
        problems.append(f"{' and '.join(asked)} cannot be combined")
    return next(iter(asked.values()), Action.RUN), operands, problems


def _from_flags(
    given: Mapping[str, Any], unread: frozenset[str]
) -> tuple[Configuration, KproxyConfiguration, list[str]]:
    """The configuration without a file. Raises ConfigError that names the flags."""
    base = defaults_by_flags(given.get("bind-address", "0.0.0.0"))
    config, warnings = _with_ports(_with_fields(base, FLAGS, given), given)
    settings = _with_own_fields(KproxyConfiguration(), given)
    errors = [f"{_flag_of(error.field)}: {error.reason}" for error in validate(config, unread)]
    errors += [f"{_flag_of(error.field)}: {error.reason}" for error in validate_settings(settings)]
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    return config, settings, _idle_flags(FLAGS, given) + gates_without_effect(config) + warnings


def _from_file(path: Path, given: Mapping[str, Any]) -> tuple[Configuration, KproxyConfiguration, list[str]]:
    """The file's configuration, with the flags that count beside it. Raises ConfigError."""
    file = read_config_file(path)
    counting = [flag for flag in FLAGS if flag.with_config]
    config = _with_fields(file.configuration, counting, given)
    if "vmodule" in given:
        config = replaced(config, "logging.vmodule", given["vmodule"] + file.configuration.logging.vmodule)
    settings = _with_own_fields(file.settings, given)
    errors = [f"{_flag_of(error.field)}: {error.reason}" for error in [*validate(config), *validate_settings(settings)]]
    if errors:
        raise ConfigError(errors)
    warnings = [*file.warnings, *_idle_flags(counting, given)]
    if ignored := [f"--{name}" for name in given if name not in {flag.name for flag in counting}]:
        warnings.append(f"ignored because --config is given: {', '.join(ignored)}")
    return config, settings, warnings


def _with_fields(config: Configuration, flags: Sequence[Flag], given: Mapping[str, Any]) -> Configuration:
    for flag in flags:
        if flag.name in given:
            for field in flag.fields:
                config = replaced(config, field, given[flag.name])
    return msgspec.structs.replace(config, hostname_override=config.hostname_override.strip().lower())


def _with_own_fields(settings: KproxyConfiguration, given: Mapping[str, Any]) -> KproxyConfiguration:
    for flag in FLAGS:
        if flag.own_field and flag.name in given:
            settings = replaced(settings, flag.own_field, given[flag.name])
    return settings


def _with_ports(config: Configuration, given: Mapping[str, Any]) -> tuple[Configuration, list[str]]:
    """Give addresses without a port theirs, as the deprecated flags say: 0 switches a server off."""
    warnings = []
    for name, field, default in (
        ("healthz", "healthzBindAddress", HEALTHZ_PORT),
        ("metrics", "metricsBindAddress", METRICS_PORT),
    ):
        flag, port = f"{name}-port", given.get(f"{name}-port", default)
        address = config.healthz_bind_address if name == "healthz" else config.metrics_bind_address
        effective = with_port(address, port) if port else ""
        config = replaced(config, field, effective)
        if flag in given:
            unused = f", and --{name}-bind-address has a port already" if port and effective == address else ""
            warnings.append(f"--{flag} is deprecated; use --{name}-bind-address{unused}")
    return config, warnings


def _idle_flags(flags: Sequence[Flag], given: Mapping[str, Any]) -> list[str]:
    """A line for each given flag that changes nothing."""
    reasons = {flag.name: flag.no_effect or next(map(NO_EFFECT.get, flag.fields), None) for flag in flags}
    return [f"--{name} has no effect in kproxy: {reasons[name]}" for name in given if reasons.get(name)]


def _flag_of(field: str) -> str:
    """The flag that sets a field, or else the field itself."""
    return next((f"--{flag.name}" for flag in FLAGS if field in (*flag.fields, flag.own_field)), field)
