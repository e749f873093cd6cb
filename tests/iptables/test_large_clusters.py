"""Above 1,000 endpoints kube-proxy leaves comments out of their rules: a running kproxy follows, both ways."""

from __future__ import annotations

from kproxy.dataplane.iptables.commands import Variant, save, sections
from kproxy.model import Family
from tests.lab.waiting import eventually
from tests.reconcile.conftest import here
from tests.reconcile.objects import endpoints, service, web
from tests.reconcile.one_node import OneNode

__all__ = ["here"]

MANY = endpoints("many", *(f"10.9.{n >> 8}.{n & 255}" for n in range(999)))


def comments_of_web(here: OneNode) -> bool:
    """Whether the rules of the endpoints of Service web have comments."""
    read = sections(here.host.namespace.run(save, Variant.NFT, Family.IPv4, ["nat"]))
    rules = [rule for _, chain, rule in read if rule and chain.startswith("KUBE-SEP-") and "10.0.0.1" in rule]
    assert len(rules) == 2, rules
    (commented,) = {"--comment" in rule for rule in rules}
    return commented


def test_comments_go_and_come_back_with_the_number_of_endpoints(here: OneNode):
    here.host.exec("iptables-nft", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
    here.api.put_all([*web(), service("many", "10.96.0.20"), MANY])
    here.started("--proxy-mode=iptables", "--iptables-localhost-nodeports=false", "--iptables-min-sync-period=0s")
    assert not comments_of_web(here)

    here.api.delete("EndpointSlice", "many-1", "default")
    eventually(lambda: comments_of_web(here), "the comments are back", seconds=20)

    here.api.put(MANY)
    eventually(lambda: not comments_of_web(here), "the comments have gone again", seconds=20)
