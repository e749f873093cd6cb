"""What the kernel refuses is named, and nothing of such a transaction is in force."""

from __future__ import annotations

import sys

import pytest

from kproxy.dataplane.base import ApplyError, Change, diff
from kproxy.dataplane.nftables import expressions as x
from kproxy.dataplane.nftables.containers import COMMENT_BYTES, container, element_comment
from kproxy.dataplane.nftables.expressions import rule
from kproxy.dataplane.nftables.kernel import NftablesKernel
from kproxy.dataplane.nftables.ruleset import Chain, ChainKey, KubeProxyTableKey, SetKey, Table, TableKey
from kproxy.model import Family
from tests.lab.namespaces import Namespace
from tests.nftables.conftest import WITHOUT_OWNER, OpenKernel
from tests.nftables.samples import address, empty_layout, endpoint_key

V4 = Family.IPv4
SERVICES = container(V4, "services")
ENDPOINTS = container(V4, "endpoints")
MASQ = ChainKey(V4, "masq")
LAYOUT = {**empty_layout(V4), MASQ: Chain(None, (rule(x.mark_or(1)),))}


@pytest.fixture
def ready(kernel: NftablesKernel) -> NftablesKernel:
    kernel.apply(diff(LAYOUT, {}))
    return kernel


def service(number: int) -> bytes:
    return SERVICES.key(address(V4, number), 6, 80)


def test_the_one_bad_element_among_thousands_is_named(ready: NftablesKernel):
    changes = [Change(service(n), None, ("goto masq", f"ns/service-{n}:http")) for n in range(5000)]
    changes[3210] = Change(service(3210), None, ("goto no-such-chain", "ns/bad:http"))
    with pytest.raises(ApplyError, match=r"ip map services: 10\.0\.12\.138 \. tcp \. 80: No such file") as refused:
        ready.apply(changes)
    assert refused.value.culprits == (service(3210),)
    assert not refused.value.transient
    assert ready.read() == LAYOUT


def test_bad_elements_of_several_maps_are_all_named(ready: NftablesKernel):
    missing = endpoint_key(ENDPOINTS, address(V4, 1), 6, 80, slot=0)
    changes = [
        Change(service(1), None, ("goto no-such-chain", "")),
        Change(service(2), None, ("goto masq", "")),
        Change(missing, ENDPOINTS.address_port(address(V4, 9), 80), None),
    ]
    with pytest.raises(ApplyError) as refused:
        ready.apply(changes)
    assert set(refused.value.culprits) == {service(1), missing}
    assert ready.read() == LAYOUT


def test_a_bad_rule_is_named_and_not_what_depends_on_it(ready: NftablesKernel):
    pick = ChainKey(V4, "pick-1")
    lost = Chain(None, (rule(x.dnat(ENDPOINTS, 1)), rule(x.jump("no-such-chain"))))
    with pytest.raises(ApplyError, match="ip chain pick-1") as refused:
        ready.apply([Change(service(1), None, ("goto pick-2", "")), Change(pick, None, lost)])
    assert refused.value.culprits == (pick,)
    assert ready.read() == LAYOUT


