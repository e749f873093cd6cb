"""Another program keeps the lock of legacy iptables."""

from __future__ import annotations

import fcntl
from pathlib import Path

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.iptables.commands import Variant
from tests.handover.stage import Stage
from tests.lab.cluster_objects import service
from tests.lab.traffic import settle
from tests.lab.waiting import eventually


def test_a_lock_that_another_program_keeps_delays_and_loses_nothing(tmp_path: Path):
    lock = tmp_path / "xtables.lock"
    with Stage(Variant.LEGACY, tmp_path / "stage") as stage:
        proxy = stage.proxy(ProxyMode.IPTABLES)
        proxy.start(XTABLES_LOCKFILE=str(lock))
        proxy.wait_until_synced()
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            stage.cluster.apply(service("new", "10.96.0.12", app="web"))
            stage.write_manifests()
            eventually(lambda: "sync failed, nothing is forgotten" in proxy.log.read_text(), "it gives up", seconds=20)

        settle(stage.visitor, "http://10.96.0.12/", {pod.name for pod in stage.pods})
        assert f"another program holds {lock}; waited 5 s for it" in proxy.log.read_text()
        assert proxy.metric("kproxy_quarantined_services") == 0
