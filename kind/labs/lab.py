"""What a lab has at hand: a namespace of its own, servers whose pages tell them apart, and a client in the cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from labs import manifests
from labs.kubectl import LabError, Object, get, kubectl, run, wait_for
from labs.nodes import KindCluster

FAILED = "nobody"
_STOP = "/tmp/stop"  # noqa: S108 - in a pod of ours
_START_SECONDS = 180
_IMAGE_TROUBLE = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"}

# Prints for each of $2 requests to $1 the checksum of the page, or "-"; gives up after three without an answer.
_FETCH = """\
fetch() {
    if command -v curl >/dev/null; then curl -s -f -g --noproxy '*' -m 2 "$1"; else wget -q -O - -T 2 -t 1 "$1"; fi
}
look() { if page=$(fetch "$1" 2>/dev/null); then printf %s "$page" | md5sum | cut -c 1-32; else echo -; fi; }
"""
_MANY = (
    _FETCH
    + """\
n=0 lost=0
while [ $n -lt "$2" ] && [ $lost -lt 3 ]; do
    page=$(look "$1")
    echo "$page"
    [ "$page" != - ] || lost=$((lost + 1))
    n=$((n + 1))
done
"""
)
_UNTIL_TOLD = (
    _FETCH
    + """\
n=0
while [ $n -lt 3000 ] && [ ! -e /tmp/stop ]; do look "$1"; n=$((n + 1)); sleep 0.05 2>/dev/null || sleep 1; done
"""
)


def say(text: str) -> None:
    """A line for the user, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Lab:
    """One run of one lab. Pages are identified by what the server pods say when they are asked directly.

    `patience`: the seconds until a change must have reached every node.
    """

    def __init__(self, name: str, kind: KindCluster | None, patience: float) -> None:
        self.name, self.namespace = name, f"kproxy-e2e-{name}"
        self.kind = kind
        self.patience = patience
        self._pages: dict[str, str] = {}  # checksum → name of the server

    # Telling

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Print a line about what happens inside: ✓ and the time, or ✗; a failure goes on."""
        begin = time.monotonic()
        try:
            yield
        except LabError:
            say(f"  ✗ {what} ({time.monotonic() - begin:.1f} s)")
            raise
        say(f"  ✓ {what} ({time.monotonic() - begin:.1f} s)")

    def skip(self, what: str, why: str) -> None:
        """Print that something cannot be checked on this cluster."""
        say(f"  – {what}: {why}")

    def show_trouble(self) -> None:
        """Print what helps to find out why a check failed."""
        for arguments in (
            ("get", "pods,services,endpointslices", "-o", "wide"),
            ("get", "events", "--sort-by=.lastTimestamp"),
            ("logs", "-l", "app", "--all-containers", "--prefix", "--tail=10"),
        ):
            done = run("-n", self.namespace, *arguments)
            say(f"\n$ kubectl -n {self.namespace} {' '.join(arguments)}\n{done.stdout}{done.stderr}")

    # Objects

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """kubectl in the lab's namespace. Raises KubectlError."""
        return kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def get(self, kind: str, name: str) -> Object:
        """One object of the lab's namespace."""
        return get("-n", self.namespace, kind, name)

    def create(self, *objects: Object) -> None:
        """Create objects."""
        self.kubectl("create", "-f", "-", stdin="".join(f"---\n{json.dumps(each)}\n" for each in objects))

    def patch(self, service: str, change: Object, *more: str) -> None:
        """Merge a change into a Service."""
        self.kubectl("patch", "service", service, "--type=merge", *more, "-p", json.dumps(change))

    def cluster_ip(self, service: str) -> str:
        """A Service's address."""
        address: str = self.get("service", service)["spec"]["clusterIP"]
        return address

    # Life

    def open(self) -> None:
        """Make the namespace, without what a run that was ended has left."""
        self.close()
        kubectl("create", "-f", "-", stdin=json.dumps(manifests.namespace(self.namespace)))
        # Pods are refused until the namespace has its default service account.
        wait_for(lambda: self.get("serviceaccount", "default"), "the namespace has a service account", 30)

    def close(self) -> None:
        """Remove the namespace with all that is in it."""
        kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--timeout=120s", timeout=150)

    # Pods

    def start(self, *pods: Object) -> None:
        """Create pods and the client, wait until they are ready, and learn the pages of the servers."""
        self.create(*pods, manifests.client())
        names = [pod["metadata"]["name"] for pod in pods if pod["kind"] == "Pod"]
        self.wait_until_ready(["client", *names])
        self.learn_pages(names)

    def wait_until_ready(self, names: list[str]) -> None:
        """Wait until the pods are ready; an image that cannot be had ends it at once."""

        def ready() -> bool:
            return all(_is_ready(self.get("pod", name)) for name in names)

        try:
            wait_for(ready, f"the pods {', '.join(names)} are ready", _START_SECONDS)
        except _ImageError as error:
            raise LabError(str(error)) from None

    def learn_pages(self, names: list[str]) -> None:
        """Ask each server at its own address. Raises LabError if two cannot be told apart by what they say."""
        self._pages = {}
        for name in names:
            url = f"http://{in_url(self.pod_address(name))}/"

            def ask(url: str = url) -> str:
                checksum = self._look(url, 1)[0]
                if checksum == "-":
                    raise LabError(f"{url} does not answer the client, without any Service")
                return checksum

            checksum = wait_for(ask, f"the pod {name} answers", 15)
            if checksum in self._pages:
                raise LabError(
                    f"{name} and {self._pages[checksum]} show the same page; images with different ones are needed"
                )
            self._pages[checksum] = name

    def pod_address(self, name: str) -> str:
        """A pod's address."""
        address: str = self.get("pod", name)["status"]["podIP"]
        return address

    def in_pod(self, pod: str, *command: str) -> str:
        """Run a command in a pod. Raises KubectlError."""
        return self.kubectl("exec", pod, "--", *command)

    # Traffic

    def ask(self, url: str, times: int = 20) -> Counter[str]:
        """How often which server has answered the client, and how often nobody; the third time is the last request."""
        return self._names(self._look(url, times))

    def answers(self, url: str, *servers: str, within: float | None = None) -> None:
        """Every request must be answered, and by each of the servers, soon. Raises LabError."""

        def all_answer() -> bool:
            seen = self.ask(url)
            if set(seen) != set(servers):
                raise LabError(f"{url} was answered by {_shares(seen)}")
            return True

        wait_for(all_answer, f"{url} is answered by {' and '.join(servers)}", within or self.patience)

    def refuses(self, url: str) -> None:
        """Nobody may answer, soon. Raises LabError."""

        def nobody_answers() -> bool:
            seen = self.ask(url, times=2)
            if set(seen) != {FAILED}:
                raise LabError(f"{url} was answered by {_shares(seen)}")
            return True

        wait_for(nobody_answers, f"{url} is not answered", self.patience)

    @contextmanager
    def traffic(self, url: str) -> Iterator[Counter[str]]:
        """Requests one after the other while the body runs. The counter is filled when it ends."""
        seen: Counter[str] = Counter()
        self.in_pod("client", "rm", "-f", _STOP)
        command = ("kubectl", "-n", self.namespace, "exec", "client", "--", "sh", "-c", _UNTIL_TOLD, "sh", url)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield seen
                self.in_pod("client", "touch", _STOP)
                printed = process.communicate(timeout=30)[0]
            except subprocess.TimeoutExpired:
                raise LabError(f"the requests to {url} do not end") from None
            finally:
                process.kill()
        seen.update(self._names(printed.split()))

    def resolve(self, name: str) -> set[str]:
        """The addresses that the cluster's DNS gives for a name."""
        script = 'if command -v getent >/dev/null; then getent ahosts "$1"; else nslookup "$1"; fi || true'
        printed = self.in_pod("client", "sh", "-c", script, "sh", name)
        answer = printed.partition("\n\n")[2] or printed  # nslookup begins with the DNS server's own address
        return set(re.findall(r"(?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]*:[0-9a-f:]*:[0-9a-f:]*", answer))

    def cluster_domain(self) -> str:
        """The domain of the cluster's DNS, as pods are told it."""
        found = re.search(r"^search.*\ssvc\.(\S+)", self.in_pod("client", "cat", "/etc/resolv.conf"), re.MULTILINE)
        if not found:
            raise LabError("the client's /etc/resolv.conf has no search domain svc.…: this cluster has no DNS")
        return found[1].rstrip(".")

    def _look(self, url: str, times: int) -> list[str]:
        return self.in_pod("client", "sh", "-c", _MANY, "sh", url, str(times)).split()

    def _names(self, checksums: list[str]) -> Counter[str]:
        known = {"-": FAILED, **self._pages}
        return Counter(known.get(checksum, f"someone else (a page with checksum {checksum})") for checksum in checksums)


class _ImageError(Exception):
    """A node cannot get an image."""


def _is_ready(pod: Object) -> bool:
    status = pod["status"]
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in _IMAGE_TROUBLE:
            raise _ImageError(
                f"the image {container['image']} cannot be had: {waiting.get('message', waiting['reason'])}."
                " E2E_NGINX_IMAGE, E2E_HTTPD_IMAGE and E2E_CLIENT_IMAGE name other images"
            )
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))


def in_url(address: str) -> str:
    """An address as URLs have it."""
    return f"[{address}]" if ":" in address else address


def _shares(seen: Counter[str]) -> str:
    return ", ".join(f"{name} {times}×" for name, times in sorted(seen.items()))
