"""What README.md and docs/ tell is so: their commands are run, and what they print is compared.

In a ```console block a line that begins with `$ ` is a command, and what follows it is its output. A line `…` stands
for any lines, `…` in a line for anything. A ```yaml block with a file name after the language is that file. A document
is one session, in one shell, in a network namespace of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SESSIONS = [ROOT / "README.md", ROOT / "docs/troubleshooting.md"]

BLOCK = re.compile(r"^```(\w+)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANSWERED = "\x1e"  # printed after each command
SESSION_SECONDS = 60


@pytest.mark.parametrize("document", SESSIONS, ids=lambda document: str(document.relative_to(ROOT)))
def test_commands_print_what_is_shown(document: Path, make_netns, tmp_path: Path) -> None:
    for language, name, content in BLOCK.findall(document.read_text()):
        if language == "yaml" and name:
            (tmp_path / name).write_text(content)
    shown = list(exchanges(document.read_text()))
    assert shown

    answers = session(make_netns(), tmp_path, [command for command, _ in shown])

    for (command, output), answer in zip(shown, answers, strict=True):
        assert re.fullmatch(pattern(output), answer, re.DOTALL), f"$ {command}\nprints\n{answer}\ninstead of\n{output}"


def exchanges(text: str) -> Iterator[tuple[str, str]]:
    """Commands with the output that is shown for them."""
    for language, _, content in BLOCK.findall(text):
        if language == "console":
            for exchange in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                command, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", exchange, re.DOTALL).groups()
                yield command.strip(), output


def pattern(output: str) -> str:
    return "".join(
        r"(?:.*\n)?" if line == "…" else re.escape(line).replace("…", r"[^\n]*") + r"\n" for line in output.splitlines()
    )


def session(netns, folder: Path, commands: list[str]) -> list[str]:
    """What each command prints, on both streams."""
    launcher = folder / "bin" / "kproxy"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m kproxy "$@"\n')
    launcher.chmod(0o755)
    script = "".join(f"{command}\nprintf '\\036'\n" for command in commands)
    done = netns.run(
        subprocess.run,
        ["unshare", "--pid", "--fork", "--kill-child", "bash"],  # whatever the shell leaves running ends with it
        cwd=folder,
        env={**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SESSION_SECONDS,
        check=False,
    )
    answers = done.stdout.split(ANSWERED)
    assert len(answers) == len(commands) + 1, f"the session ended early:\n{done.stdout}"
    return answers[:-1]
