"""ipvs mode needs a kernel with IPVS: this one where it can, else User-Mode Linux."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ipvs.uml_outer import IpvsInUml
from tests.lab.namespaces import Namespace


def pytest_configure(config: pytest.Config) -> None:
    if not _kernel_has_ipvs():
        config.pluginmanager.register(IpvsInUml())


def _kernel_has_ipvs() -> bool:
    """Whether virtual servers and the device for their addresses can be had here."""
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", "ip_vs"], check=False)
    if not Path("/proc/net/ip_vs").exists():
        return False
    with Namespace() as namespace:
        return namespace.command("ip", "link", "add", "probe", "type", "dummy", check=False).returncode == 0
