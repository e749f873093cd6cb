"""Log lines as a process writes them: each test runs one, with its own standard error."""

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.observe.log_lines import PROLOGUE, lines_of, records_of


def test_json_lines_have_stable_keys():
    [line] = records_of("""
        logs.configure("json", 0)
        log.info("synced", services=3, service="a/b")
    """)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("ts"))
    assert line == {"level": "info", "logger": "kproxy.test", "msg": "synced", "services": 3, "service": "a/b"}


def test_without_a_terminal_lines_are_json():
    [line] = records_of("logs.configure(None, 0); log.info('synced')")
    assert line["msg"] == "synced"


def test_text_when_asked_for_is_without_colours_in_a_file():
    [line] = lines_of("logs.configure('text', 0); log.warning('odd', port=3)")
    assert re.search(r"^\S+Z \[warning +\] odd +\[kproxy\.test\] +port=3$", line.rstrip())


def test_a_terminal_gets_text_in_colours():
    script = PROLOGUE + "logs.configure(None, 0); log.info('synced', port=3)"
    ours, its = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stderr=its, check=True, timeout=30)
    os.close(its)
    written = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\x1b[" in written
    assert "synced" in re.sub(r"\x1b\[[\d;]*m", "", written)


@pytest.mark.parametrize(
    ("verbosity", "seen"),
    [
        (0, {"own info", "library warning"}),
        (3, {"own info", "library warning"}),
        (4, {"own info", "library warning", "own debug"}),
        (6, {"own info", "library warning", "own debug", "library info"}),
        (8, {"own info", "library warning", "own debug", "library info", "library debug"}),
        (10, {"own info", "library warning", "own debug", "library info", "library debug"}),
    ],
)
def test_verbosity(verbosity, seen):
    lines = records_of(f"""
        logs.configure("json", {verbosity})
        log.debug("own debug")
        log.info("own info")
        library = logging.getLogger("urllib3.connectionpool")
        library.debug("library debug")
        library.info("library info")
        library.warning("library warning")
    """)
    assert {line["msg"] for line in lines} == seen


def test_verbosity_can_be_changed_later():
    lines = records_of("""
        logs.configure("json", 0)
        log.debug("before")
        logs.set_verbosity(4)
        log.debug("between")
        logs.set_verbosity(0)
        log.debug("after")
    """)
    assert [line["msg"] for line in lines] == ["between"]


def test_lines_of_libraries_look_like_our_own():
    [line] = records_of("logs.configure('json', 0); logging.getLogger('kubernetes').warning('retry %d', 3)")
    assert (line["logger"], line["level"], line["msg"]) == ("kubernetes", "warning", "retry 3")


def test_warnings_and_exceptions_that_end_a_thread_or_the_process_are_lines_too():
    lines = records_of("""
        logs.configure("json", 0)
        warnings.warn("careful")
        thread = threading.Thread(target=lambda: 1 / 0, name="watch")
        thread.start()
        thread.join()
        raise ValueError("the end")
    """)
    warning, in_thread, last = lines
    assert "careful" in warning["msg"]
    assert in_thread["msg"] == "uncaught exception in thread watch"
    assert in_thread["exception"].endswith("ZeroDivisionError: division by zero")
    assert last["level"] == "critical"
    assert last["exception"].endswith("ValueError: the end")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_credentials_are_never_written(log_format):
    written = "\n".join(
        lines_of(f"""
            logs.configure("{log_format}", 8)
            log.info("connecting", token="hush1", headers="Authorization: Bearer hush2.x-y", Password="hush3")
            log.info("sent Bearer hush8hush8hush8hush8")
            logging.getLogger("urllib3").debug("send: Authorization: Basic hush4==")
            logging.getLogger("kubernetes").info('{{"token": "hush5", "password":"hush6"}}')
            try:
                raise ValueError("token=hush7")
            except ValueError:
                log.exception("refused")
        """)
    )
    assert "hush" not in written
    assert written.count("[redacted]") >= 8


def test_ordinary_words_stay_as_they_are():
    [line] = records_of("logs.configure('json', 0); log.info('the token of a pod', kind='Basic setup, secret of n1')")
    assert (line["msg"], line["kind"]) == ("the token of a pod", "Basic setup, secret of n1")
