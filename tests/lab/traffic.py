"""Traffic of the cluster lab: who answers, how a refusal looks, and a stream of connections that misses nothing."""

from __future__ import annotations

import errno
import http.client
import threading
import time
from collections import Counter
from enum import Enum

from tests.lab.host import Host
from tests.lab.waiting import eventually

SILENCE_SECONDS = 1.0
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH}
_LOOK_SECONDS = 0.2  # where one looks again anyway


class NoAnswer(Enum):
    """How a connection can fail, as a client tells it."""

    REFUSED = "refused"
    SILENCE = "silence"
    UNREACHABLE = "unreachable"


def who_answers(host: Host, url: str, connections: int) -> Counter[str]:
    """Which pod answered each of so many new connections. Raises OSError if one fails."""
    return Counter(host.get(url).pod for _ in range(connections))


def try_once(host: Host, url: str, *, patience: float = SILENCE_SECONDS) -> str | NoAnswer:
    """The pod that answers a new connection, or how it fails. Raises OSError where it fails otherwise."""
    try:
        return host.get(url, timeout=patience).pod
    except ConnectionRefusedError:
        return NoAnswer.REFUSED
    except TimeoutError:
        return NoAnswer.SILENCE
    except OSError as error:
        if error.errno not in _UNREACHABLE:
            raise
        return NoAnswer.UNREACHABLE


def settle(host: Host, url: str, pods: set[str], *, seconds: float = 10.0) -> float:
    """Wait until these pods answer and no other; the seconds that took. Raises AssertionError."""

    def reached() -> bool:
        # So many that a pod which still takes its share would be missed once in 10^10 times.
        seen.clear()
        for _ in range(20 * (len(pods) + 1)):
            seen.add(host.get(url, timeout=0.5).pod)
            if not seen <= pods:
                return False
        return seen == pods

    seen: set[str] = set()
    begin = time.monotonic()
    try:
        eventually(reached, f"{url} is answered by {', '.join(sorted(pods))}", seconds=seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; answered by {', '.join(sorted(seen)) or 'nobody'}") from None
    return time.monotonic() - begin


def fails_as(host: Host, url: str, how: NoAnswer, *, seconds: float = 10.0) -> None:
    """Wait until new connections fail in this way. Raises AssertionError."""
    patience = SILENCE_SECONDS if how is NoAnswer.SILENCE else _LOOK_SECONDS
    eventually(lambda: try_once(host, url, patience=patience) is how, f"{url} ends in {how.value}", seconds=seconds)


def answered(host: Host, url: str, *, seconds: float = 10.0) -> str:
    """Wait until a new connection is answered; by which pod. Raises AssertionError."""
    return eventually(lambda: host.get(url, timeout=_LOOK_SECONDS).pod, f"{url} is answered", seconds=seconds)


class Stream:
    """New connections one after the other from a thread of its own, until the block ends."""

    def __init__(self, host: Host, url: str) -> None:
        self._host, self._url = host, url
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0  # seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def connections(self) -> int:
        """How many have been answered."""
        return self.answers.total()

    def more(self, connections: int) -> None:
        """Wait until so many more connections have been answered. Raises AssertionError."""
        goal = self.connections + connections
        eventually(lambda: self.connections >= goal or self.failures, f"{connections} more connections")

    def _run(self) -> None:
        while not self._over.is_set():
            begin = time.monotonic()
            try:
                answer = self._host.get(self._url, timeout=SILENCE_SECONDS)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"connection {self.connections + len(self.failures) + 1}: {error!r}")
                time.sleep(0.01)  # a refusal comes at once; do not spin on it
            else:
                self.answers[answer.pod] += 1
                self.slowest = max(self.slowest, answer.seconds)
            self._over.wait(0.001 - (time.monotonic() - begin))  # leave the processor to the others
