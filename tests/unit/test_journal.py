# SPDX-License-Identifier: Apache-2.0
"""What reaches the journal, read from a socket in journald's place: fields, large entries, no room."""

from __future__ import annotations

import array
import fcntl
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuinfer.journal.entry import MAX_IDS, MAX_TRACEBACK, MAX_VALUE, Entries
from gpuinfer.journal.sender import Sender, field, is_journal

pytestmark = pytest.mark.unit

Fields = list[tuple[str, str]]

SETUP = """
import logging, pathlib, sys, threading
from gpuinfer.journal import sender
from gpuinfer.log import configure, get_logger
from gpuinfer.settings import LogSettings
sender.SOCKET, sender.READ_S = pathlib.Path(sys.argv[1]), 0.0
log = get_logger("gpuinfer.test")
configure(LogSettings(format="journal"), program="gpuinfer-test", worker="gpu1@here", gpu=1)
"""


def parse(entry: bytes) -> Fields:
    """Read an entry by the rules of the protocol."""
    fields = []
    while entry:
        head, _, rest = entry.partition(b"\n")
        if b"=" in head:
            name, _, value = head.partition(b"=")
            entry = rest
        else:
            name, size = head, struct.unpack("<Q", rest[:8])[0]
            value, entry = rest[8 : 8 + size], rest[8 + size + 1 :]
            assert rest[8 + size : 8 + size + 1] == b"\n"
        fields.append((name.decode(), value.decode()))
    return fields


class Journald:
    """A datagram socket that takes entries as journald does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal"
        #: How many entries came as memory files.
        self.files = 0
        self.open()

    def open(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.setblocking(False)

    def close(self) -> None:
        self.socket.close()
        self.path.unlink(missing_ok=True)

    def take(self) -> list[Fields]:
        """Return what has come."""
        entries: list[Fields] = []
        while True:
            try:
                data, rights, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return entries
            entries.append(parse(self._mapped(rights[0][2]) if rights else data))

    def _mapped(self, right: bytes) -> bytes:
        """Read a memory file, and see that nobody can change it any more, as journald demands."""
        fd = array.array("i", right)[0]
        self.files += 1
        try:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
                return bytes(memory)
        finally:
            os.close(fd)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    server = Journald(tmp_path)
    yield server
    server.close()


@pytest.fixture
def sender(journald: Journald) -> Iterator[Sender]:
    made = Sender(lambda count: field("COUNT", str(count)), journald.path)
    yield made
    made.close()


def run(script: str, journald: Journald) -> str:
    """Run a program that logs; return its standard error."""
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script), str(journald.path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr


def logged(script: str, journald: Journald) -> list[dict[str, str]]:
    """Run a program that logs; return its entries. Nothing may be on its standard error."""
    assert run(script, journald) == ""
    return [dict(fields) for fields in journald.take()]


# -- the sender ---------------------------------------------------------------------------


def test_fields(sender: Sender, journald: Journald) -> None:
    """A value of one line stands after its name; one of several lines has its length before it."""
    assert field("A", "b") == b"A=b\n"
    assert field("A", "b\nc") == b"A\n\x03\0\0\0\0\0\0\0b\nc\n"
    assert sender.send(field("A", "1=2") + field("B", "x\ny\n") + field("C", "half \udc80"))
    assert journald.take() == [[("A", "1=2"), ("B", "x\ny\n"), ("C", "half \\udc80")]]


@pytest.mark.parametrize("lines", [1_700, 4_000_000])
def test_large_entries(sender: Sender, journald: Journald, lines: int) -> None:
    """What is large, or too large for any datagram, travels as a sealed memory file."""
    text = "line\n" * lines
    assert sender.send(field("MESSAGE", "large") + field("TRACEBACK", text))
    ((message, trace),) = journald.take()
    assert journald.files == 1
    assert message == ("MESSAGE", "large")
    assert trace == ("TRACEBACK", text)
    assert sender.send(field("MESSAGE", "small again"))
    assert len(journald.take()) == journald.files == 1


def test_a_full_journal_never_blocks(sender: Sender, journald: Journald) -> None:
    """Without room entries are dropped and counted; the count is told, once, before the next entry."""
    while not sender.dropped:
        assert sender.send(field("MESSAGE", "fill"))
    for _ in range(9):
        assert sender.send(field("MESSAGE", "too much"))
    assert sender.dropped == 10
    assert {value for ((_, value),) in journald.take()} == {"fill"}
    assert sender.send(field("MESSAGE", "after"))
    assert sender.send(field("MESSAGE", "after that"))
    told = [[("COUNT", "10")], [("MESSAGE", "after")], [("MESSAGE", "after that")]]
    assert journald.take() == told


def test_the_count_is_told_at_the_end(journald: Journald) -> None:
    """A program that ends tells what it dropped, if there is room by then."""
    sender = Sender(lambda count: field("COUNT", str(count)), journald.path)
    while not sender.dropped:
        sender.send(field("MESSAGE", "fill"))
    journald.take()
    sender.close()
    assert journald.take() == [[("COUNT", "1")]]


@pytest.mark.parametrize("end", ["sys.exit()", "flush(); os._exit(0)"])
def test_a_process_that_ends_is_read_first(journald: Journald, end: str) -> None:
    """The journal asks who sent an entry as it reads it: a process that ends waits for that."""
    script = f"""
