"""Services, EndpointSlices, Nodes and ServiceCIDRs from files: the source that needs no API server.

A path is a file, or a directory whose `*.yaml`, `*.yml` and `*.json` files are read; like kubectl, without its
subdirectories, and without hidden files, which are editors' drafts. While they are followed, a broken file leaves in
force what it said last, until it is mended.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import msgspec
import structlog

from kproxy.api.documents import Content, ObjectKey, read
from kproxy.api.errors import ManifestError
from kproxy.api.events import Alive, Changed, Deleted, Event, Listed, Sink
from kproxy.api.inotify import LONGEST_SETTLE_SECONDS, Inotify, Names, way_to
from kproxy.api.objects import Kind, Object
from kproxy.api.resources import concerns_us

STOP_SECONDS = 1.0
SUFFIXES = (".yaml", ".yml", ".json")
# A Service comes after its endpoints, so that it is never seen without them.
_ORDER: tuple[Kind, ...] = ("Node", "ServiceCIDR", "EndpointSlice", "Service")
_log = structlog.get_logger(__name__)

Objects = dict[ObjectKey, Object]


class _File(msgspec.Struct):
    """A manifest file: what it says now, and what of it is in force."""

    path: Path
    digest: bytes = b""
    content: Content | None = None  # None: it cannot be read
    error: str = ""
    in_force: Objects = {}


class ManifestFiles:
    """The objects in a file or directory, as of the last `refresh`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.objects: Objects = {}
        self._files: dict[Path, _File] = {}
        self._told: set[str] = set()

    def refresh(self) -> list[str]:
        """Read what has changed. Returns every error there is; files that have one keep what they said last."""
        try:
            paths = self._paths()
        except OSError as error:
            return [f"{self.path}: {error.strerror}"]
        for path in self._files.keys() - paths:
            _log.info("a manifest has gone, and with it what it said", path=str(path))
        self._files = {path: self._read(self._files.get(path) or _File(path)) for path in paths}
        errors: list[str] = []
        owners: dict[ObjectKey, Path] = {}
        # Files that stay as they are go first: in a conflict, the one that has changed is at fault.
        for file in sorted(self._files.values(), key=_changes):
            errors += self._enter(file, owners)
        self.objects = {
            key: item for file in self._files.values() for key, item in file.in_force.items() if concerns_us(item)
        }
        return errors

    def _paths(self) -> list[Path]:
        if not self.path.is_dir():
            self.path.stat()  # what was named and has gone is trouble, and no order to take everything back
            return [self.path]
        return sorted(
            path
            for path in self.path.iterdir()
            if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )

    def _read(self, file: _File) -> _File:
        try:
            text = file.path.read_bytes()
        except OSError as error:
            return _File(file.path, error=error.strerror or str(error), in_force=file.in_force)
        digest = hashlib.blake2b(text).digest()
        if digest == file.digest:
            return file
        content = read(text, is_json=file.path.suffix == ".json")
        self._tell(file.path, content)
        return _File(file.path, digest, content, in_force=file.in_force)

    def _enter(self, file: _File, owners: dict[ObjectKey, Path]) -> list[str]:
        """Put in force what a file says, if nothing is wrong with it. Returns what is."""
        if file.content is None:
            errors = [f"{file.path}: {file.error}"]
        else:
            errors = [f"{file.path}: {error}" for error in file.content.errors]
            errors += [
                f"{file.path}: {where} ({key}): already in {owners[key]}"
                for key, where in file.content.documents.items()
                if key in owners
            ]
        if file.content is not None and not errors:
            file.in_force = file.content.objects
        owners.update(dict.fromkeys(file.in_force, file.path))
        return errors

    def _tell(self, path: Path, content: Content) -> None:
        for note in content.notes:
            _log.warning("a manifest asks for what only an API server does", note=f"{path}: {note}")
        for kind in content.others.keys() - self._told:
            self._told.add(kind)
            _log.debug("objects of another kind are left alone", path=str(path), kind=kind, count=content.others[kind])


