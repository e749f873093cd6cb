"""What a mode does not need is not loaded: it would cost memory on every node (see pyproject.toml)."""

from __future__ import annotations

import sys

import pytest

from tests.lab.proxy_process import kproxy_environment
from tests.reconcile.objects import web
from tests.reconcile.one_node import OneNode

ONCE = """
import sys
from kproxy.cli.main import main
status = main(sys.argv[1:])
print(status, [name for name in ("kubernetes", "pyroute2") if name in sys.modules])
"""


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_without_api_server_and_ipvs_mode_there_is_neither_client_nor_pyroute2(here: OneNode, mode: str):
    flags = (f"--proxy-mode={mode}", f"--manifests={here.manifests(*web())}", "--hostname-override=here", "--once")

    done = here.host.namespace.command(sys.executable, "-c", ONCE, *flags, env=kproxy_environment())

    assert done.stdout == "0 []\n", done.stderr
