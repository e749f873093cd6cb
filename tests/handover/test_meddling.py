"""Others change the rules under a running kproxy in iptables mode: it notices, repairs, and says so.

What is lost of others' own in that is theirs to bring back; what they still have is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kproxy.config.v1alpha1 import ProxyMode
from kproxy.dataplane.iptables.commands import Variant
from kproxy.model import Family
from tests.handover.stage import WEB, Stage
from tests.lab.cluster_objects import service
from tests.lab.proxy_process import ProxyProcess
from tests.lab.traffic import settle, who_answers
from tests.lab.waiting import eventually

SYNC_PERIOD = 2.0
# nf_tables tells of changes; legacy tables are asked for their sizes once a second, and for their rules once a period.
# Beside that there is the work itself, on a machine that has other work.
AT_ONCE = {Variant.NFT: 3.0, Variant.LEGACY: 4.0}
IN_A_PERIOD = {Variant.NFT: 3.0, Variant.LEGACY: 4.0 + SYNC_PERIOD}

_CHAIN_OR_RULE = re.compile(r"-A |:.* -$|\t+\w")

TABLES = ("filter", "nat", "mangle")

Meddle = Callable[[Stage], object]


class Running(NamedTuple):
    """A stage with a kproxy that runs, and the rules that it has written."""

    stage: Stage
    proxy: ProxyProcess
    wanted: list[str]

    def drift(self) -> float:
        return sum(v for name, v in self.proxy.scrape().items() if name.startswith("kproxy_drift_detected_total"))

    def log(self) -> str:
        return self.proxy.log.read_text()


@pytest.fixture(scope="module")
def running(open_stage: Stage) -> Iterator[Running]:
    stage = open_stage
    proxy = stage.started(
        ProxyMode.IPTABLES, f"--iptables-sync-period={SYNC_PERIOD:.0f}s", "--iptables-min-sync-period=10ms"
    )
    yield Running(stage, proxy, ours(stage))
    stage.end_proxies()
    stage.clean_up()


def ours(stage: Stage) -> list[str]:
    """The lines about our chains, in no order: a block or a jump that is put back comes first."""
    return sorted(line for line in stage.saved().splitlines() if _is_ours(line))


def others(stage: Stage) -> list[str]:
    """Chains and rules that are not ours, in their order."""
    return [line for line in stage.rules().splitlines() if _CHAIN_OR_RULE.match(line) and not _is_ours(line)]


def _is_ours(line: str) -> bool:
    return bool(re.search(r"KUBE-(?!KUBELET|IPTABLES-HINT)", line))


def other_tools_restore(stage: Stage) -> None:
    """The nat table is replaced with one that knows nothing of Services."""
    nat = re.search(r"^\*nat\n.*?^COMMIT\n", stage.others, re.DOTALL | re.MULTILINE)
    assert nat
    stage.restore(nat[0])


def edit_an_endpoint(stage: Stage) -> None:
    """Connections go astray; the table keeps its size."""
    chain = stage.endpoint_chain(stage.pods[0])
    command = f"-R {chain} 2 -p tcp -m comment --comment default/web -m tcp -j DNAT --to-destination 192.0.2.9:80"
    stage.iptables("-t", "nat", *command.split())


def delete_a_chain(stage: Stage) -> None:
    """In one transaction: between two, kproxy would mend the first, and a chain that is referred to stays."""
    jump = '-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD'
    stage.restore(f"*filter\n-D FORWARD {jump}\n-F KUBE-FORWARD\n-X KUBE-FORWARD\nCOMMIT\n", "--noflush")


def flush_nat(stage: Stage) -> None:
    for family in Family:
        stage.iptables("-t", "nat", "-F", family=family)


def delete_everything(stage: Stage) -> None:
    text = "".join(f"*{table}\n-F\n-X\nCOMMIT\n" for table in TABLES)
    for family in Family:
        stage.restore(text, "--noflush", family=family)


KEEPS: dict[str, Meddle] = {
    "a jump is removed": lambda stage: stage.iptables("-t", "nat", "-D", "PREROUTING", "1"),
    "another tool restores the whole table": other_tools_restore,
    "a chain is deleted": delete_a_chain,
    "a rule is put in front": lambda stage: stage.iptables("-t", "nat", "-I", "KUBE-SERVICES", "-j", "RETURN"),
    "a chain of IPv6 is flushed": lambda stage: stage.iptables("-F", "KUBE-FORWARD", family=Family.IPv6),
}
LOSES: dict[str, tuple[Meddle, tuple[str, ...]]] = {
    "a table is flushed": (flush_nat, ("nat",)),
    "all rules and chains are deleted": (delete_everything, TABLES),
}


def is_repaired(running: Running, meddle: Meddle, seconds: float) -> None:
    stage, drift, said = running.stage, running.drift(), len(running.log())

    meddle(stage)
    theirs = others(stage)
    eventually(lambda: ours(stage) == running.wanted, "it is repaired", seconds=seconds)

    assert others(stage) == theirs
    settle(stage.visitor, f"http://{WEB[Family.IPv4]}/", {pod.name for pod in stage.pods})
    eventually(lambda: running.drift() > drift, "it is counted")
    log = running.log()[said:]
    assert "repaired what someone else had changed in the kernel" in log
    who = r"ip6?tables\S* \(process \d+\)" if stage.variant is Variant.NFT else "somebody"
    assert re.search(rf'changed by someone else; comparing", "by": "{who}', log)


@pytest.mark.parametrize("meddle", KEEPS.values(), ids=KEEPS)
def test_harm_is_repaired_beside_what_others_have(running: Running, meddle: Meddle):
    is_repaired(running, meddle, AT_ONCE[running.stage.variant])
    assert running.stage.others_are_untouched()


def test_an_edited_rule_is_found_within_a_period(running: Running):
    is_repaired(running, edit_an_endpoint, IN_A_PERIOD[running.stage.variant])


@pytest.mark.parametrize(("meddle", "lost"), LOSES.values(), ids=LOSES)
def test_after_a_clean_sweep_ours_is_back_and_no_more(running: Running, meddle: Meddle, lost: tuple[str, ...]):
    try:
        is_repaired(running, meddle, AT_ONCE[running.stage.variant])
    finally:
        running.stage.restore_others(*lost)


def test_a_program_that_is_missing_for_a_while_ends_no_watch(tmp_path: Path):
    programs = tmp_path / "bin"
    with Stage(Variant.LEGACY, tmp_path / "stage") as stage:
        programs.mkdir()
        for directory in os.get_exec_path():
            for found in Path(directory).glob("ip*tables*"):
                if not (programs / found.name).exists():
                    (programs / found.name).symlink_to(found)
        proxy = stage.proxy(ProxyMode.IPTABLES, "--iptables-min-sync-period=10ms")
        proxy.start(PATH=str(programs))
        proxy.wait_until_synced()
        wanted = ours(stage)
        save = programs / "iptables-legacy-save"
        target = save.readlink()
        save.unlink()
        stage.iptables("-t", "nat", "-D", "PREROUTING", "1")
        eventually(lambda: "cannot see whether others change our rules" in proxy.log.read_text(), "it says so")
        save.symlink_to(target)
        eventually(lambda: ours(stage) == wanted, "it is repaired")


def test_a_refused_change_is_shown_by_line_and_leaves_out_its_service_only(running: Running):
    stage, said = running.stage, len(running.log())
    (web,) = (item for item in stage.cluster.api.objects("Service") if item["metadata"]["name"] == "web")
    chain = next(c for c in stage.chains_of_proxies() if c.startswith("KUBE-SVC-"))
    stage.iptables("-t", "nat", "-A", "CNI-HOSTPORT-DNAT", "-j", chain)  # so the kernel will not let go of it
    try:
        stage.cluster.delete_service("web")
        stage.cluster.apply(service("new", "10.96.0.12", app="web"))
        stage.write_manifests()
        settle(stage.visitor, "http://10.96.0.12/", {pod.name for pod in stage.pods})

        eventually(lambda: running.proxy.metric("kproxy_quarantined_services") == 1, "web is in quarantine")
        [complaint] = [line for line in running.log()[said:].splitlines() if '"level": "error"' in line]
        assert '"service": "default/web"' in complaint
        assert f"-X {chain}" in complaint
        if stage.variant is Variant.NFT:  # libiptc makes one change after the other, and has no lines
            assert re.search(rf"\\n  \d+: -X KUBE-EXT-\w+\\n> \d+: -X {chain}\\n  \d+: -X KUBE-SEP-", complaint)
        assert who_answers(stage.visitor, f"http://{WEB[Family.IPv4]}/", 3)  # nothing of it has gone
    finally:
        stage.iptables("-t", "nat", "-D", "CNI-HOSTPORT-DNAT", "-j", chain)
        stage.cluster.delete_service("new")
        stage.cluster.apply(web)
        stage.write_manifests()
    eventually(lambda: ours(stage) == running.wanted, "all is as before")
    assert running.proxy.metric("kproxy_quarantined_services") == 0
