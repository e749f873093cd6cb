"""A kproxy in iptables mode that has nothing to do."""

from __future__ import annotations

import re
import time
from pathlib import Path

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.iptables.commands import Variant
from kproxy.modes.remains import FIRST_LOOK_SECONDS
from tests.handover.stage import Stage
from tests.lab.waiting import eventually

SECONDS = 10


def wake_ups(process: int) -> dict[str, int]:
    """How often each thread has gone to sleep so far."""
    found = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        switches = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(task, "status").read_text(), re.MULTILINE)
        assert switches
        found[f"{task.name} {Path(task, 'comm').read_text().strip()}"] = int(switches[1])
    return found


def woken_in(seconds: float, *processes: int) -> list[dict[str, int]]:
    """How often each thread of each process wakes up; those that do not are left out."""
    before = [wake_ups(process) for process in processes]
    time.sleep(seconds)
    after = [wake_ups(process) for process in processes]
    return [
        {thread: count - then.get(thread, 0) for thread, count in now.items() if count != then.get(thread)}
        for then, now in zip(before, after, strict=True)
    ]


def test_nothing_wakes_up_but_the_look_at_legacy_tables(tmp_path: Path):
    with Stage(Variant.NFT, tmp_path / "nft") as nft, Stage(Variant.LEGACY, tmp_path / "legacy") as legacy:
        # Every sync period all legacy rules are read, which is not what is measured here.
        seldom = "--iptables-sync-period=10m"
        processes = [nft.started(ProxyMode.IPTABLES).pid, legacy.started(ProxyMode.IPTABLES, seldom).pid]
        # By then both have looked for what other modes left; the next look comes after twice that time.
        time.sleep(FIRST_LOOK_SECONDS + 5)
        eventually(lambda: list(map(len, woken_in(1.2, *processes))) == [0, 1], "they have settled", seconds=10)
        woken, looked = woken_in(SECONDS, *processes)

    assert woken == {}
    [looks] = looked.values()
    assert looks <= 2 * SECONDS