def _changes(file: _File) -> bool:
    """Whether a file says, without an error of its own, something else than what is in force of it."""
    return file.content is not None and not file.content.errors and file.in_force is not file.content.objects


class ManifestSource:
    """Delivers the objects of a file or directory, and follows their changes."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._files = ManifestFiles(self._path)
        self._inotify: Inotify | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # held while an event is delivered
        self._stopped = False

    def load(self) -> list[Object]:
        """The objects as the files are now. Raises ManifestError with everything that is wrong."""
        files = ManifestFiles(self._path)
        _read_whole(files)
        return list(files.objects.values())

    def start(self, sink: Sink) -> None:
        """Begin to deliver and to follow.

        Raises ManifestError with everything that is wrong, and OSError where the kernel grants no more watching.
        """
        inotify = Inotify()
        try:
            inotify.watch(_places(self._path))  # before reading, so that no change falls between
            _read_whole(self._files)
        except BaseException:
            inotify.close()
            raise

        def deliver(event: Event) -> None:
            with self._lock:
                if not self._stopped:
                    sink(event)

        self._inotify = inotify
        self._thread = threading.Thread(target=self._run, args=(inotify, deliver), name="manifests", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; no event comes after it returns. A thread that is reading is left behind after a second."""
        with self._lock:
            self._stopped = True
        if self._inotify is not None and self._thread is not None:
            self._inotify.wake()
            self._thread.join(STOP_SECONDS)
            if not self._thread.is_alive():
                self._inotify.close()
            self._inotify = None

    def _run(self, inotify: Inotify, sink: Sink) -> None:
        known: Objects = {}
        self._deliver(known, sink)
        for kind in _ORDER:
            keys = frozenset((key.namespace, key.name) for key in self._files.objects if key.kind == kind)
            sink(Listed(kind, keys))
        known = self._files.objects
        errors: set[str] = set()
        watching = True
        while not self._stopped:
            for kind in _ORDER:
                sink(Alive(kind))
            if not inotify.wait(None if watching else LONGEST_SETTLE_SECONDS) and watching:
                continue
            inotify.settle()
            watching = self._watch(inotify)
            errors = self._refresh(errors)
            self._deliver(known, sink)
            known = self._files.objects

    def _watch(self, inotify: Inotify) -> bool:
        try:
            inotify.watch(_places(self._path))
        except OSError as error:  # something vanished while we looked, or the kernel grants no more watches
            _log.warning("manifests cannot be followed; trying again", path=str(self._path), error=str(error))
            return False
        return True

    def _refresh(self, told: set[str]) -> set[str]:
        errors = self._files.refresh()
        for error in errors:
            if error not in told:
                _log.error("a manifest cannot be used; what it said before stays in force", error=error)
        if told and not errors:
            _log.info("the manifests are in order again", path=str(self._path))
        return set(errors)

    def _deliver(self, known: Objects, sink: Sink) -> None:
        """Tell the difference between what was known and what the files say."""
        now = self._files.objects
        for kind in _ORDER:
            for key, item in now.items():
                if key.kind == kind and known.get(key) != item:
                    sink(Changed(kind, item))
        for kind in reversed(_ORDER):
            for key, item in known.items():
                if key.kind == kind and key not in now:
                    sink(Deleted(kind, item))


def _read_whole(files: ManifestFiles) -> None:
    if not files.path.exists():
        raise ManifestError((f"{files.path}: No such file or directory",))
    if errors := files.refresh():
        raise ManifestError(tuple(errors))


def _places(path: Path) -> dict[Path, Names]:
    """The directories, and the names in them, on which the manifests depend: through symbolic links as well.

    A ConfigMap volume replaces all its files by renaming one link, and a file may lie behind a link elsewhere.
    """
    places: dict[Path, set[str]] = {}
    for folder, name in way_to(path):
        places.setdefault(folder, set()).add(name)
    everything: dict[Path, Names] = {}
    if path.is_dir():
        everything[path.resolve()] = None
        for entry in path.iterdir():
            if entry.suffix in SUFFIXES and entry.is_symlink():
                for folder, name in way_to(entry):
                    places.setdefault(folder, set()).add(name)
    return {**places, **everything}
