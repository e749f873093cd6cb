"""`python -m tests.bench`: start, change, restart, memory and CPU in nftables mode, from 100 to 30,000 services.

Everything is real: an API server stand-in in a process of its own, one `kproxy` process, the kernel's nf_tables in a
network namespace of its own. Times are wall-clock times on the machine at hand.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.bench.baseline import load_chain_per_service
from tests.bench.measure import Figures, measure

INSIDE = "KPROXY_BENCH_INSIDE"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--services", default="100,1000,10000,30000", help="how many, comma separated")
    parser.add_argument("--endpoints", type=int, default=10, help="endpoints of each service")
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        command = ["unshare", "--net", sys.executable, "-m", "tests.bench", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    print(f"kernel {os.uname().release}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, nftables mode\n")
    print(Figures.header(), flush=True)
    for services in map(int, arguments.services.split(",")):
        print(measure(services, arguments.endpoints).row(), flush=True)
    print(Figures.legend())

    seconds = load_chain_per_service(1000, arguments.endpoints)
    print(
        f"\nFor comparison, `nft -f` of a chain per service, 1,000 × {arguments.endpoints}: {seconds:.2f} s",
        "(the first load only; no API, no process start)",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
