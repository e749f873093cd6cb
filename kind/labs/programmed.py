"""Whether every node's kernel holds what it should, by dry runs in kproxy's pods.

The scripts beside this package ask, too: python3 -m labs.programmed SECONDS rules|all|without [MODE]
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from labs.kubectl import LabError, wait_for
from labs.nodes import ProxyPod, proxy_pods

_AT_ONCE = 8  # dry runs
_PAUSE_SECONDS = 1.0  # they take the nodes' CPU time


class Found(NamedTuple):
    """What a dry run has found on a node."""

    where: str
    counts: dict[str, int]
    differs: bool  # in what kproxy's own mode holds
    left: tuple[str, ...]  # by what, of other modes

    def __str__(self) -> str:
        """As kproxy tells people."""
        counts = ", ".join(f"{number} to {what}" for what, number in self.counts.items())
        return f"{self.where}: {counts if self.differs or self.left else 'nothing to change'}"


def rules_are_in(found: Found) -> bool:
    """Services are as they should be, whatever is to be removed."""
    return not (found.counts["add"] or found.counts["change"])


def all_is_done(found: Found) -> bool:
    """Nothing else is there, either, but virtual servers that connections keep, a quarter of an hour at most."""
    return not found.differs and set(found.left) <= {"ipvs mode"}


def is_without(mode: str, found: Found) -> bool:
    """The rules are in, and nothing is there of a mode, or of those that begin like this."""
    return rules_are_in(found) and not any(by.startswith(mode) for by in found.left)


def wait_until(condition: Callable[[Found], bool], seconds: float = 60) -> list[Found]:
    """Wait until it holds on every node. Raises LabError with what was found where it does not."""

    def look() -> list[Found]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            everywhere = list(pool.map(_dry_run, proxy_pods()))
        if amiss := [str(found) for found in everywhere if not condition(found)]:
            raise LabError("; ".join(amiss))
        return everywhere

    return wait_for(look, "every node's kernel holds what it should", seconds, _PAUSE_SECONDS)


def _dry_run(pod: ProxyPod) -> Found:
    printed, logged = pod.dry_run("-o", "json")
    try:
        told = json.loads(printed)
        return Found(
            where=f"{told['mode']} mode, node {told['node']}",
            counts=told["counts"],
            differs=bool(told["services"] or told["shared"]),
            left=tuple(mode["by"] for mode in told["left"]),
        )
    except (ValueError, KeyError):
        raise LabError(f"{pod.node}: the dry run fails: {printed}{logged.strip()}") from None


def main() -> int:
    """Wait as the command line says. 0: a line for each node; 1: time is up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the script says what there is to say
    seconds, wanted, *mode = sys.argv[1:]
    conditions: dict[str, Callable[[Found], bool]]
    conditions = {"rules": rules_are_in, "all": all_is_done, "without": partial(is_without, "".join(mode))}
    try:
        everywhere = wait_until(conditions[wanted], float(seconds))
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{found}\n" for found in everywhere))
    return 0


if __name__ == "__main__":
    sys.exit(main())
