"""Runs a script and reads the log lines it writes to standard error."""

import json
import subprocess
import sys
import textwrap

PROLOGUE = """
import logging, sys, threading, warnings
import structlog
from kproxy import logs
log = structlog.get_logger("kproxy.test")
"""


def lines_of(script: str) -> list[str]:
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == ""
    return done.stderr.splitlines()


def records_of(script: str) -> list[dict]:
    return [json.loads(line) for line in lines_of(script)]