import os
from gpuinfer.log import flush
sender.READ_S = 300.0
log.error("start_failed")
print("the end", flush=True)
{end}
"""
    command = [sys.executable, "-c", SETUP + script, str(journald.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"the end\n"
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.5)
        ((message, *_),) = journald.take()
        assert message[1].startswith("start failed")
        assert program.wait(60) == 0


def test_a_stopped_journal_keeps_no_process(
    sender: Sender, journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, but not for long; and without one, not at all."""
    monkeypatch.setattr("gpuinfer.journal.sender.READ_S", 0.01)
    assert sender.send(field("MESSAGE", "unread"))
    sender.flush()
    journald.take()
    monkeypatch.setattr("gpuinfer.journal.sender.READ_S", float("inf"))
    sender.flush()
    journald.close()
    assert not sender.send(field("MESSAGE", "nobody"))
    sender.flush()


def test_a_journal_that_goes_and_comes(sender: Sender, journald: Journald) -> None:
    """Gone, the caller is told so; back under the same path, it is used again."""
    assert sender.send(b"A=1\n")
    journald.close()
    assert not sender.send(b"A=2\n")
    journald.path.touch()
    assert not sender.send(b"A=3\n")
    journald.path.unlink()
    journald.open()
    assert sender.send(b"A=4\n")
    assert journald.take() == [[("A", "4")]]


def test_which_stream_is_the_journal(tmp_path: Path) -> None:
    """JOURNAL_STREAM names the file systemd connected; a redirection elsewhere is told from it."""
    with (tmp_path / "a").open("w") as ours, (tmp_path / "b").open("w") as other:
        found = os.fstat(ours.fileno())
        environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert is_journal(ours, environ)
        assert not is_journal(other, environ)
        assert not is_journal(ours, {})
    assert not is_journal(ours, environ)


# -- lines as entries ---------------------------------------------------------------------


def entries() -> Entries:
    return Entries("gpuinfer-worker", frozenset({"worker"}), lambda value: f"<{type(value).__name__}>")


