"""The layout that kproxy does not use: a chain and an inline map for each service, as kube-proxy 1.36 writes it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

from tests.lab.apiserver_load import cluster_ip, slice_of


def _ruleset(services: int, endpoints: int) -> Iterator[str]:
    yield "add table ip baseline"
    yield "add map ip baseline service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }"
    yield "add chain ip baseline services"
    yield "add chain ip baseline nat-prerouting { type nat hook prerouting priority -100; }"
    yield "add rule ip baseline services ip daddr . meta l4proto . th dport vmap @service-ips"
    yield "add rule ip baseline nat-prerouting jump services"
    for number in range(services):
        chain = f"service-{number:08x}-default/svc-{number}/tcp/http"
        addresses = [e["addresses"][0] for e in slice_of(number, endpoints)["endpoints"]]
        slots = ", ".join(f"{slot} : {address} . 8080" for slot, address in enumerate(addresses))
        yield f"add chain ip baseline {chain}"
        yield (
            f"add rule ip baseline {chain} meta l4proto tcp dnat ip addr . port to "
            f"numgen random mod {endpoints} map {{ {slots} }}"
        )
        yield f"add element ip baseline service-ips {{ {cluster_ip(number)} . tcp . 80 : goto {chain} }}"


def load_chain_per_service(services: int, endpoints: int) -> float:
    """Seconds that `nft -f` takes to load it into an empty namespace."""
    text = "\n".join(_ruleset(services, endpoints)) + "\n"
    started = time.monotonic()
    subprocess.run(["unshare", "--net", "nft", "-f", "-"], input=text, text=True, check=True, timeout=600)
    return time.monotonic() - started
