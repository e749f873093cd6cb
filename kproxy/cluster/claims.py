"""Who owns an address and port that more than one Service asks for.

kube-proxy leaves it to chance (reference: section 13, item 5). Here a cluster IP beats an external address, so that
nobody takes over a Service by naming its address; then the older Service wins, then the one whose name sorts first.
The loser keeps its other frontends, and gets this one as soon as it is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kproxy.model import Family, Frontend, FrontendKind, ServiceName, ServicePort, ServicePortName


class _Claim(NamedTuple):
    """Smaller wins."""

    external: bool
    created: str
    owner: ServicePortName


class _Wish(NamedTuple):
    created: str
    frontends: tuple[tuple[FrontendKind, Frontend], ...]


class Claims:
    """Claims on frontends. `note` hears of each lost one."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._wishes: dict[tuple[ServicePortName, Family], _Wish] = {}
        self._owner: dict[Frontend, ServicePortName] = {}
        self._contested: dict[Frontend, list[_Claim]] = {}  # sorted; only where more than one claims

    def owner(self, frontend: Frontend) -> ServicePortName | None:
        """Who has won a frontend, if anyone claims it."""
        return self._owner.get(frontend)

    def owned(self, port: ServicePort) -> tuple[tuple[FrontendKind, Frontend], ...]:
        """The frontends that a service port has won."""
        wish = self._wishes.get((port.name, port.family))
        if wish is None:
            return ()
        if all(self._owner[frontend] == port.name for _, frontend in wish.frontends):
            return wish.frontends
        return tuple((kind, frontend) for kind, frontend in wish.frontends if self._owner[frontend] == port.name)

    def claim(self, port: ServicePort, frontends: tuple[tuple[FrontendKind, Frontend], ...]) -> set[ServiceName]:
        """Enter a service port's frontends. Returns the other Services that lose one by it."""
        losers: set[ServiceName] = set()
        wish = self._wishes[port.name, port.family] = _Wish(port.created, frontends)
        for _, frontend in frontends:
            holder = self._owner.setdefault(frontend, port.name)
            if holder == port.name:
                continue
            claims = self._contested.setdefault(frontend, [])
            if not claims:
                claims.append(_claim(holder, self._wishes[holder, port.family], frontend))
            claims.append(_claim(port.name, wish, frontend))
            claims.sort()
            winner = claims[0].owner
            loser = holder if winner == port.name else port.name
            self._note(f"Service {loser.service}: {frontend} belongs to Service {winner.service}, which goes first")
            if winner != holder:
                self._owner[frontend] = winner
                losers.add(holder.service)
        return losers

    def release(self, port: ServicePort) -> set[ServiceName]:
        """Give up a service port's frontends. Returns the other Services that gain one by it."""
        gainers: set[ServiceName] = set()
        for _, frontend in self._wishes.pop((port.name, port.family)).frontends:
            claims = self._contested.get(frontend)
            if claims is None:
                del self._owner[frontend]
                continue
            claims[:] = [claim for claim in claims if claim.owner != port.name]
            winner = claims[0].owner
            if winner != self._owner[frontend]:
                self._owner[frontend] = winner
                gainers.add(winner.service)
            if len(claims) == 1:
                del self._contested[frontend]
        return gainers


def _claim(owner: ServicePortName, wish: _Wish, frontend: Frontend) -> _Claim:
    external = (FrontendKind.CLUSTER_IP, frontend) not in wish.frontends
    return _Claim(external, wish.created, owner)