def test_a_line() -> None:
    """MESSAGE is for reading; every value has a field; PRIORITY is the level's, a task's has its own name."""
    (entry,) = entries().of(
        {
            "timestamp": "2026-01-01T00:00:00.000Z",
            "level": "warning",
            "logger": "gpuinfer.x",
            "action": "task_failed",
            "task_id": "t1",
            "model": "digits",
            "worker": "gpu0@here",
            "priority": 9,
            "duration_ms": 1.25,
            "nothing": None,
            "reason": "inputs: must be\n 8 x 8",
        }
    )
    assert parse(entry) == [
        (
            "MESSAGE",
            "task failed: inputs: must be 8 x 8 (task_id=t1, model=digits, priority=9, duration_ms=1.25)",
        ),
        ("PRIORITY", "4"),
        ("SYSLOG_IDENTIFIER", "gpuinfer-worker"),
        ("LOGGER", "gpuinfer.x"),
        ("ACTION", "task_failed"),
        ("TASK_ID", "t1"),
        ("MODEL", "digits"),
        ("WORKER", "gpu0@here"),
        ("TASK_PRIORITY", "9"),
        ("DURATION_MS", "1.25"),
        ("REASON", "inputs: must be\n 8 x 8"),
    ]


@pytest.mark.parametrize(
    ("level", "priority"),
    [("critical", "2"), ("error", "3"), ("warning", "4"), ("info", "6"), ("debug", "7")],
)
def test_priorities(level: str, priority: str) -> None:
    """Levels are syslog's, so that journalctl -p finds them."""
    (entry,) = entries().of({"action": "a", "level": level})
    assert dict(parse(entry))["PRIORITY"] == priority


def test_many_tasks() -> None:
    """Each id of a list is a TASK_ID; more than an entry can hold make several entries, none lost."""
    line = {"action": "batch_done", "level": "info", "task_ids": ["a", "b\nMESSAGE=forged", "c"]}
    (entry,) = entries().of(line)
    assert [value for name, value in parse(entry) if name == "TASK_ID"] == line["task_ids"]
    assert [value for name, value in parse(entry) if name == "MESSAGE"] == ["batch done"]
    ids = [f"id{number}" for number in range(2 * MAX_IDS + 1)]
    parts = [parse(entry) for entry in entries().of({**line, "task_ids": ids})]
    assert [dict(part)["MESSAGE"] for part in parts] == [f"batch done [{n} of 3]" for n in (1, 2, 3)]
    assert [value for part in parts for name, value in part if name == "TASK_ID"] == ids
    assert max(len(part) for part in parts) < 1024


def test_no_value_is_long() -> None:
    """Whatever a stranger or a model's exception made of it: each field is cut, each id too."""
    ids = [f"id{number}" for number in range(MAX_IDS)]
    long = "é" * 100_000
    line = {"action": "a", "level": "info", "reason": long, "odd": [long], "message": f"{long}\n{long}"}
    (entry,) = entries().of({**line, "exception": long + "\nE: the end", "task_id": long, "queues": [long]})
    for name, value in parse(entry):
        assert len(value) <= (MAX_TRACEBACK if name == "TRACEBACK" else MAX_VALUE) + 600, name
    assert dict(parse(entry))["TRACEBACK"].endswith("E: the end")
    assert dict(parse(entry))["REASON"].endswith("é [97952 characters more]")
    (entry,) = entries().of({"action": "a", "level": "info", "task_ids": [*ids[1:], long]})
    told = [value for name, value in parse(entry) if name == "TASK_ID"]
    assert told[:-1] == ids[1:]
    assert len(told[-1]) < MAX_VALUE + 50


def test_names_of_fields() -> None:
    """journald takes capitals, digits and _, a letter first; other characters are replaced."""
    (entry,) = entries().of(
        {"action": "a", "level": "info", "odd-key": 1, "_hidden": 2, "1st": 3, "x" * 70: 4}
    )
    names = [name for name, _ in parse(entry)]
    assert names[4:] == ["ODD_KEY", "HIDDEN", "ST", "X" * 64]


# -- whole programs -----------------------------------------------------------------------


