"""`kproxy --dry-run`: prints what a sync would change, grouped by Service, and changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.reconcile.objects import Object, endpoints, port, service, web
from tests.reconcile.one_node import OneNode

SHOP_IP = "10.96.0.20"
RULES = re.compile(r"( chain [-\w]+).*")  # what a chain consists of is the layout's affair
COLORED = re.compile(r"\033\[[0-9;]*m")


def shop(*addresses: str, node_port: int = 30080) -> list[Object]:
    ports = [port(80, node_port=node_port)]
    return [service("shop", SHOP_IP, type="NodePort", ports=ports), endpoints("shop", *addresses)]


CLUSTER = [*web(), *shop("10.0.0.3")]


def changes(text: str) -> dict[str, list[str]]:
    """The lines of a dry run's text under their headings; chains without their rules."""
    found: dict[str, list[str]] = {}
    for paragraph in text.split("\n\n")[1:]:
        heading, *lines = paragraph.strip("\n").split("\n")
        found[heading] = [RULES.sub(r"\1", line.strip()) for line in lines]
    return found


@pytest.fixture
def programmed(here: OneNode) -> Path:
    """The manifests whose Services the kernel holds; nobody owns the tables now."""
    path = here.manifests(*CLUSTER)
    done = here.kproxy("--once", f"--manifests={path}")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return path


def test_on_an_empty_kernel_everything_is_to_be_added_and_nothing_is(here: OneNode):
    before = here.generation()
    done = here.kproxy("--dry-run", f"--manifests={here.manifests(*CLUSTER)}")

    assert (done.returncode, done.stderr) == (1, "")
    assert re.match(r"nftables mode, node here: \d+ to add, 0 to remove, 0 to change \(2 Services\)\n", done.stdout)
    shown = changes(done.stdout)
    assert list(shown) == ["Service default/shop", "Service default/web", "For all Services"]
    assert "+ table ip kproxy" in shown["For all Services"]
    assert shown["Service default/web"] == [
        "+ ip map endpoints: 10.96.0.10 . tcp . 80 . slot 0 → 10.0.0.1:8080",
        "+ ip map endpoints: 10.96.0.10 . tcp . 80 . slot 1 → 10.0.0.2:8080",
        "+ ip map services: 10.96.0.10 . tcp . 80 → goto pick-2 (default/web)",
        "+ ip set cluster-ips: 10.96.0.10",
    ]
    assert (here.ruleset, here.generation()) == ("", before)


def test_json_says_the_same_as_the_text(here: OneNode):
    path = here.manifests(*CLUSTER)
    text = here.kproxy("--dry-run", f"--manifests={path}").stdout
    done = here.kproxy("--dry-run", f"--manifests={path}", "-o", "json")

    assert (done.returncode, done.stderr) == (1, "")
    said: dict[str, Any] = json.loads(done.stdout)
    assert (said["mode"], said["node"]) == ("nftables", "here")
    shown = changes(text)
    assert [RULES.sub(r"\1", f"+ {change['new']}") for change in said["shared"]] == shown.pop("For all Services")
    for entry in said["services"]:
        lines = [RULES.sub(r"\1", f"+ {change['new']}") for change in entry["changes"]]
        assert lines == shown.pop(f"Service {entry['namespace']}/{entry['name']}")
    assert shown == {}
    assert said["counts"] == {"add": text.count("\n  + "), "remove": 0, "change": 0}


