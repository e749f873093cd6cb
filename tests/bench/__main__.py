"""`python -m tests.bench`: start, change, restart, memory and CPU in nftables and iptables mode.

Everything is real: an API server stand-in in a process of its own, one `kproxy` process, the kernel's tables in a
network namespace of its own. Times are wall-clock times on the machine at hand.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.bench import iptables, ipvs
from tests.bench.baseline import load_chain_per_service
from tests.bench.measure import Figures, measure

INSIDE = "KPROXY_BENCH_INSIDE"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--services", help="how many, comma separated; each mode has sizes of its own otherwise")
    parser.add_argument("--mode", choices=("nftables", "iptables", "ipvs"), help="only this one; ipvs only if named")
    parser.add_argument("--variant", choices=("nft", "legacy"), help="of iptables, only this one")
    parser.add_argument("--endpoints", type=int, default=10, help="endpoints of each service")
    arguments = parser.parse_args()
    if arguments.mode == "ipvs":
        return ipvs.main(sizes(arguments.services or "100,1000"), arguments.endpoints)
    if INSIDE not in os.environ:
        command = ["unshare", "--net", sys.executable, "-m", "tests.bench", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    print(f"kernel {os.uname().release}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    if arguments.mode != "iptables":
        nftables(sizes(arguments.services or "100,1000,10000,30000"), arguments.endpoints)
    if arguments.mode != "nftables":
        variants = [arguments.variant] if arguments.variant else ["nft", "legacy"]
        for_iptables(sizes(arguments.services or "1000,5000"), arguments.endpoints, variants)
    return 0


def sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def nftables(services: list[int], endpoints: int) -> None:
    print("\nnftables mode\n")
    print(Figures.header(), flush=True)
    for size in services:
        print(measure(size, endpoints).row(), flush=True)
    print(Figures.legend())

    seconds = load_chain_per_service(1000, endpoints)
    print(
        f"\nFor comparison, `nft -f` of a chain per service, 1,000 × {endpoints}: {seconds:.2f} s",
        "(the first load only; no API, no process start)",
    )


def for_iptables(services: list[int], endpoints: int, variants: list[str]) -> None:
    version = subprocess.run(["iptables", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    print(f"\niptables mode, iptables {version}\n")
    print(iptables.Figures.header(), flush=True)
    for variant in variants:
        for size in services:
            print(iptables.measure(size, endpoints, variant).row(), flush=True)
    print(iptables.Figures.legend())


if __name__ == "__main__":
    sys.exit(main())
