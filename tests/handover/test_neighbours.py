"""A kube-proxy of another mode that still runs beside kproxy: what it puts back is removed at a later look."""

from __future__ import annotations

import queue

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.model import Family
from kproxy.modes.remains import Succession
from kproxy.reconcile import SyncReport
from tests.handover.stage import Stage

WAIT_SECONDS = 10


class Looks:
    """Lets a succession in the node's namespace look when the test says so."""

    def __init__(self, stage: Stage, mode: ProxyMode) -> None:
        self._pauses: queue.Queue[float] = queue.Queue()
        self._over: queue.Queue[bool] = queue.Queue()
        self._succession = Succession(tuple(Family), mode, wait=self._wait)
        stage.node.namespace.run(self._succession.sync_done, SyncReport(), 0.0)

    def _wait(self, seconds: float) -> bool:
        self._pauses.put(seconds)
        return self._over.get()

    def done(self) -> float:
        """Wait until it has looked; the seconds until it looks again."""
        return self._pauses.get(timeout=WAIT_SECONDS)

    def again(self) -> float:
        """Let it look once more; the seconds until the next look."""
        self._over.put(False)
        return self.done()

    def end(self) -> None:
        self._over.put(True)


def test_what_a_kube_proxy_puts_back_is_removed_again(stage: Stage):
    stage.kube_proxys_iptables()
    looks = Looks(stage, ProxyMode.NFTABLES)
    pauses = [looks.done()]
    for _ in range(2):
        assert stage.is_gone(ProxyMode.IPTABLES)
        stage.kube_proxys_iptables()
        pauses.append(looks.again())
    assert stage.is_gone(ProxyMode.IPTABLES)
    assert pauses == [15, 30, 60]
    looks.end()


def test_a_table_that_another_kproxy_still_owns_goes_when_that_has_ended(stage: Stage):
    old = stage.started(ProxyMode.NFTABLES)
    looks = Looks(stage, ProxyMode.IPTABLES)
    looks.done()
    assert not stage.is_gone(ProxyMode.NFTABLES)
    old.stop()
    looks.again()
    assert stage.is_gone(ProxyMode.NFTABLES)
    looks.end()
