"""kproxy in iptables mode over the rules of a kube-proxy in iptables mode: what is right is not even touched."""

from __future__ import annotations

import re

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.handover.stage import Stage

IPTABLES = ProxyMode.IPTABLES


def counts(stage: Stage) -> dict[str, int]:
    """How many packets each IPv4 rule of kube-proxy's chains has counted; kube-proxy left none without."""
    saved = stage.saved("--counters", families=[Family.IPv4])
    found = re.findall(r"^\[(\d+):\d+\] -A (KUBE-.*)$", saved, re.MULTILINE)
    return {rule: int(packets) for packets, rule in found if "KUBE-FIREWALL" not in rule}


def test_nothing_is_written_where_all_is_right(stage: Stage):
    stage.kube_proxys_iptables()
    before = stage.saved(), stage.generation()
    counted = counts(stage)

    for _ in range(2):
        proxy = stage.started(IPTABLES)
        assert all(count == 0 for name, count in proxy.scrape().items() if "kproxy_sync_changes_total" in name)
        proxy.stop()

    assert (stage.saved(), stage.generation()) == before
    assert all(packets >= counted[rule] for rule, packets in counts(stage).items())


def test_only_what_is_wrong_is_written(stage: Stage):
    stage.kube_proxys_iptables()
    right = stage.saved()
    before = counts(stage)
    # A Service that is gone, an endpoint's chain that was edited.
    service, endpoint = "KUBE-SVC-AAAAAAAAAAAAAAAA", "KUBE-SEP-BBBBBBBBBBBBBBBB"
    lines = (
        "*nat",
        f":{service} - [0:0]",
        f":{endpoint} - [0:0]",
        f'-A {service} -m comment --comment "default/gone -> 10.244.9.9:80" -j {endpoint}',
        f'-I KUBE-SERVICES -d 10.96.0.99/32 -p tcp -m comment --comment "default/gone cluster IP" -j {service}',
        "COMMIT\n",
    )
    stage.restore("\n".join(lines), "--noflush")
    chain = stage.endpoint_chain(stage.pods[0])
    stage.iptables("-t", "nat", "-D", chain, "1")

    stage.started(IPTABLES).stop()

    assert sorted(stage.saved().splitlines()) == sorted(right.splitlines())
    after = counts(stage)
    begun_anew = {rule for rule, packets in before.items() if after[rule] < packets}
    assert {rule.split()[0] for rule in begun_anew} == {chain}


def test_the_other_variant_is_told_of_and_left_alone(stage: Stage):
    other = Variant.LEGACY if stage.variant is Variant.NFT else Variant.NFT
    stage.node.exec(f"iptables-{other}", "--wait", "-t", "nat", "-N", "KUBE-SERVICES")
    before = stage.saved(variant=other)

    proxy = stage.started(IPTABLES)

    assert "packets meet both" in proxy.log.read_text()
    assert stage.saved(variant=other) == before
    proxy.stop()
    stage.node.exec(f"iptables-{other}", "--wait", "-t", "nat", "-X", "KUBE-SERVICES")
