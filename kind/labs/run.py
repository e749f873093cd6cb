"""The command line of kind/e2e."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from labs import endpoints, manifests, services
from labs.kubectl import LabError, kubectl, missing_tool
from labs.lab import Lab, say
from labs.nodes import kind_cluster, proxy_pods
from labs.programmed import all_is_done, wait_until

LABS: dict[str, Callable[[Lab], None]] = {
    "nodeport": services.node_port,
    "clusterip": services.cluster_ip,
    "deletion": endpoints.pod_deletion,
    "convert": services.convert,
    "loadbalancer": services.load_balancer,
    "externalname": services.external_name,
    "headless": services.headless,
    "affinity": endpoints.affinity,
    "readiness": endpoints.readiness,
    "cleanup": endpoints.cleanup,
}


def main() -> int:
    """Run the labs. 0: all passed; 1: one failed; 2: none could be run; 130: interrupted."""
    try:
        return _run_all(_arguments())
    except KeyboardInterrupt:
        say("\ne2e: interrupted")
        return 130


def _run_all(arguments: argparse.Namespace) -> int:
    if complaint := missing_tool():
        say(f"e2e: {complaint}")
        return 2
    try:
        context = kubectl("config", "current-context").strip()
        kind = kind_cluster()
        pods = proxy_pods()
        say(f"cluster {context}, kproxy on {len(pods)} nodes")
        if kind:
            kind.load([manifests.NGINX, manifests.HTTPD, manifests.CLIENT])
        wait_until(all_is_done)
    except LabError as error:
        say(f"e2e: {error}")
        return 2
    begin = time.monotonic()
    chosen = list(dict.fromkeys(arguments.lab)) or list(LABS)
    failed = [name for name in chosen if not _run(Lab(name, kind, arguments.patience), LABS[name], keep=arguments.keep)]
    passed = len(chosen) - len(failed)
    say(f"\n{passed} of {len(chosen)} labs passed in {time.monotonic() - begin:.0f} s")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(lab: Lab, function: Callable[[Lab], None], *, keep: bool) -> bool:
    say(f"\n{lab.name}: {function.__doc__}")
    passed = False
    try:
        lab.open()
        function(lab)
        passed = True
    except LabError as error:
        say(f"\n{lab.name} failed: {error}")
        _show_trouble(lab)
    finally:
        if not keep:
            try:
                lab.close()
            except LabError as error:
                say(f"  ✗ cannot clean up: {error}")
                passed = False
    return passed


def _show_trouble(lab: Lab) -> None:
    lab.show_trouble()
    try:
        for pod in proxy_pods():
            printed, logged = pod.dry_run()
            say(f"\nkproxy on {pod.node}, a dry run:\n{printed or logged}")
            say(f"kproxy on {pod.node}, the end of its log:\n{pod.log_end()}")
    except LabError as error:
        say(str(error))


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:13} {function.__doc__}" for name, function in LABS.items())
    parser = argparse.ArgumentParser(
        prog="kind/e2e",
        description="Tries Services on the cluster that kubectl reaches, each lab in a namespace of its own.",
        epilog=f"labs:\n{listed}\n\nVariables: kind/README.md."
        " Exit code 0: all passed, 1: a lab failed, 2: none ran, 130: interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lab", action="append", default=[], choices=LABS, help="only this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="leave the namespaces as they are at the end")
    parser.add_argument(
        "--patience", type=float, default=20, metavar="SECONDS", help="until a change must be seen; default %(default)s"
    )
    return parser.parse_args()
