"""The proxy under test, through one seam: objects in, a sync, and the kernel of a namespace is as it should be.

`InProcess` drives state, reconciler and dataplane directly, which takes milliseconds; `CommandLine` starts kproxy as a
user does, with a configuration file and a directory of manifests. Objects are those of the API as JSON has them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import msgspec

from kproxy.api.events import Changed, Deleted, Listed
from kproxy.api.objects import KINDS
from kproxy.cluster import ClusterState
from kproxy.config.decode import decode
from kproxy.config.defaults import defaulted, with_mode
from kproxy.config.v1alpha1 import API_VERSION, KIND, Configuration, KproxyConfiguration, ProxyMode
from kproxy.dataplane.iptables.commands import Variant
from kproxy.dataplane.ipvs.names import DEVICE
from kproxy.dataplane.nftables.kernel import COUNTED_ENDPOINTS
from kproxy.facts import Facts
from kproxy.model import Family
from kproxy.modes.base import Mode
from kproxy.modes.iptables import Iptables
from kproxy.modes.ipvs import Ipvs
from kproxy.modes.nftables import Nftables
from kproxy.node_addresses import local_addresses
from kproxy.observers import Cleaned
from kproxy.reconcile import Reconciler
from tests.lab.namespaces import Namespace

ROOT = Path(__file__).resolve().parents[2]

HINT = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"

Item = Mapping[str, Any]


class Proxy(Protocol):
    """A proxy on the node of a namespace. What it wrote stays in force when it is closed."""

    def apply(self, *items: Item) -> None:
        """Objects were created or replaced."""

    def delete(self, *items: Item) -> None:
        """Objects were deleted; kind, namespace and name suffice."""

    def sync(self) -> None:
        """Bring the kernel up to date. Raises what the proxy raises."""

    def close(self) -> None:
        """End the proxy."""


class InProcess:
    """Drives the proxy's parts in this process; what they open is opened in the namespace.

    `variant` is that of iptables, hinted at as by kubelet; None: the one that is found.
    """

    def __init__(
        self, netns: Namespace, config: Item, families: Iterable[Family] = Family, variant: Variant | None = None
    ) -> None:
        read, problems = decode(Configuration, config)
        if any(problems):
            raise ValueError(f"configuration: {problems}")
        mode = read.mode or ProxyMode.NFTABLES
        self._config = with_mode(defaulted(read), mode)
        self._netns = netns
        self._families = tuple(families)
        self.notes: list[str] = []
        self.state = ClusterState(
            self._config.hostname_override,
            self._families,
            note=self.notes.append,
            allow_external_ips=self._config.allow_external_ips,
        )
        for kind in KINDS:
            self.state.apply(Listed(kind, frozenset()))
        if variant:  # as kubelet shows it
            netns.command(f"iptables-{variant}-restore", "--noflush", stdin=HINT)
        self._mode = netns.run(_open, self._config, self._families)
        large = self._mode.large_families(self.state)
        self._facts = Facts(self._config, mode, self._families, self.state, _own_addresses, print, large)
        self._started: tuple[Reconciler, Cleaned] | None = None

    def apply(self, *items: Item) -> None:
        for item in items:
            self.state.apply(Changed(item["kind"], msgspec.convert(item, KINDS[item["kind"]])))

    def delete(self, *items: Item) -> None:
        for item in items:
            self.state.apply(Deleted(item["kind"], msgspec.convert(item, KINDS[item["kind"]])))

    def sync(self) -> None:
        self._netns.run(self._sync)

    def _sync(self) -> None:
        facts = self._facts()
        if facts is None:
            raise ValueError("the node's facts are not known yet: is there a Node object?")
        if self._started is None:
            reconciler = Reconciler(self.state, self._mode.dataplane, facts)
            self._started = reconciler, Cleaned(reconciler, local_addresses, None)
        reconciler, cleaned = self._started
        reconciler.set_facts(facts)
        report = reconciler.sync()
        cleaned.sync_done(report, 0.0)
        cleaned.clean_now()

    def close(self) -> None:
        self._netns.run(self._mode.close)


class CommandLine:
    """Runs `kproxy --once` for each sync."""

    def __init__(self, netns: Namespace, config: Item) -> None:
        self._netns = netns
        self._folder = TemporaryDirectory(prefix="kproxy-")
        self._config = Path(self._folder.name, "config.yaml")
        self._config.write_text(json.dumps({"apiVersion": API_VERSION, "kind": KIND, **config}))
        self._manifests = Path(self._folder.name, "manifests")
        self._manifests.mkdir()

    def apply(self, *items: Item) -> None:
        for item in items:
            self._file(item).write_text(json.dumps(item))

    def delete(self, *items: Item) -> None:
        for item in items:
            self._file(item).unlink(missing_ok=True)

    def sync(self) -> None:
        self._netns.command(
            sys.executable,
            "-m",
            "kproxy",
            "--once",
            "--config",
            str(self._config),
            "--manifests",
            str(self._manifests),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def close(self) -> None:
        self._folder.cleanup()

    def _file(self, item: Item) -> Path:
        metadata = item["metadata"]
        return self._manifests / f"{item['kind']}-{metadata.get('namespace', '')}-{metadata['name']}.json"


def _own_addresses() -> frozenset[str]:
    return local_addresses(exclude=DEVICE)


def _open(config: Configuration, families: Sequence[Family]) -> Mode:
    match config.mode:
        case ProxyMode.NFTABLES:
            return Nftables(families, COUNTED_ENDPOINTS)
        case ProxyMode.IPTABLES:
            return Iptables(config, families, writes=True)
        case ProxyMode.IPVS:
            opened = Ipvs(config, KproxyConfiguration(), families)
            opened.prepare()
            return opened
        case mode:
            raise ValueError(f"{mode} is no mode of a proxy on Linux")