def test_overlapping_source_ranges_are_refused_by_name(ready: NftablesKernel):
    ranges = container(V4, "source-ranges")
    start = ranges.key(address(V4, 1), 6, 80)
    wide = ranges.interval(start, address(V4, 0), address(V4, 0xFF))
    narrow = ranges.interval(start, address(V4, 0x10), address(V4, 0x1F))
    with pytest.raises(ApplyError, match=r"10\.0\.0\.16/28") as refused:
        ready.apply([Change(wide, None, ""), Change(narrow, None, "")])
    assert refused.value.culprits == (narrow,)
    # but one may take the other's place
    ready.apply([Change(wide, None, "")])
    ready.apply([Change(narrow, None, ""), Change(wide, "", None)])
    assert ready.read() == {**LAYOUT, narrow: ""}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (service(1), ("goto masq", "x" * (COMMENT_BYTES + 1))),
        (service(1), ("balance", "")),
        (service(1), ""),
        (endpoint_key(ENDPOINTS, address(V4, 1), 6, 80, slot=0), b"\0" * 7),
        (ChainKey(V4, "new"), Chain(None, (rule(x.accept(), comment="x" * 200),))),
        (ChainKey(V4, "new"), "no chain"),
        (SetKey(V4, "new"), "no set"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(ready: NftablesKernel, key: object, value: object):
    with pytest.raises(ApplyError) as refused:
        ready.apply([Change(key, None, value), Change(service(7), None, ("goto masq", ""))])
    assert refused.value.culprits == (key,)
    assert ready.read() == LAYOUT


def test_a_long_comment_is_cut_where_a_character_ends():
    assert element_comment("ns/name:port") == "ns/name:port"
    assert len(element_comment("ä" * 100).encode()) == COMMENT_BYTES - 1


def test_a_chain_that_is_still_referred_to_stays_and_the_rest_is_done(ready: NftablesKernel):
    pick = ChainKey(V4, "pick-1")
    chain = Chain(None, (rule(x.dnat(ENDPOINTS, 1)),))
    ready.apply([Change(pick, None, chain), Change(service(1), None, ("goto pick-1", ""))])
    # given that the reference stays, when the chain is to go with something else
    ready.apply([Change(pick, chain, None), Change(service(2), None, ("goto masq", ""))])
    assert ready.read() == {**LAYOUT, pick: chain, service(1): ("goto pick-1", ""), service(2): ("goto masq", "")}
    # then it goes when nothing refers to it any more, and can come again
    ready.apply([Change(pick, chain, None), Change(service(1), ("goto pick-1", ""), None)])
    assert ready.read() == {**LAYOUT, service(2): ("goto masq", "")}


def test_a_chain_that_is_there_already_is_not_doubled(ready: NftablesKernel):
    ready.apply([Change(MASQ, None, LAYOUT[MASQ])])
    assert ready.read() == LAYOUT


@pytest.mark.parametrize("destroy", [True, False])
def test_learned_elements_that_expired_meanwhile_can_be_removed(
    open_kernel: OpenKernel, netns: Namespace, destroy: bool
):
    kernel = open_kernel(features=WITHOUT_OWNER._replace(destroy=destroy))
    kernel.apply(diff(LAYOUT, {}))
    affinity = container(V4, "affinity")
    there, gone = (affinity.key(address(V4, n), address(V4, 1), 6, 80) for n in (100, 101))
    value = affinity.address_port(address(V4, 200), 8080)
    kernel.apply([Change(there, None, value)])
    assert kernel.affinity(V4) == {there: value}
    assert kernel.read() == LAYOUT
    kernel.apply([Change(there, value, None), Change(gone, value, None), Change(service(1), None, ("drop", ""))])
    assert kernel.affinity(V4) == {}
    assert kernel.read() == {**LAYOUT, service(1): ("drop", "")}


def test_there_is_no_affinity_without_a_table(kernel: NftablesKernel):
    assert kernel.affinity(V4) == {}
    assert list(kernel.counters(SERVICES)) == []


def test_the_table_of_kube_proxy_goes_in_the_transaction_that_brings_ours(kernel: NftablesKernel, netns: Namespace):
    netns.command("nft", "add table ip kube-proxy; add chain ip kube-proxy c; add rule ip kube-proxy c accept")
    found = kernel.read()
    assert found == {KubeProxyTableKey(V4): Table()}
    with pytest.raises(ApplyError):
        kernel.apply([*diff(LAYOUT, found), Change(service(1), None, ("goto nowhere", ""))])
    assert netns.command("nft", "list", "tables").stdout == "table ip kube-proxy\n"
    kernel.apply(diff(LAYOUT, found))
    assert netns.command("nft", "list", "tables").stdout == "table ip kproxy\n"
    kernel.apply(diff({}, kernel.tables()))
    assert netns.command("nft", "list", "tables").stdout == ""


def test_without_the_privilege_the_reason_is_named(netns: Namespace, open_kernel: OpenKernel):
    """A process that loses CAP_NET_ADMIN: what it holds open is checked with what it may now."""
    script = (
        "from kproxy.dataplane.nftables.kernel import NftablesKernel\n"
        "from kproxy.model import Family\n"
        "try: NftablesKernel([Family.IPv4]).probe()\n"
        "except PermissionError as error: print(error.strerror)\n"
    )
    command = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    done = netns.command(*command, sys.executable, "-c", script)
    assert done.stdout == "nftables mode is not permitted\n"


def test_a_table_that_another_process_owns_is_left_alone(netns: Namespace, kernel: NftablesKernel):
    kernel.apply(diff(LAYOUT, {}))
    with netns.run(NftablesKernel, (V4,)) as other:
        other.probe()  # is not in its way
        with pytest.raises(ApplyError, match="belongs to another running process") as refused:
            other.apply([Change(service(1), None, ("drop", ""))])
        assert refused.value.transient
        with pytest.raises(ApplyError, match="belongs to another running process"):
            other.apply(diff({}, other.tables()))
    assert kernel.read() == LAYOUT


def test_a_table_of_ours_can_be_replaced(ready: NftablesKernel):
    with pytest.raises(ApplyError) as refused:
        ready.apply([Change(TableKey(V4), None, Table())])
    assert refused.value.culprits == (TableKey(V4),)
    ready.apply(
        [Change(TableKey(V4), Table("worn out"), Table()), *(c for c in diff(LAYOUT, {}) if c.key != TableKey(V4))]
    )
    assert ready.read() == LAYOUT
