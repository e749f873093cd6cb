"""kind, docker and make as far as the scripts' own logic needs them: they note how they were called, and answer.

There is no kind here, nor an image of a node. kubectl and what it speaks to are real.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_NOTE = """\
#!/bin/sh
echo "${0##*/} $*" >>"$FAKES/calls"
"""
_KIND = """\
case "$1 $2" in
"get clusters") cat "$FAKES/clusters" ;;
"get nodes") echo kproxy-control-plane ;;
"create cluster") echo "$4" >>"$FAKES/clusters" ;;
esac
"""
_DOCKER = """\
case "$1 $2" in
"--version ") echo "Docker version 28.2.2, build e6534b4" ;;
"info ") [ ! -e "$FAKES/no-daemon" ] ;;
"image inspect") grep -qx "$3" "$FAKES/images" ;;
"images --format") sed 's/@.*/:<none>/' "$FAKES/images" ;;
"images --digests") grep @ "$FAKES/images" ;;
"tag "*) echo "$3" >>"$FAKES/images" ;;
"inspect "*) [ -e "$FAKES/nodes/$2" ] && echo "[{}]" ;;
"exec "*)
    network=--net=$FAKES/nodes/$2 enter=$(command -v nsenter)
    shift 2
    export PATH="$FAKES/programs"
    exec "$enter" "$network" "$@"
    ;;
"port "*) cat "$FAKES/port" ;;
*) exit 1 ;;
esac
"""
# Of what rules can be read with, kind's node image has this: no ipset, no ipvsadm.
NODE_PROGRAMS = ("cat", "ip", "ip6tables-save", "iptables-save", "nft")
_TOOLS = (
    "sh",
    "cat",
    "cp",
    "date",
    "grep",
    "head",
    "mkdir",
    "mktemp",
    "readlink",
    "rm",
    "sed",
    "sleep",
    "sort",
    "tail",
    "tr",
    "kubectl",
)


class Fakes:
    """A directory that is the whole PATH: the fakes, and the few real programs that the scripts need."""

    def __init__(self, directory: Path, *missing: str) -> None:
        self._directory = directory
        self.path = directory / "bin"
        self.path.mkdir()
        for name in ("calls", "clusters", "images"):
            (directory / name).touch()
        for name, does in {"kind": _KIND, "docker": _DOCKER, "make": 'echo "${4#IMAGE=}" >>"$FAKES/images"\n'}.items():
            if name not in missing:
                (self.path / name).write_text(_NOTE + does)
                (self.path / name).chmod(0o755)
        for name in _TOOLS:
            if name not in missing and (found := shutil.which(name)):
                (self.path / name).symlink_to(found)
        (self.path / "python3").symlink_to(sys.executable)

    def environment(self, **more: str) -> dict[str, str]:
        """The environment for a script."""
        return {"PATH": str(self.path), "FAKES": str(self._directory), "HOME": str(self._directory), **more}

    def has_images(self, *names: str) -> None:
        """Images that docker has."""
        (self._directory / "images").write_text("".join(f"{name}\n" for name in names))

    def has_clusters(self, *names: str) -> None:
        """Clusters that kind knows."""
        (self._directory / "clusters").write_text("".join(f"{name}\n" for name in names))

    def has_nodes(self, paths: dict[str, Path], published: str = "", programs: Sequence[str] = NODE_PROGRAMS) -> None:
        """Containers by name, with their network namespaces; each has a port of this machine that leads to it."""
        (self._directory / "programs").mkdir()
        for name in programs:
            (self._directory / "programs" / name).symlink_to(shutil.which(name) or f"/nonexistent/{name}")
        (self._directory / "nodes").mkdir()
        for name, path in paths.items():
            (self._directory / "nodes" / name).symlink_to(path)
        (self._directory / "port").write_text(f"{published}\n")

    def has_no_daemon(self) -> None:
        """docker is there, but nobody answers it."""
        (self._directory / "no-daemon").touch()

    def calls(self, of: str) -> list[str]:
        """How a program was called, in order, without questions."""
        asked = ("docker ", "kind get")
        lines = (self._directory / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{of} ") and not line.startswith(asked)]
