"""User-Mode Linux: a kernel with IPVS as a process, on this host's own file system.

The machine sees the host's files, /tmp too, read-only; /run and /dev are its own, with TMPDIR in /run, and one
directory (`Machine.shared`, inside it `SHARED`) is open to both sides. It has no network but what is made in it. All
its processes and its memory live in namespaces of their own and go with it.

By hand: `python -m tests.lab.uml COMMAND…` runs one command as root in the current directory and ends with its status.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

KERNEL = "linux.uml"
SHARED = Path("/run/host")
_TMP = "/run/tmp"  # /tmp is the host's, since what is run may lie there
_MODULES = Path("/usr/lib/uml/modules")
_DIRECTORY = "kproxy-uml-"  # shared; then come the process id and something random
_MEMORY_MIB = 1024
_POLL_SECONDS = 0.05
_POWER_OFF_SECONDS = 5.0
_BY_HAND_SECONDS = 3600.0
_INSIDE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the kernel does not load by itself when it is first used. What is not there in one kernel may be built in.
_LOADED = (
    "ip_vs dummy veth tun nf_conntrack nf_conntrack_netlink xt_set xt_ipvs"
    " iptable_nat iptable_filter iptable_mangle ip6table_nat ip6table_filter ip6table_mangle"
)

# The first process. Kernel messages go to the first console (standard output), what the command says to the second.
# Modules are found through a link in /run, since /lib/modules of the host is not ours to change; MODPROBE_OPTIONS says
# so to whoever runs modprobe, the sysctl to the kernel. Inside a user namespace of the host root's programs are not
# root's, and those with the setuid bit (mount!) would lose their rights by it, so the bit must not count.
# The command gets a session of its own: the first process's group is 0, which kill() takes for the caller's own.
_INIT = """\
#!/bin/sh
. {shared}/environment
setpriv --no-new-privs mount -o remount,bind,nosuid none /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mkdir {inside} {tmp} /run/lock /run/modules /run/modules/lib /run/modules/lib/modules
mount -t hostfs none {inside} -o {shared}
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t devpts devpts /dev/pts
ln -s "{modules}/$(uname -r)" /run/modules/lib/modules/
printf '#!/bin/sh\\nexec modprobe -d /run/modules "$@"\\n' >/run/modules/modprobe
chmod +x /run/modules/modprobe
echo /run/modules/modprobe >/proc/sys/kernel/modprobe
schedulers=$(find "{modules}/$(uname -r)" -name 'ip_vs_*.ko' -printf '%f ' | sed 's/\\.ko / /g')
modprobe -a {loaded} $schedulers
ip link set lo up
hostname uml
stty raw -echo </dev/tty1
cd {directory}
(exec setsid {command}) </dev/null >/dev/tty1 2>&1
echo $? >{inside}/status.part
mv {inside}/status.part {inside}/status
exec {python} -I -S -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'
"""


class UnavailableError(Exception):
    """User-Mode Linux cannot run here; the message says why."""


class CrashError(Exception):
    """The machine ended, or stood still, before its command did; the message holds its last words."""


class Machine:
    """A User-Mode Linux that runs one command. It starts at once and works in the background until `close`.

    `files` (name → text) are put in the shared directory before. It ends with the thread that made it. Raises
    UnavailableError where there is no User-Mode Linux.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] = os.environ, files: Mapping[str, str] | None = None
    ) -> None:
        reason = why_unavailable()
        if reason:
            raise UnavailableError(reason)
        _remove_leftovers()
        self.shared = Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY}{os.getpid()}-"))
        self.output = self.shared / "output"
        self._console = self.shared / "console"
        self._status = self.shared / "status"
        try:
            for name, text in (files or {}).items():
                (self.shared / name).write_text(text)
            self._write_environment(env)
            self._write_init(command)
            self._process = self._boot()
        except BaseException:
            shutil.rmtree(self.shared)
            raise

    def poll(self) -> int | None:
        """The exit status of the command, None while it runs. Raises CrashError."""
        if self._status.exists():
            return int(self._status.read_text())
        if self._process.poll() is not None and not self._status.exists():
            raise CrashError(f"User-Mode Linux ended with status {self._process.returncode}\n{self.last_words()}")
        if "Kernel panic" in self._console.read_text(errors="replace"):  # it would turn round and round for ever
            raise CrashError(f"User-Mode Linux crashed\n{self.last_words()}")
        return None

    def wait(self, seconds: float, say: Callable[[bytes], object]) -> int:
        """The exit status of the command; `say` gets what it prints. Raises CrashError, also when the time is up."""
        deadline = time.monotonic() + seconds
        with self.output.open("rb") as output:
            while True:
                status = self.poll()
                if said := output.read():
                    say(said)
                if status is not None:
                    return status
                if time.monotonic() > deadline:
                    raise CrashError(f"User-Mode Linux: not done within {seconds:g} s\n{self.last_words()}")
                time.sleep(_POLL_SECONDS)

    def last_words(self) -> str:
        """The end of what the command and the kernel said."""
        texts = {"output": self.output, "console": self._console}
        return "".join(f"--- its {name}:\n{path.read_text(errors='replace')[-8000:]}\n" for name, path in texts.items())

    def close(self) -> None:
        """End it, whatever it does, and remove what it left."""
        try:
            self._process.wait(_POWER_OFF_SECONDS if self._status.exists() else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # what unshare started dies with it, and so does all in its namespace of processes
            self._process.wait()
        shutil.rmtree(self.shared, ignore_errors=True)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_environment(self, env: Mapping[str, str]) -> None:
        inside = {
            **env,
            "PATH": f"{env.get('PATH', '')}:{_INSIDE_PATH}",
            "MODPROBE_OPTIONS": "-d /run/modules",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": _TMP,
        }
        names = [name for name in inside if name.isidentifier() and name.isascii()]
        text = "".join(f"export {name}={shlex.quote(inside[name])}\n" for name in names)
        (self.shared / "environment").write_text(text)

    def _write_init(self, command: Sequence[str]) -> None:
        init = self.shared / "init"
        init.write_text(
            _INIT.format(
                shared=_quoted(self.shared),
                inside=SHARED,
                tmp=_TMP,
                modules=_MODULES,
                loaded=_LOADED,
                directory=_quoted(Path.cwd()),
                command=shlex.join(command),
                python=_quoted(Path(sys.executable)),
            )
        )
        init.chmod(0o700)

    def _boot(self) -> subprocess.Popen[bytes]:
        # Its memory is a file, which must be on a tmpfs that is large enough and allows execution; /dev/shm of a
        # container is often neither, so it gets one of its own. Pages are taken when they are first used.
        shell = f'mount -t tmpfs -o size={_MEMORY_MIB + 64}m tmpfs /dev/shm && exec "$@"'
        tether = ["setpriv", "--pdeathsig", "KILL"]  # or it would outlive a pytest that is killed
        isolation = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "sh", "-c", shell, "sh"]
        options = [
            "root=/dev/root",
            "rootfstype=hostfs",
            "ro",
            f"mem={_MEMORY_MIB}M",
            f'init="{self.shared}/init"',
            "quiet",
        ]
        environment = {"PATH": f"{os.environ.get('PATH', '')}:{_INSIDE_PATH}", "TMPDIR": "/dev/shm", "HOME": "/dev/shm"}
        with self._console.open("wb") as console, self.output.open("wb") as output:
            consoles = ["con=null", "con0=fd:0,fd:1", f"con1=null,fd:{output.fileno()}", "uml_dir=/dev/shm/"]
            return subprocess.Popen(
                [*tether, *isolation, KERNEL, *options, *consoles],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[output.fileno()],
                start_new_session=True,
            )