def test_when_the_kernel_holds_everything_there_is_nothing_to_change(here: OneNode, programmed: Path):
    before = here.ruleset, here.generation()
    done = here.kproxy("--dry-run", f"--manifests={programmed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "nftables mode, node here: nothing to change, the kernel holds what it should\n"
    said = json.loads(here.kproxy("--dry-run", f"--manifests={programmed}", "--output=json").stdout)
    assert (said["services"], said["shared"]) == ([], [])
    assert (here.ruleset, here.generation()) == before


EDITS: dict[str, tuple[list[Object], dict[str, list[str]]]] = {
    "one endpoint is another": (
        [*web("10.0.0.1", "10.0.0.9"), *shop("10.0.0.3")],
        {
            "Service default/web": [
                "~ ip map endpoints: 10.96.0.10 . tcp . 80 . slot 1 → 10.0.0.9:8080",
                "instead of ip map endpoints: 10.96.0.10 . tcp . 80 . slot 1 → 10.0.0.2:8080",
            ]
        },
    ),
    "a node port is another": (
        [*web(), *shop("10.0.0.3", node_port=30081)],
        {
            "Service default/shop": [
                "+ ip map nodeport-policies: tcp . 30081 → jump masq (default/shop)",
                "+ ip map nodeport-endpoints: tcp . 30081 . slot 0 → 10.0.0.3:8080",
                "+ ip map nodeports: tcp . 30081 → goto nodeport-pick-1 (default/shop)",
                "- ip map nodeport-policies: tcp . 30080 → jump masq (default/shop)",
                "- ip map nodeports: tcp . 30080 → goto nodeport-pick-1 (default/shop)",
                "- ip map nodeport-endpoints: tcp . 30080 . slot 0 → 10.0.0.3:8080",
            ]
        },
    ),
    "a Service lost its endpoints": (
        [*web(), *shop()],
        {
            "Service default/shop": [
                "+ ip map no-endpoints: 10.96.0.20 . tcp . 80 → goto reject-it (default/shop)",
                "+ ip map no-endpoint-nodeports: tcp . 30080 → goto reject-it (default/shop)",
                "- ip map services: 10.96.0.20 . tcp . 80 → goto pick-1 (default/shop)",
                "- ip map endpoints: 10.96.0.20 . tcp . 80 . slot 0 → 10.0.0.3:8080",
                "- ip map nodeport-policies: tcp . 30080 → jump masq (default/shop)",
                "- ip map nodeports: tcp . 30080 → goto nodeport-pick-1 (default/shop)",
                "- ip map nodeport-endpoints: tcp . 30080 . slot 0 → 10.0.0.3:8080",
            ],
            "For all Services": [
                "- ip chain nodeport-pick-1",
            ],
        },
    ),
    "a Service is gone": (
        shop("10.0.0.3"),
        {
            "Service default/web": [
                "- ip set cluster-ips: 10.96.0.10",
                "- ip map services: 10.96.0.10 . tcp . 80 → goto pick-2 (default/web)",
                "- ip map endpoints: 10.96.0.10 . tcp . 80 . slot 0 → 10.0.0.1:8080",
                "- ip map endpoints: 10.96.0.10 . tcp . 80 . slot 1 → 10.0.0.2:8080",
            ],
        },
    ),
}


@pytest.mark.parametrize(("objects", "expected"), EDITS.values(), ids=EDITS)
def test_an_edited_manifest_shows_exactly_what_it_changes(
    here: OneNode, programmed: Path, objects: list[Object], expected: dict[str, list[str]]
):
    here.manifests(*objects)
    done = here.kproxy("--dry-run", f"--manifests={programmed}")
    assert done.returncode == 1
    shown = changes(done.stdout)
    assert list(shown) == list(expected)
    assert {heading: sorted(lines) for heading, lines in shown.items()} == {
        heading: sorted(lines) for heading, lines in expected.items()
    }


BY_HAND = [
    (
        "delete element ip kproxy services { 10.96.0.10 . tcp . 80 }",
        {"Service default/web": ["+ ip map services: 10.96.0.10 . tcp . 80 → goto pick-2 (default/web)"]},
    ),
    (
        'add element ip kproxy no-endpoints { 192.0.2.1 . udp . 53 comment "mine" : drop }',
        {"For all Services": ["- ip map no-endpoints: 192.0.2.1 . udp . 53 → drop (mine)"]},
    ),
    (
        "add element ip kproxy cluster-ips { 192.0.2.1 }",
        {"For all Services": ["- ip set cluster-ips: 192.0.2.1"]},
    ),
]


@pytest.mark.parametrize(("command", "expected"), BY_HAND, ids=[command for command, _ in BY_HAND])
def test_what_somebody_else_changed_is_shown(
    here: OneNode, programmed: Path, command: str, expected: dict[str, list[str]]
):
    here.nft(command)
    done = here.kproxy("--dry-run", f"--manifests={programmed}")
    assert done.returncode == 1
    assert changes(done.stdout) == expected


def test_beside_a_running_proxy_it_only_reads(here: OneNode):
    path = here.manifests(*CLUSTER)
    proxy = here.started(source=[f"--manifests={path}"])
    before = here.ruleset, here.generation()

    done = here.kproxy("--dry-run", f"--manifests={path}")
    other = here.manifests(*web("10.0.0.7"), name="other.yaml")
    differing = here.kproxy("--dry-run", f"--manifests={other}")

    assert (done.returncode, differing.returncode) == (0, 1), done.stdout
    assert (here.ruleset, here.generation()) == before
    assert proxy.running


@pytest.mark.parametrize(
    ("flags", "colored"), [(["--color=always"], True), (["--color=never"], False), ([], False)], ids=str
)
def test_colors_in_a_pipe(here: OneNode, flags: list[str], colored: bool):
    done = here.kproxy("--dry-run", *flags, f"--manifests={here.manifests(*web())}")
    assert bool(COLORED.search(done.stdout)) is colored


def test_colors_on_a_terminal(here: OneNode):
    path = here.manifests(*web())
    on_terminal = here.kproxy_on_a_terminal("--dry-run", f"--manifests={path}")
    assert "\033[32m  + table ip kproxy\033[0m" in on_terminal
    plain = here.kproxy_on_a_terminal("--dry-run", "--color=never", f"--manifests={path}")
    assert "+ table ip kproxy" in plain
    assert not COLORED.search(plain)
