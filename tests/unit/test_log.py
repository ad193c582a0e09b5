# SPDX-License-Identifier: Apache-2.0
"""Logging, read from real processes: one line each, with fields, and no payload."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytestmark = pytest.mark.unit

SETUP = """
import logging, warnings
from gpuinfer.log import bound, configure, get_logger, setup_celery_logging
from gpuinfer.settings import LogSettings
log = get_logger("gpuinfer.test")
"""


def stderr_of(script: str) -> str:
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr


def lines_of(script: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr_of(script).splitlines()]


def test_a_line_of_ours() -> None:
    """Every line has a time in UTC with milliseconds, a level, a logger, an action; then its fields."""
    (line,) = lines_of("""
        configure(LogSettings())
        log.info("batch_done", size=8)
    """)
    assert list(line) == ["timestamp", "level", "logger", "action", "size"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert (line["level"], line["logger"], line["action"], line["size"]) == (
        "info",
        "gpuinfer.test",
        "batch_done",
        8,
    )


def test_many_tasks_are_several_lines() -> None:
    """A line names a hundred tasks at most; all are named, and each line says which part it is."""
    lines = lines_of("""
        configure(LogSettings())
        log.info("batch_done", batch_size=250, task_ids=[f"id{n}" for n in range(250)])
        log.info("batch_done", batch_size=100, task_ids=[f"id{n}" for n in range(100)])
    """)
    assert [line.get("part") for line in lines] == ["1 of 3", "2 of 3", "3 of 3", None]
    assert [len(line["task_ids"]) for line in lines] == [100, 100, 50, 100]
    assert [task for line in lines[:3] for task in line["task_ids"]] == [f"id{n}" for n in range(250)]
    assert {line["action"] for line in lines} == {"batch_done"}
    text = stderr_of("""
        configure(LogSettings(format="console"))
        log.info("batch_done", task_ids=[f"id{n}" for n in range(150)])
    """)
    assert [line.count("id") - line.count("task_ids") for line in text.splitlines()] == [100, 50]


def test_a_stranger_s_id_is_cut() -> None:
    """A plain Celery producer may choose an id of a megabyte; it runs, and a line has 200 characters."""
    lines = lines_of("""
        configure(LogSettings())
        log.info("one", task_id="x" * 5000)
        log.info("several", task_ids=["y" * 5000, "short"])
        log.info("plain", task_id="z" * 200)
    """)
    assert [line.get("task_id") for line in lines] == ["x" * 200, None, "z" * 200]
    assert lines[1]["task_ids"] == ["y" * 200, "short"]


def test_a_client_s_lines_have_their_action() -> None:
    """The clients log by the standard library; in the front their lines look like all others."""
    (line,) = lines_of("""
        configure(LogSettings())
        fields = {"reason": "gone", "waiting": 3}
        logging.getLogger("gpuinfer.client.subscription").warning(
            "Redis is away: %s", "gone", extra={"action": "redis_away", "fields": fields}
        )
    """)
    assert (line["action"], line["reason"], line["waiting"]) == ("redis_away", "gone", 3)
    assert "message" not in line


def test_foreign_lines_come_once_through_the_same_renderer() -> None:
    """celery, kombu, uvicorn and warnings; also those whose loggers brought handlers of their own."""
    lines = lines_of("""
        for name in ("uvicorn.access", "celery.worker"):
            logging.getLogger(name).addHandler(logging.StreamHandler())
            logging.getLogger(name).propagate = False
        configure(LogSettings())
        configure(LogSettings())
        for name in ("celery.worker", "kombu.connection", "uvicorn.access", "someone.else"):
            logging.getLogger(name).warning("said %s", name)
        warnings.warn("old thing", stacklevel=1)
    """)
    assert [line["action"] for line in lines] == [
        "celery.worker",
        "kombu.connection",
        "uvicorn.access",
        "someone.else",
        "py.warnings",
    ]
    assert lines[0]["message"] == "said celery.worker"
    assert "old thing" in lines[-1]["message"]
    assert all(line["level"] == "warning" and line["timestamp"] for line in lines)


def test_a_message_that_celery_cannot_take_is_not_shown() -> None:
    """Of a task nobody knows, the log has its name and nothing of what it was sent."""
    text = stderr_of("""
        from celery.worker.consumer import consumer
        configure(LogSettings())
        configure(LogSettings())
        body, headers = "the secret body", {"argsrepr": "the secret arguments"}
        try:
            raise KeyError("nobodys.task")
        except KeyError as exc:
            consumer.error(consumer.UNKNOWN_TASK_ERROR, exc, body, headers, {}, exc_info=True)
            consumer.error(consumer.INVALID_TASK_ERROR, exc, body, exc_info=True)
        consumer.warn(consumer.UNKNOWN_FORMAT, body)
        consumer.crit(consumer.MESSAGE_DECODE_ERROR, ValueError(), "json", "utf-8", headers, body)
    """)
    assert "secret" not in text
    assert "nobodys.task" in text
    assert len(text.splitlines()) == 4


def test_bound_fields_reach_foreign_lines_too() -> None:
    """What is bound is on every line inside, and on none after."""
    lines = lines_of("""
        configure(LogSettings())
        with bound(worker=3):
            log.info("inside")
            logging.getLogger("kombu").error("inside too")
        log.info("after")
    """)
    assert [line.get("worker") for line in lines] == [3, 3, None]


def test_debug_is_for_our_own_lines() -> None:
    """Libraries at debug log messages whole: they stay at info."""
    lines = lines_of("""
        configure(LogSettings(level="debug"))
        log.debug("ours")
        logging.getLogger("kombu").debug("payload")
        logging.getLogger("celery.app.trace").info("Task succeeded: payload")
    """)
    assert [line["action"] for line in lines] == ["ours"]


def test_a_level_holds_for_all() -> None:
    """level = "warning" silences what is below, of ours and of others."""
    lines = lines_of("""
        configure(LogSettings(level="warning"))
        log.info("no")
        logging.getLogger("kombu").info("no")
        log.warning("yes")
    """)
    assert [line["action"] for line in lines] == ["yes"]


def test_an_exception_is_one_line_without_local_variables() -> None:
    """A traceback stays inside its line, in both formats without the values of variables."""
    script = """
        configure(LogSettings(format={format!r}))
        def fail():
            image = "PAY" + "LOAD"
            raise ValueError("bad")
        try:
            fail()
        except ValueError:
            log.exception("failed")
    """
    (line,) = lines_of(script.format(format="json"))
    assert "ValueError: bad" in line["exception"]
    assert "PAYLOAD" not in line["exception"]
    console = stderr_of(script.format(format="console"))
    assert "ValueError: bad" in console
    assert "PAYLOAD" not in console


def test_any_value_can_be_logged() -> None:
    """Bytes and arrays as their type; paths and errors as text; no value breaks a line."""
    (line,) = lines_of("""
        import numpy, pathlib
        configure(LogSettings())
        log.info("odd", raw=b"secret", array=numpy.zeros(3), path=pathlib.Path("/a"), big=2**70,
                 half=chr(0xDC80), error=OSError("no"))
    """)
    assert (line["raw"], line["array"], line["path"]) == ("<bytes>", "<ndarray>", "/a")
    assert (line["big"], line["half"], line["error"]) == (2**70, "\udc80", "no")


def test_celery_does_not_take_the_root_logger() -> None:
    """With our receiver Celery sets up nothing: its lines come once, as ours do."""
    lines = lines_of("""
        setup_celery_logging(LogSettings())
        from celery import Celery
        app = Celery(broker="memory://")
        app.log.setup(loglevel="INFO", redirect_stdouts=True)
        logging.getLogger("celery.worker").info("ready")
        logging.getLogger("celery.app.trace").error("lost")
    """)
    assert [(line["logger"], line["message"]) for line in lines] == [
        ("celery.worker", "ready"),
        ("celery.app.trace", "lost"),
    ]


def test_celery_is_not_imported_for_its_sake() -> None:
    """The API and the command line log without paying for Celery."""
    (line,) = lines_of("""
        import sys
        configure(LogSettings())
        log.info("loaded", celery="celery" in sys.modules)
    """)
    assert line["celery"] is False


def test_a_terminal_gets_colours() -> None:
    """format = "auto" looks at the stream: on a real terminal the line is for reading."""
    script = SETUP + 'configure(LogSettings())\nlog.info("batch_done", size=8)\n'
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs) as process:
        os.close(theirs)
        text = os.read(ours, 4096).decode()
        assert process.wait(60) == 0
    os.close(ours)
    assert "\x1b[" in text
    assert "batch_done" in text
    assert not text.startswith("{")


def test_a_long_text_is_cut() -> None:
    """In lines of JSON and on a terminal, as in the journal; lists of ids stay whole."""
    script = """
        configure(LogSettings(format="{}"))
        log.info("task_failed", reason="x" * 100_000, task_ids=["y" * 36] * 100)
        logging.getLogger("celery.worker").warning("z" * 100_000)
    """
    ours, foreign = lines_of(script.format("json"))
    assert len(ours["task_ids"]) == 100
    assert ours["reason"].endswith("x [97952 characters more]")
    assert foreign["message"].endswith("z [97952 characters more]")
    assert len(stderr_of(script.format("console"))) < 20_000
