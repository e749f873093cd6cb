"""What a release rests on: one version, a workflow that calls what exists, documents that lead to each other."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from kproxy import __version__
from kproxy.cli.flags import FLAGS
from kproxy.config.v1alpha1 import ProxyMode
from kproxy.config.validation import KUBERNETES_VERSION

ROOT = Path(__file__).parents[1]
PARTS = ("docs", "deploy", "kind", "kproxy", "tests", ".github")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(found for part in PARTS for found in (ROOT / part).rglob("*.md"))])
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
JOBS = WORKFLOW["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text()

FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PROGRAM = re.compile(r"(?<![\w./-])((?:kind|tests|\.ci)/[\w/-]+)")


def test_the_package_takes_the_version_from_kproxy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "kproxy/__init__.py"


def test_the_command_says_the_version():
    said = subprocess.run(
        [sys.executable, "-m", "kproxy", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert said.stdout.splitlines()[0] == f"kproxy {__version__}"


def test_the_image_is_labelled_with_the_version():
    build = subprocess.run(
        ["make", "--dry-run", "image", "ENGINE=docker"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert f"--build-arg VERSION={__version__} " in build.stdout
    assert 'org.opencontainers.image.version="${VERSION}"' in (ROOT / "Dockerfile").read_text()


def test_manifests_leave_the_version_to_a_kustomization():
    images = {
        image
        for file in (ROOT / "deploy").rglob("*.yaml")
        for image in re.findall(r"^ *-? *image: (\S+)", file.read_text(), re.MULTILINE)
    }

    assert images == {"kproxy:dev"}


def test_the_change_log_begins_with_this_version():
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert re.fullmatch(rf"\[{re.escape(__version__)}\] – (unreleased|\d{{4}}-\d\d-\d\d)", sections[0])


def test_every_mode_is_tried_in_a_cluster_and_taken_over():
    modes = {mode.value for mode in ProxyMode}

    assert set(JOBS["e2e"]["strategy"]["matrix"]["mode"]) == modes
    assert {pair["from"] for pair in JOBS["takeover"]["strategy"]["matrix"]["include"]} == modes


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_bounded_and_calls_what_exists(name: str):
    job = JOBS[name]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    needed = job.get("needs", [])

    assert job["timeout-minutes"] <= 60
    assert JOBS.keys() >= set([needed] if isinstance(needed, str) else needed)
    for step in job["steps"]:
        assert re.search(r"@v\d+$", step.get("uses", "@v0")), f"{step['uses']} is not pinned"
    for command in commands:
        for target in re.findall(r"\bmake ([a-z]+)", command):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}"
        for program in PROGRAM.findall(command):
            assert (ROOT / program).exists(), program


def test_only_the_job_that_publishes_may_write_and_only_for_a_tag():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    writing = {name for name, job in JOBS.items() if "write" in job.get("permissions", {}).values()}

    assert writing == {"publish"}
    assert JOBS["publish"]["if"] == "github.ref_type == 'tag'"
    assert set(JOBS["publish"]["needs"]) >= {"test", "e2e", "takeover"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(document: Path):
    for target, section in LINK.findall(FENCED.sub("", document.read_text())):
        if "://" in target:
            continue
        found = document.parent / target if target else document
        assert found.exists(), f"{target} is not there"
        assert found.resolve().is_relative_to(ROOT), f"{target} is outside of the repository"
        assert not section or section in anchors(found), f"{target} has no heading {section}"


def test_the_pod_that_is_shown_for_one_run_is_valid_and_uses_flags_that_exist():
    shown = (ROOT / "docs/replace-kube-proxy.md").read_text()
    manifest = re.search(r"```yaml once.yaml\n(.*?)```", shown, re.DOTALL)
    assert manifest
    pod = yaml.safe_load(manifest[1].replace("NODE", "worker-1"))
    arguments = [*pod["spec"]["containers"][0]["args"], *re.findall(r"(?:-- |`)kproxy (--[\w-]+)", shown)]

    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
    assert {argument.partition("=")[0].removeprefix("--") for argument in arguments} <= {flag.name for flag in FLAGS}


def anchors(document: Path) -> Iterator[str]:
    """As GitHub makes them of headings."""
    for heading in HEADING.findall(FENCED.sub("", document.read_text())):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