def test_a_program_logs_to_the_journal(journald: Journald) -> None:
    """Our lines, a library's, a warning: each once, with the program's name and its fields on all."""
    lines = logged(
        """
        import warnings
        log.info("batch_done", model="digits", task_ids=["a", "b"], flag=True, path=pathlib.Path("/x"))
        logging.getLogger("celery.worker").warning("first %s", "line\\nsecond line")
        warnings.warn("old thing", stacklevel=1)
        """,
        journald,
    )
    ours, foreign, warning = lines
    assert ours["MESSAGE"] == "batch done (model=digits, flag=true, path=/x, gpu=1)"
    assert ours["LOGGER"] == "gpuinfer.test"
    assert foreign["MESSAGE"] == "first line (gpu=1)"
    assert foreign["ACTION"] == foreign["LOGGER"] == "celery.worker"
    assert foreign["TEXT"] == "first line\nsecond line"
    assert "old thing" in warning["MESSAGE"]
    for line in lines:
        assert (line["SYSLOG_IDENTIFIER"], line["WORKER"], line["GPU"]) == ("gpuinfer-test", "gpu1@here", "1")


def test_exceptions_that_nobody_caught(journald: Journald) -> None:
    """In a thread, in asyncio, and the one that ends the program: each one entry, nothing on stderr."""
    lines = logged(
        """
        import asyncio
        def fail(secret="PAY" + "LOAD"):
            raise ValueError("bad")
        thread = threading.Thread(target=fail, name="inference")
        thread.start()
        thread.join()
        async def main():
            asyncio.get_running_loop().call_soon(fail)
            await asyncio.sleep(0)
        asyncio.run(main())
        fail()
        """,
        journald,
    )
    assert [line["ACTION"] for line in lines] == ["uncaught_exception", "asyncio", "uncaught_exception"]
    assert [line["PRIORITY"] for line in lines] == ["2", "3", "2"]
    assert lines[0]["MESSAGE"] == "uncaught exception: ValueError: bad (thread=inference, gpu=1)"
    for line in lines:
        assert line["TRACEBACK"].startswith("Traceback")
        assert "PAYLOAD" not in str(line)


def test_no_payload(journald: Journald) -> None:
    """Bytes and arrays are told as their type; a traceback has no values of variables."""
    lines = logged(
        """
        import numpy
        log.info("odd", raw=b"PAYLOAD", array=numpy.zeros(3), many=[b"PAYLOAD"])
        try:
            image = "PAY" + "LOAD"
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
        """,
        journald,
    )
    assert (lines[0]["RAW"], lines[0]["ARRAY"], lines[0]["MANY"]) == ("<bytes>", "<ndarray>", '["<bytes>"]')
    assert lines[1]["MESSAGE"] == "failed: ValueError: bad (gpu=1)"
    assert "PAYLOAD" not in str(lines)


def test_without_a_journal(journald: Journald) -> None:
    """Where there is no socket, lines are on standard error, as JSON."""
    journald.close()
    stderr = run('log.info("batch_done", size=8)', journald)
    (line,) = [json.loads(text) for text in stderr.splitlines()]
    assert (line["action"], line["size"], line["worker"]) == ("batch_done", 8, "gpu1@here")


def test_auto_follows_standard_error(tmp_path: Path) -> None:
    """format = "auto" under systemd is the journal; with standard error redirected it is not."""
    with (tmp_path / "stderr").open("w+") as stream:
        found = os.fstat(stream.fileno())
        for name, wanted in ((f"{found.st_dev}:{found.st_ino}", "journal"), ("1:2", "json")):
            script = "from gpuinfer.log import target; from gpuinfer.settings import LogSettings; "
            command = [sys.executable, "-c", script + "print(target(LogSettings()))"]
            environment = os.environ | {"JOURNAL_STREAM": name}
            done = subprocess.run(
                command, stderr=stream, stdout=subprocess.PIPE, text=True, env=environment, check=True
            )
            assert done.stdout.strip() == wanted
