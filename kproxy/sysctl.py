"""Kernel settings that are written once at start, in every mode (reference: section 5.2).

What to write is computed first, as plain data; then each value is compared with the file and written if it differs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import structlog

_CONNTRACK_MAX_CAP = 1 << 20  # for what the cores ask (kube-proxy 1.36)
_CONNTRACK = "proc/sys/net/netfilter/nf_conntrack_"
_HASH_SIZE = "sys/module/nf_conntrack/parameters/hashsize"
_ENTRIES_PER_BUCKET = 4

log = structlog.get_logger(__name__)


class SysctlError(Exception):
    """A setting could not be read or written; the message names the file and the way out."""


class ConntrackLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The `conntrack` part of the configuration, with kube-proxy's defaults. Timeouts: seconds, 0 leaves them alone."""

    max_per_core: int = 32768  # 0: the size of the table is left alone, and `min` with it
    min: int = 131072
    tcp_established_timeout: float = 86400
    tcp_close_wait_timeout: float = 3600
    tcp_be_liberal: bool = False  # False never takes the setting back
    udp_timeout: float = 0
    udp_stream_timeout: float = 0


class Setting(msgspec.Struct, frozen=True):
    """A file below the root directory, and the number that it shall hold."""

    path: str  # relative, such as proc/sys/net/…
    value: int
    at_least: bool = False  # a larger value is left in place
    opt_out: str = ""  # the configuration that leaves the file alone, where there is one


def conntrack_max(max_per_core: int, minimum: int, cpus: int) -> int:
    """The largest number of conntrack entries; 0: leave it alone.

    Where the cores ask for more than the cap, the cap holds even against a larger minimum.
    """
    if max_per_core <= 0:
        return 0
    scaled = max_per_core * cpus
    return _CONNTRACK_MAX_CAP if scaled > _CONNTRACK_MAX_CAP else max(scaled, minimum)


def conntrack_settings(limits: ConntrackLimits, cpus: int) -> list[Setting]:
    """What the configuration asks of connection tracking on a machine with so many CPUs, in the order of writing."""
    settings = []
    if entries := conntrack_max(limits.max_per_core, limits.min, cpus):
        opt_out = "conntrack.maxPerCore: 0"
        settings.append(Setting(f"{_CONNTRACK}max", entries, opt_out=opt_out))
        settings.append(Setting(_HASH_SIZE, entries // _ENTRIES_PER_BUCKET, at_least=True, opt_out=opt_out))
    for name, value, opt_out in (
        ("tcp_timeout_established", limits.tcp_established_timeout, "conntrack.tcpEstablishedTimeout: 0s"),
        ("tcp_timeout_close_wait", limits.tcp_close_wait_timeout, "conntrack.tcpCloseWaitTimeout: 0s"),
        ("tcp_be_liberal", limits.tcp_be_liberal, "conntrack.tcpBeLiberal: false"),
        ("udp_timeout", limits.udp_timeout, "conntrack.udpTimeout: 0s"),
        ("udp_timeout_stream", limits.udp_stream_timeout, "conntrack.udpStreamTimeout: 0s"),
    ):
        if value > 0:
            settings.append(Setting(_CONNTRACK + name, max(int(value), 1), opt_out=opt_out))
    return settings


def apply(settings: Iterable[Setting], root: Path = Path("/")) -> list[Setting]:
    """Write what differs, in order; returns what was written.

    Raises SysctlError at the first that fails, and takes back what was written before it.
    """
    written: list[Setting] = []
    before: list[tuple[Path, int]] = []
    for setting in settings:
        file = root / setting.path
        try:
            now = int(file.read_text())
            if now == setting.value or (setting.at_least and now > setting.value):
                continue
            file.write_text(f"{setting.value}\n")
        except (OSError, ValueError) as e:
            _take_back(before)
            raise SysctlError(_explain(setting, file, e)) from e
        written.append(setting)
        before.append((file, now))
    return written


def _take_back(before: list[tuple[Path, int]]) -> None:
    for file, value in reversed(before):
        try:
            file.write_text(f"{value}\n")
        except OSError as error:
            log.warning("cannot be taken back", file=str(file), value=value, error=error.strerror)


def current(path: str, root: Path = Path("/")) -> int:
    """What a file below the root directory holds; 0 where the kernel does not have it. Raises OSError."""
    try:
        return int((root / path).read_text())
    except FileNotFoundError:
        return 0


def _explain(setting: Setting, file: Path, error: OSError | ValueError) -> str:
    text = f"cannot set {file} to {setting.value}: {error.strerror if isinstance(error, OSError) else error}"
    match error:
        case FileNotFoundError():
            text += "; load the kernel module that provides it"
        case PermissionError():
            text += "; allow it (a privileged container in the host's network namespace)"
        case OSError(errno=errno.EROFS):
            text += "; mount it writable"
    return f"{text}, or configure {setting.opt_out} to leave it alone" if setting.opt_out else text


def host_cpus(root: Path = Path("/")) -> int:
    """The CPUs of the machine that are online, whatever this process may use."""
    try:
        return _count((root / "sys/devices/system/cpu/online").read_text())
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _count(ranges: str) -> int:
    """The size of a kernel list such as 0-3,8."""
    total = 0
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def set_oom_score_adjustment(value: int, root: Path = Path("/")) -> None:
    """Tell the kernel how eagerly to kill this process when memory runs out: -1000 (never) … 1000.

    A failure is only logged: a proxy that may not set it works all the same.
    """
    try:
        apply([Setting("proc/self/oom_score_adj", value)], root)
    except SysctlError:
        log.warning("the OOM score stays as it is; to lower it takes CAP_SYS_RESOURCE", wanted=value)
