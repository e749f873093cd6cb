"""`kproxy`: one action a run; the exit code is the answer.

0: done, nothing to change. 1: failed to start or to do what was asked; for `--dry-run`: there is something to change.
2: `--dry-run` failed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import structlog

from kproxy import __version__, logs
from kproxy.api.errors import ApiConfigError, ManifestError
from kproxy.cli import actions
from kproxy.cli.flags import Color, Output
from kproxy.cli.help import help_text
from kproxy.cli.invocation import Action, Invocation, UsageError, parse, version_text
from kproxy.cli.signals import end_at_once
from kproxy.config.errors import ConfigError
from kproxy.config.files import config_yaml, lost_in_a_file
from kproxy.conntrack import ConntrackError
from kproxy.dataplane.base import ApplyError, UnsupportedError
from kproxy.proxy import StartError
from kproxy.sysctl import SysctlError

log = structlog.get_logger(__name__)

DEEPEST_OBJECT = 10_000  # levels of JSON that an API server takes, and so gives

_FAILURES = (
    ApiConfigError,
    ApplyError,
    ConfigError,
    ConntrackError,
    ManifestError,
    OSError,
    StartError,
    SysctlError,
    UnsupportedError,
)


def entrypoint() -> None:
    """The console script."""
    # Python 3.11 has one limit for its own calls and what is decoded in C, which takes 50 bytes of stack a level.
    sys.setrecursionlimit(DEEPEST_OBJECT + sys.getrecursionlimit())
    end_at_once()
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    try:
        invocation = parse(argv)
    except UsageError as error:
        for problem in error.problems:
            print(f"kproxy: {problem}", file=sys.stderr)
        print("kproxy: see kproxy --help", file=sys.stderr)
        return 2 if any(word.partition("=")[0] == "--dry-run" for word in argv) else 1
    failed = 2 if invocation.action is Action.DRY_RUN or invocation.only_list else 1
    config = invocation.configuration.logging
    # Who asks for something once is a person, as a rule.
    by_itself: logs.LogFormat | None = None if invocation.action is Action.RUN else "text"
    logs.configure(config.format.value if config.format else by_itself, config.verbosity)
    if by_itself and config.verbosity < 4:
        # It tells of an attempt that failed, and goes on trying; whether that helped is said in the end.
        logging.getLogger("kproxy.api.watch").setLevel(logging.ERROR)
    for warning in invocation.warnings:
        log.warning(warning)
    try:
        status = _act(invocation, argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
        return failed
    except _FAILURES as error:
        print(f"kproxy: {_sentence(error)}", file=sys.stderr)
        return failed
    return status


def _sentence(error: Exception) -> str:
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    cause = error.__cause__ or error
    if isinstance(cause, PermissionError) and not cause.filename:  # of a netlink socket, then
        said += "; CAP_NET_ADMIN is missing for this network namespace"
    return said


def _act(invocation: Invocation, argv: Sequence[str]) -> int:
    match invocation.action:
        case Action.HELP:
            print(help_text())
        case Action.VERSION:
            print(version_text(__version__))
        case Action.WRITE_CONFIG:
            _write_config(invocation)
        case Action.INIT_ONLY:
            actions.init_only(invocation)
        case Action.CLEANUP:
            return actions.clean_up(invocation)
        case Action.ONCE:
            return actions.sync_once(invocation)
        case Action.DRY_RUN:
            color = invocation.color is Color.ALWAYS or (invocation.color is Color.AUTO and sys.stdout.isatty())
            return actions.dry_run(invocation, as_json=invocation.output is Output.JSON, color=color)
        case Action.EXPLAIN:
            return actions.explain_packet(invocation)
        case Action.RUN:
            from kproxy.cli.run import run

            return run(invocation, argv)
    return 0


def _write_config(invocation: Invocation) -> None:
    path = invocation.write_config_to
    assert path is not None  # noqa: S101 - the action is asked for by giving the path
    path.write_text(config_yaml(invocation.configuration, invocation.settings))
    log.info("wrote the configuration", path=str(path))
    for field in lost_in_a_file(invocation.configuration):
        log.warning(f"a file cannot set {field} to zero or nothing: with this one it has its default again")
