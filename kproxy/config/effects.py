"""Settings of kube-proxy that change nothing in kproxy, and why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kproxy.config.feature_gates import FEATURE_GATES
from kproxy.config.v1alpha1 import Configuration, paths, value_at

_LOGGED_AT_ONCE = "log lines are written at once, to one stream"
_WINDOWS = "it is for Windows"

NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "clientConnection.acceptContentTypes": "kproxy reads the API as JSON",
        "clientConnection.contentType": "kproxy reads the API as JSON",
        "logging.flushFrequency": _LOGGED_AT_ONCE,
        "logging.vmodule": "it names kube-proxy's source files",
        "logging.options.text.splitStream": _LOGGED_AT_ONCE,
        "logging.options.text.infoBufferSize": _LOGGED_AT_ONCE,
        "logging.options.json.splitStream": _LOGGED_AT_ONCE,
        "logging.options.json.infoBufferSize": _LOGGED_AT_ONCE,
        "showHiddenMetricsForVersion": "kproxy hides no metrics",
        "portRange": "kube-proxy does not use it either",
        "winkernel.networkName": _WINDOWS,
        "winkernel.sourceVip": _WINDOWS,
        "winkernel.enableDSR": _WINDOWS,
        "winkernel.rootHnsEndpointName": _WINDOWS,
        "winkernel.forwardHealthCheckVip": _WINDOWS,
        "windowsRunAsService": _WINDOWS,
    }
)


def without_effect(config: Configuration) -> list[str]:
    """A line for each setting that differs from its default and changes nothing."""
    default = Configuration()
    fields = [path for path in paths(config) if path in NO_EFFECT and value_at(config, path) != value_at(default, path)]
    return [f"{path} has no effect in kproxy: {NO_EFFECT[path]}" for path in fields] + gates_without_effect(config)


def gates_without_effect(config: Configuration) -> list[str]:
    """A line for each feature gate that was switched and changes nothing.

    Gates of other components are among them: kind writes all of a cluster's gates into kube-proxy's file, which knows
    every gate of Kubernetes.
    """
    lines = []
    for name, value in config.feature_gates.items():
        gate = FEATURE_GATES.get(name)
        if gate is None:
            lines.append(f"feature gate {name} is not kube-proxy's and has no effect in kproxy")
        elif value != gate.default and not gate.effect:
            lines.append(f"feature gate {name} has no effect in kproxy")
    return lines
