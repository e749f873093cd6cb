"""`--service-metrics`: whether the kernel counts."""

from __future__ import annotations

from tests.cli.test_dry_run import CLUSTER
from tests.reconcile.one_node import OneNode


def test_services_and_endpoints_are_counted_unless_that_is_switched_off(here: OneNode):
    path = here.manifests(*CLUSTER)

    assert here.kproxy("--once", f"--manifests={path}", "--service-metrics=false").returncode == 0
    assert "counter" not in here.ruleset

    assert here.kproxy("--dry-run", f"--manifests={path}").returncode == 0  # counters are no reason to write
    here.kproxy("--cleanup")
    assert here.kproxy("--once", f"--manifests={path}").returncode == 0
    assert "10.96.0.10 . tcp . 80 counter packets 0" in here.ruleset
    assert "10.96.0.10 . tcp . 80 . 0 counter packets 0" in here.ruleset
