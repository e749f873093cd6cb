"""The text of `--help`."""

from __future__ import annotations

import textwrap

from kproxy.cli.flags import GROUPS, defaults_by_flags
from kproxy.cli.pflag import Flag
from kproxy.config.effects import NO_EFFECT
from kproxy.config.v1alpha1 import KproxyConfiguration, value_at

_USAGE = """\
kproxy programs this node's kernel for the Services of a Kubernetes cluster.

Usage:
  kproxy [flags]
  kproxy explain [flags] SOURCE DESTINATION:PORT[/PROTOCOL] [INTERFACE]

It takes kube-proxy's flags, and some of its own. Durations are written as 30s, 1h2m or 100ms.
[+] marks flags that count beside --config; every other flag is ignored there.
"""
_INDENT = 34


def help_text(width: int = 120) -> str:
    """All flags by group, with their defaults."""
    lines = [_USAGE]
    for group in GROUPS:
        lines.append(f"{group.heading}:")
        for flag in group.flags:
            lines.extend(_entry(flag, width))
        lines.append("")
    return "\n".join(lines)


def _entry(flag: Flag, width: int) -> list[str]:
    short = f"-{flag.shorthand}, " if flag.shorthand else "    "
    kind = "" if flag.kind.implied is not None else f" {flag.kind.name}"
    head = f"  {short}--{flag.name}{kind}"
    marks = " [+]" if flag.with_config and flag.name != "config" else ""
    reason = flag.no_effect or next((NO_EFFECT[field] for field in flag.fields if field in NO_EFFECT), "")
    note = f"; no effect in kproxy: {reason}" if reason else ""
    text = f"{flag.help}{note}{default_text(flag)}{marks}"
    if len(head) >= _INDENT:
        return [head, *textwrap.wrap(text, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)]
    return textwrap.wrap(text, width, initial_indent=head.ljust(_INDENT), subsequent_indent=" " * _INDENT)


def default_text(flag: Flag) -> str:
    """` (default 30s)`, or nothing where the default is empty, zero or off."""
    if flag.own_field:
        value = value_at(KproxyConfiguration(), flag.own_field)
    elif flag.fields:
        value = value_at(defaults_by_flags(), flag.fields[0])
    else:
        return ""
    match value:
        case True:
            return " (default true)"
        case float():
            return f" (default {value:g})"
        case _:
            return f" (default {value})" if value and value != "0" else ""
