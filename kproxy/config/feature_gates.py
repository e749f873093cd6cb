"""Feature gates that kube-proxy's users may have set (Kubernetes 1.36; reference: section 8.5)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple


class Stage(Enum):
    """Maturity; AllAlpha and AllBeta switch whole stages."""

    ALPHA = auto()
    BETA = auto()
    STABLE = auto()


class Gate(NamedTuple):
    """A feature gate. A locked one cannot leave its default."""

    default: bool
    stage: Stage
    locked: bool = False
    effect: bool = False  # whether setting it changes what kproxy does


FEATURE_GATES: Mapping[str, Gate] = MappingProxyType(
    {
        "AllAlpha": Gate(False, Stage.ALPHA, effect=True),
        "AllBeta": Gate(False, Stage.BETA, effect=True),
        "AllowServiceExternalIPs": Gate(True, Stage.STABLE, effect=True),
        "ComponentFlagz": Gate(False, Stage.ALPHA, effect=True),
        "ComponentStatusz": Gate(False, Stage.ALPHA, effect=True),
        "ContextualLogging": Gate(True, Stage.BETA),
        "KubeProxyIPVS": Gate(True, Stage.STABLE),
        "KubeProxyNFTablesLocalhostNodePorts": Gate(False, Stage.ALPHA),
        "LoggingAlphaOptions": Gate(False, Stage.ALPHA),
        "LoggingBetaOptions": Gate(True, Stage.BETA),
        "MultiCIDRServiceAllocator": Gate(True, Stage.STABLE, locked=True),
        "NFTablesProxyMode": Gate(True, Stage.STABLE, locked=True),
        "NativeHistograms": Gate(False, Stage.ALPHA),
        "PreferSameTrafficDistribution": Gate(True, Stage.STABLE, locked=True),
        "WatchListClient": Gate(True, Stage.BETA),
    }
)


def feature_enabled(chosen: Mapping[str, bool], name: str) -> bool:
    """Whether a gate is on, given those that were set. Raises KeyError for a gate that is not known."""
    gate = FEATURE_GATES[name]
    whole_stage = {Stage.ALPHA: "AllAlpha", Stage.BETA: "AllBeta"}.get(gate.stage, "")
    return chosen.get(name, chosen.get(whole_stage, gate.default))
