"""Manifests that change while they are followed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from structlog.typing import EventDict

from kproxy.api.errors import ManifestError
from kproxy.api.events import Changed, Deleted, Listed
from kproxy.api.manifests import ManifestSource
from tests.api.conftest import endpoint_slice, service
from tests.api.recorder import Recorder
from tests.lab.waiting import eventually

FollowFiles = Callable[[Path], Recorder]


@pytest.fixture
def follow_files() -> Iterator[FollowFiles]:
    """Follows a path; returns when everything that is there was delivered and the source waits for changes."""
    sources: list[ManifestSource] = []

    def start(path: Path) -> Recorder:
        recorder = Recorder()
        sources.append(ManifestSource(path))
        sources[-1].start(recorder)
        recorder.until(lambda: recorder.complete)
        return recorder

    yield start
    for source in sources:
        source.stop()


def put(path: Path, *objects: dict) -> Path:
    """Write over a file in place."""
    path.write_bytes(b"\n".join(map(msgspec.json.encode, objects)))
    return path


def renamed_over(path: Path, *objects: dict) -> None:
    """Replace a file as editors do."""
    put(path.with_name(f".{path.name}.swp"), *objects).replace(path)


def config_map(volume: Path, generation: int, **files: list[dict]) -> None:
    """Write a volume as the kubelet does: files are links into `..data`, which is swapped by a rename."""
    content = volume / f"..2026_{generation}"
    content.mkdir()
    for name, objects in files.items():
        put(content / f"{name}.json", *objects)
        if not (volume / f"{name}.json").is_symlink():
            (volume / f"{name}.json").symlink_to(f"..data/{name}.json")
    (volume / "..data_tmp").symlink_to(content.name)
    (volume / "..data_tmp").replace(volume / "..data")
    for old in volume.glob("*.json"):
        if not old.exists():
            old.unlink()


def test_what_is_there_at_the_start_comes_in_the_order_that_leaves_no_service_without_endpoints(
    tmp_path: Path, follow_files: FollowFiles
):
    node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-1"}}
    put(tmp_path / "all.json", service(), endpoint_slice(), node)

    seen = follow_files(tmp_path / "all.json")

    told = [(type(event), event.kind) for event in seen.events if isinstance(event, Changed | Listed)]
    assert told == [
        (Changed, "Node"),
        (Changed, "EndpointSlice"),
        (Changed, "Service"),
        (Listed, "Node"),
        (Listed, "ServiceCIDR"),
        (Listed, "EndpointSlice"),
        (Listed, "Service"),
    ]


@pytest.mark.parametrize("write", [put, renamed_over], ids=["in place", "by renaming"])
def test_a_change_of_one_object_is_told_and_nothing_else(
    tmp_path: Path, follow_files: FollowFiles, write: Callable[..., object]
):
    path = put(tmp_path / "services.json", service("one"), service("two"), service("three"))
    seen = follow_files(path)
    before = len(seen.events)

    write(path, service("one"), service("two", clusterIP="10.96.0.99"))
    seen.until(lambda: seen.names() == {"default/one", "default/two"})

    told = [event for event in seen.events[before:] if isinstance(event, Changed | Deleted)]
    assert [(type(event), event.object.metadata.name) for event in told] == [(Changed, "two"), (Deleted, "three")]
    assert seen.objects["Service"]["default/two"].spec.cluster_ip == "10.96.0.99"


def test_what_is_removed_goes_in_the_order_that_leaves_no_service_without_endpoints(
    tmp_path: Path, follow_files: FollowFiles
):
    path = put(tmp_path / "all.json", service(), endpoint_slice())
    seen = follow_files(tmp_path)

    path.unlink()
    seen.until(lambda: not seen.names("EndpointSlice"))

    assert [event.kind for event in seen.events if isinstance(event, Deleted)] == ["Service", "EndpointSlice"]


def test_files_that_come_and_go_in_a_directory(tmp_path: Path, follow_files: FollowFiles):
    seen = follow_files(tmp_path)
    assert seen.names() == set()

    put(tmp_path / "a.json", service("a"))
    seen.until(lambda: seen.names() == {"default/a"})
    put(tmp_path / "b.json", service("b"))
    seen.until(lambda: seen.names() == {"default/a", "default/b"})
    (tmp_path / "a.json").unlink()
    seen.until(lambda: seen.names() == {"default/b"})
    (tmp_path / "b.json").rename(tmp_path / "b.json.off")
    seen.until(lambda: seen.names() == set())


def test_a_named_file_that_is_deleted_stays_in_force_until_it_comes_back(
    tmp_path: Path, follow_files: FollowFiles, logs: list[EventDict]
):
    path = put(tmp_path / "services.json", service())
    seen = follow_files(path)

    path.unlink()
    seen.until(lambda: any("No such file" in str(entry) for entry in logs))
    assert seen.names() == {"default/web"}
    put(path, service("back"))
    seen.until(lambda: seen.names() == {"default/back"})


def test_a_directory_that_is_moved_away_and_replaced(tmp_path: Path, follow_files: FollowFiles):
    folder = tmp_path / "manifests"
    folder.mkdir()
    put(folder / "a.json", service("old"))
    seen = follow_files(folder)

    folder.rename(tmp_path / "manifests.old")
    folder.mkdir()
    put(folder / "a.json", service("new"))
    seen.until(lambda: seen.names() == {"default/new"})
    put(folder / "a.json", service("newer"))
    seen.until(lambda: seen.names() == {"default/newer"})


def test_a_file_whose_directory_is_moved_away(tmp_path: Path, follow_files: FollowFiles):
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    path = put(folder / "a.json", service("old"))
    seen = follow_files(path)

    folder.rename(tmp_path / "away")
    folder.mkdir()
    put(path, service("new"))
    seen.until(lambda: seen.names() == {"default/new"})


@pytest.mark.parametrize("single_file", [False, True], ids=["the volume", "a file in it"])
def test_a_config_map_volume_that_is_updated(tmp_path: Path, follow_files: FollowFiles, single_file: bool):
    config_map(tmp_path, 1, services=[service("one")])
    seen = follow_files(tmp_path / "services.json" if single_file else tmp_path)
    assert seen.names() == {"default/one"}

    for generation in (2, 3):
        config_map(tmp_path, generation, services=[service(f"of-{generation}")])
        seen.until(lambda wanted=f"default/of-{generation}": seen.names() == {wanted})


def test_a_link_to_a_file_elsewhere(tmp_path: Path, follow_files: FollowFiles):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "manifests"
    elsewhere.mkdir()
    folder.mkdir()
    target = put(elsewhere / "services", service("one"))
    (folder / "services.json").symlink_to("../elsewhere/services")
    seen = follow_files(folder)

    put(target, service("two"))
    seen.until(lambda: seen.names() == {"default/two"})
    renamed_over(target, service("three"))
    seen.until(lambda: seen.names() == {"default/three"})


def test_a_broken_file_keeps_its_objects_until_it_is_mended_and_others_go_on(
    tmp_path: Path, follow_files: FollowFiles, logs: list[EventDict]
):
    broken = put(tmp_path / "a.json", service("a"))
    put(tmp_path / "b.json", service("b"))
    seen = follow_files(tmp_path)

    put(broken, service("a", ports=[{"port": 0}]), service("more"))
    put(tmp_path / "b.json", service("b"), service("c"))
    seen.until(lambda: "default/c" in seen.names())
    assert seen.names() == {"default/a", "default/b", "default/c"}
    assert seen.objects["Service"]["default/a"].spec.ports[0].port == 80
    put(tmp_path / "b.json", service("b"))
    seen.until(lambda: "default/c" not in seen.names())
    errors = [entry["error"] for entry in logs if entry["log_level"] == "error"]
    assert errors == [f"{broken}: document 1 (Service default/a): spec.ports[0].port: Expected int >= 1"]

    put(broken, service("a", ports=[{"port": 8080}]), service("more"))
    seen.until(lambda: "default/more" in seen.names())
    assert seen.objects["Service"]["default/a"].spec.ports[0].port == 8080
    seen.until(lambda: any(entry["event"] == "the manifests are in order again" for entry in logs))


def test_after_a_file_whose_values_are_not_what_their_tags_say_the_next_change_is_taken(
    tmp_path: Path, follow_files: FollowFiles, logs: list[EventDict]
):
    path = put(tmp_path / "a.yaml", service("a"))
    seen = follow_files(path)
    path.write_text("a: !!int foo")
    seen.until(lambda: any(line["log_level"] == "error" for line in logs))
    assert seen.names() == {"default/a"}

    put(path, service("b"))
    seen.until(lambda: seen.names() == {"default/b"})


@pytest.mark.parametrize(("from_file", "to_file"), [("a", "b"), ("b", "a")])
def test_an_object_that_moves_to_another_file_is_never_missing(
    tmp_path: Path, follow_files: FollowFiles, logs: list[EventDict], from_file: str, to_file: str
):
    old = put(tmp_path / f"{from_file}.json", service("web"), service("stays"))
    new = put(tmp_path / f"{to_file}.json", service("other"))
    seen = follow_files(tmp_path)
    before = len(seen.events)

    put(new, service("other"), service("web", clusterIP="10.96.0.99"))
    seen.until(lambda: [entry for entry in logs if entry["log_level"] == "error"])
    errors = {entry["error"] for entry in logs if entry["log_level"] == "error"}
    assert errors == {f"{new}: document 2 (Service default/web): already in {old}"}
    assert seen.objects["Service"]["default/web"].spec.cluster_ip == "10.96.0.10"

    put(old, service("stays"))
    seen.until(lambda: seen.objects["Service"]["default/web"].spec.cluster_ip == "10.96.0.99")
    assert not [event for event in seen.events[before:] if isinstance(event, Deleted)]


def test_a_half_written_file_changes_nothing_until_it_is_whole(
    tmp_path: Path, follow_files: FollowFiles, logs: list[EventDict]
):
    path = put(tmp_path / "a.json", service("a"))
    seen = follow_files(tmp_path)
    text = msgspec.json.encode(service("b"))

    with path.open("wb", buffering=0) as file:
        file.write(text[:40])
        put(tmp_path / "c.json", service("c"))  # makes the source look
        seen.until(lambda: "default/c" in seen.names())
        assert "default/a" in seen.names()
        file.write(text[40:])

    seen.until(lambda: seen.names() == {"default/b", "default/c"})


def test_a_service_that_goes_to_another_proxy_is_gone(tmp_path: Path, follow_files: FollowFiles):
    path = put(tmp_path / "a.json", service())
    seen = follow_files(path)
    foreign = service()
    foreign["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}

    put(path, foreign)

    seen.until(lambda: seen.names() == set())


def test_a_broken_file_at_the_start_is_an_error_for_the_caller(tmp_path: Path):
    path = put(tmp_path / "a.json", {"kind": "Service"})
    source = ManifestSource(path)
    threads = threading.active_count()

    with pytest.raises(ManifestError, match="document 1: apiVersion: Required"):
        source.start(Recorder())

    assert threading.active_count() == threads
    source.stop()


def test_stop_does_not_wait_for_a_file_that_cannot_be_read_to_its_end(tmp_path: Path):
    """As on a file server that says nothing any more."""
    path = put(tmp_path / "a.json", service("a"))
    seen = Recorder()
    source = ManifestSource(path)
    source.start(seen)
    seen.until(lambda: seen.complete)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").rename(path)
    writer = opened_for_writing(path)

    begin = time.monotonic()
    source.stop()
    assert time.monotonic() - begin < 8

    before = len(seen.events)
    os.write(writer, msgspec.json.encode(service("b")))
    os.close(writer)
    [thread.join(30) for thread in threading.enumerate() if thread.name == "manifests"]
    assert len(seen.events) == before


def opened_for_writing(fifo: Path) -> int:
    """Wait until somebody reads."""

    def opened() -> int:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)

    return eventually(opened, "somebody reads")


def test_stop_is_prompt_and_nothing_comes_after_it(tmp_path: Path):
    path = put(tmp_path / "a.json", service("a"))
    source, seen = ManifestSource(path), Recorder()
    source.start(seen)
    seen.until(lambda: seen.complete)

    began = time.monotonic()
    source.stop()
    took = time.monotonic() - began
    known = len(seen.events)
    put(path, service("b"))

    assert took < 0.9
    assert len(seen.events) == known