def why_unavailable() -> str:
    """Why User-Mode Linux cannot run here; empty if it can."""
    if not shutil.which(KERNEL, path=f"{os.environ.get('PATH', '')}:{_INSIDE_PATH}"):
        return f"there is no {KERNEL} (Debian's package user-mode-linux)"
    if not _MODULES.is_dir():
        return f"{KERNEL} has no modules in {_MODULES}"
    if not shutil.which("modprobe", path=_INSIDE_PATH):
        return "there is no modprobe (Debian's package kmod) to load the modules of User-Mode Linux"
    return ""


def run(command: Sequence[str], *, seconds: float = 300.0) -> tuple[int, str]:
    """Run a command; its exit status and output. Raises UnavailableError, CrashError."""
    with Machine(command) as machine:
        said: list[bytes] = []
        status = machine.wait(seconds, said.append)
    return status, b"".join(said).decode(errors="replace")


def _remove_leftovers() -> None:
    """Directories of runs that were killed are all that can be left of them."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY}*-*"):
        if not Path("/proc", directory.name.split("-")[2]).exists():
            shutil.rmtree(directory, ignore_errors=True)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def main() -> int:
    """The command line."""
    if not sys.argv[1:]:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the machine is closed

    def say(said: bytes) -> None:
        sys.stdout.buffer.write(said)
        sys.stdout.flush()

    try:
        with Machine(sys.argv[1:]) as machine:
            return machine.wait(_BY_HAND_SECONDS, say)
    except (UnavailableError, CrashError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
