"""How many examples, the same ones each time. `KPROXY_ORACLE_EXAMPLES` asks for more (or fewer) of each test."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings


def examples(usual: int) -> settings:
    """Settings for so many examples."""
    return settings(
        max_examples=int(os.environ.get("KPROXY_ORACLE_EXAMPLES", usual)),
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
