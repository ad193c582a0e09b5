# SPDX-License-Identifier: Apache-2.0
"""The command line from outside: what it imports, its exit codes, and how it says what was wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import click
import pytest

from gpuinfer.cli import COMMANDS, _WhenNeeded, cli
from gpuinfer.cli_help import in_words
from gpuinfer.queue.connection import typed_errors
from tests.services import Process
from tests.workers import wait_until

pytestmark = pytest.mark.unit

GPUINFER = [sys.executable, "-m", "gpuinfer"]


def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GPUINFER, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "GPUINFER_CONFIG": "", **variables},
    )


def test_help_imports_nothing_heavy() -> None:
    """`gpuinfer --help` and `config` are quick: no torch, celery, fastapi or redis is imported."""
    script = (
        "import sys; from gpuinfer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'celery', 'fastapi', 'redis', 'numpy') if m in sys.modules])"
    )
    for args in (["--help"], ["config", "check"], ["config", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], check=True, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == "[]", args


def complete(line: str, **environ: str) -> tuple[list[str], set[str]]:
    """Return what is offered at the end of a line, and which modules that took."""
    words = line.split(" ")
    code = (
        "import sys; from gpuinfer.cli import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "_GPUINFER_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            **environ,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return [one.split(",", 1)[1] for one in done.stdout.splitlines() if one], set(done.stderr.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gpuinfer mo", ["model"]),
        ("gpuinfer queue pa", ["pause"]),
        ("gpuinfer queue pause b", ["batch"]),
        ("gpuinfer model show digits", ["digits", "digits-photo"]),
        ("gpuinfer model remove own", ["own"]),
        ("gpuinfer submit --model own", ["own"]),
        ("gpuinfer serve own", ["own", "own"]),  # the model, or a file
        ("gpuinfer submit ca", ["ca"]),  # a file
        ("gpuinfer worker dr", ["drain"]),
        ("gpuinfer task sh", ["show"]),
        ("gpuinfer key show sh", ["shop"]),
        ("gpuinfer status --js", ["--json"]),
    ],
)
def test_completion_is_quick(tmp_path: Path, line: str, offered: list[str]) -> None:
    """Commands, options, queues, this host's models and keys: without a library that takes long to import."""
    (tmp_path / "models" / "own").mkdir(parents=True)
    (tmp_path / "models" / "own" / "model.toml").touch()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "shop.toml").touch()
    file = tmp_path / "gpuinfer.toml"
    file.write_text(f'[models]\nfolders = ["{tmp_path}/models"]\n[api]\nkeys_dir = "{tmp_path}/keys"\n')
    found, modules = complete(line, GPUINFER_CONFIG=str(file))
    assert found == offered
    assert modules & {"pydantic", "pydantic_settings", "redis", "rich", "numpy", "celery", "torch"} == set()


def test_a_broken_settings_file_does_not_stop_completion(tmp_path: Path) -> None:
    """A shell's prompt is no place for errors."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text("[models\n")
    assert complete("gpuinfer model show digits-", GPUINFER_CONFIG=str(file))[0] == ["digits-photo"]


@pytest.mark.parametrize(
    ("line", "table", "offered"),
    [
        ("gpuinfer model show digits-", "models.folders = 5", ["digits-photo"]),
        ("gpuinfer model show digits-", "models.folders = [5, '']", ["digits-photo"]),
        ("gpuinfer model show digits-", "models = 5", ["digits-photo"]),
        ("gpuinfer key show none-", "api.keys_dir = 5", []),
        ("gpuinfer key show none-", "api.keys_dir = ['a']", []),
        ("gpuinfer key show none-", 'api.keys_dir = "\\u0000"', []),
    ],
)
def test_a_setting_of_another_type_does_not_stop_completion(
    tmp_path: Path, line: str, table: str, offered: list[str]
) -> None:
    """It is as if it were not set, and nothing is said of it."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(table + "\n")
    found, said = complete(line, GPUINFER_CONFIG=str(file))
    assert found == offered
    assert "Traceback" not in said


def test_completion_does_not_wait_for_a_silent_redis(tmp_path: Path) -> None:
    """Whatever patience the settings and the URL have."""
    file = tmp_path / "gpuinfer.toml"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?socket_timeout=300"
        file.write_text(f'[broker]\nurl = "{url}"\nconnect_timeout_s = 300\n')
        found, said = complete("gpuinfer task show ", GPUINFER_CONFIG=str(file))
        silent.settimeout(60)
        silent.accept()[0].close()  # it was asked
    assert found == []
    assert "Traceback" not in said


def test_help_lists_every_command() -> None:
    """Each name with its line."""
    text = run("--help").stdout
    for name, entry in COMMANDS.items():
        assert f"  {name} " in text
        assert entry.help.split()[0] in text


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_entry_is_a_command_of_that_name(name: str) -> None:
    """The table points at what is there, and each help can be read with a broken settings file."""
    entry = COMMANDS[name]
    module, _, attribute = entry.target.partition(":")
    assert isinstance(getattr(import_module(module), attribute), click.Command)
    done = run("--config", "/nonexistent.toml", name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: gpuinfer {name}")


def commands(group: click.Group, above: click.Context) -> Iterator[tuple[click.Context, click.Command]]:
    """Yield every command, with its context, below a group."""
    for name in group.list_commands(above):
        command = group.get_command(above, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=above)
        yield ctx, command
        if isinstance(command, click.Group):
            yield from commands(command, ctx)


def test_help_is_for_people() -> None:
    """Each command has an example on a line of its own; numbers are named by their unit; no line is cut."""
    for ctx, command in commands(cli, click.Context(cli, info_name="gpuinfer")):
        text = command.get_help(ctx)
        assert "RANGE" not in text, ctx.command_path
        assert "<x" not in text and "<=x" not in text and "[x>" not in text, ctx.command_path
        if isinstance(command, click.Group):
            ctx.terminal_width = 78  # of a terminal with 80 columns
            listed = command.get_help(ctx).split("\nCommands:\n")[1].split("\n\n")[0]
            assert not re.search(r"(?m)\.\.\.$", listed), f"{ctx.command_path} cuts a sentence:\n{listed}"
            continue
        assert re.search(r"^  Examples?:\n    \S", text, re.M), f"{ctx.command_path} shows no example"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (click.IntRange(1, 16), "1 to 16"),
        (click.IntRange(0), "0 or more"),
        (click.IntRange(1, 2**31 - 1), "1 or more"),
        (click.FloatRange(0, min_open=True), "more than 0"),
        (click.FloatRange(0, 1, min_open=True), "more than 0, at most 1"),
        (click.FloatRange(max=5), "at most 5"),
        (click.FloatRange(max=5, max_open=True), "less than 5"),
    ],
)
def test_a_range_is_told_in_words(kind: click.IntRange | click.FloatRange, words: str) -> None:
    """Of each form of a range."""
    assert in_words(kind) == words


def test_an_error_is_one_line_and_its_exit_code() -> None:
    """A person reads who speaks, what is wrong, and the code that programs match on."""
    done = run("config", "check", GPUINFER_API_PORT="x")
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr == (
        "gpuinfer: error: GPUINFER_API_PORT: api.port = 'x': must be a whole number (bad_config)\n"
    )


def test_an_error_is_of_that_level_in_the_journal(tmp_path: Path) -> None:
    """`journalctl -p warning` shows why a unit did not start, not only that it did not."""
    with (tmp_path / "stderr").open("w+") as journal:
        found = os.fstat(journal.fileno())
        environ = {"GPUINFER_BROKER_URL": "x", "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        for arguments in (["config", "check"], ["redis", "local"]):
            subprocess.run(
                [*GPUINFER, *arguments], stderr=journal, env={**os.environ, **environ}, check=False
            )
        journal.seek(0)
        lines = journal.readlines()
    assert len(lines) == 2
    assert all(line.startswith("<3>gpuinfer: error: GPUINFER_BROKER_URL: ") for line in lines)


def test_a_wrong_call_in_json() -> None:
    """Who asked for JSON can read that its call was wrong."""
    done = run("task", "list", "--limit", "0", "--json")
    assert done.returncode == 64
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "bad_usage"
    assert "'--limit'" in error["message"]
    assert json.loads(run("task", "--json").stdout)["error"]["message"].startswith("No such option")


def test_an_error_in_json() -> None:
    """Who asked for JSON gets the error as JSON, on standard output, and nothing else."""
    done = run("config", "check", "--json", GPUINFER_API_PORT="x")
    assert (done.returncode, done.stderr) == (78, "")
    assert json.loads(done.stdout)["error"]["code"] == "bad_config"


@pytest.mark.parametrize("args", [["confg"], ["config", "chek"], ["--nope"], ["config", "check", "--nope"]])
def test_a_wrong_call_is_usage(args: list[str]) -> None:
    """sysexits.h: 64."""
    done = run(*args)
    assert done.returncode == 64
    assert "Error:" in done.stderr


def test_a_near_miss_is_answered() -> None:
    """Did you mean."""
    assert "Did you mean 'config'?" in run("confg").stderr


def test_config_show_hides_passwords() -> None:
    """Neither the password nor the one inside the URL, in both forms; each value has its origin."""
    secrets = {
        "GPUINFER_BROKER_PASSWORD": "hunter2-a",
        "GPUINFER_BROKER_URL": "redis://me:hunter2-b@h:1/0",
    }
    plain, as_json = run("config", "show", **secrets), run("config", "show", "--json", **secrets)
    for done in (plain, as_json):
        assert done.returncode == 0
        assert "hunter2" not in done.stdout + done.stderr
    shown = json.loads(as_json.stdout)["settings"]
    assert shown["broker.url"]["value"] == "redis://me:***@h:1/0"
    assert shown["broker.url"]["origin"] == "GPUINFER_BROKER_URL"
    assert shown["api.port"] == {"value": 8080, "origin": "default", "variable": "GPUINFER_API_PORT"}


def test_config_names_the_file(tmp_path: Path) -> None:
    """--config wins over the variable, and the message begins with the file."""
    file = tmp_path / "mine.toml"
    file.write_text("[api]\nprot = 1\n")
    done = run("--config", str(file), "config", "check", GPUINFER_CONFIG="/nonexistent.toml")
    assert done.returncode == 78
    assert f"{file}: unknown key api.prot; did you mean 'port'?" in done.stderr


def test_a_closed_pipe_is_quiet() -> None:
    """`gpuinfer config show | head -1` leaves no traceback."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*GPUINFER, "config", "show"], check=False, stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_is_told() -> None:
    """`gpuinfer config show >file` on one ends with a line and exit code 74, not with a traceback."""
    command = partial(subprocess.run, check=False, stderr=subprocess.PIPE, text=True, timeout=60)
    with Path("/dev/full").open("w") as full:
        for args in (["config", "show"], ["--help"]):
            done = command([*GPUINFER, *args], stdout=full)
            told = "gpuinfer: error: the output cannot be written: No space left on device (output_failed)\n"
            assert (done.returncode, done.stderr) == (74, told)


@pytest.mark.parametrize(
    ("words", "to"), [("'full', '/var/cache/model'", "/dev/full"), ("'full'", None)], ids=["named", "journal"]
)
def test_a_full_disk_of_another_file_is_not_the_output(words: str, to: str | None) -> None:
    """A service, or a command that writes a file, keeps its traceback: the output is not to blame."""
    code = (
        "import errno; from gpuinfer import cli\n"
        f"def fail(_): raise OSError(errno.ENOSPC, {words})\n"
        "cli._run = fail; cli.main([])"
    )
    with Path(to).open("w") if to else nullcontext(subprocess.PIPE) as output:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, check=False, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, "the output cannot be written" in done.stderr) == (1, False)
    assert "OSError: [Errno 28] full" in done.stderr


@pytest.mark.parametrize("fault", [OSError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "full")])
def test_a_pipe_that_is_closed_is_not_redis(fault: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that nobody reads is printed while Redis is asked: Redis answers, and is not named."""

    def invoke(*_: object) -> None:
        with typed_errors():
            raise fault

    ours, theirs = os.pipe()
    os.close(ours)
    kept = os.dup(1)
    monkeypatch.setattr(click.Group, "invoke", invoke)
    try:
        os.dup2(theirs, 1)
        with pytest.raises((click.exceptions.Exit, OSError)) as caught:
            cli.invoke(click.Context(cli))
    finally:
        os.dup2(kept, 1)
        for number in (kept, theirs):
            os.close(number)
    assert getattr(caught.value, "exit_code", None) == (141 if fault.errno == errno.EPIPE else None)


def test_what_systemd_does_is_named() -> None:
    """`gpuinfer worker start 0` is a guess of many."""
    done = run("worker", "start", "0")
    assert (done.returncode, "systemctl start gpuinfer-worker@0\n" in done.stderr) == (64, True)


def test_ctrl_c_is_130_without_a_traceback(tmp_path: Path) -> None:
    """As a shell reports an interrupted command."""
    fifo = tmp_path / "never.toml"
    os.mkfifo(fifo)
    with Process([*GPUINFER, "--config", fifo, "config", "check"], tmp_path / "log") as process:
        writer = os.open(fifo, os.O_WRONLY)  # returns once the command is opening it
        # It sleeps once it waits to read. Before, the interrupt might come while the collector calls back:
        # Python prints it there, and goes on.
        state = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "S", timeout=60)
        process.send(signal.SIGINT)
        assert process.wait() == 130
        os.close(writer)
        assert "Traceback" not in process.text()


@pytest.mark.parametrize(
    "line",
    [
        *("worker 0", "worker run 0", "restore 0", "watcher run", "api", "api --fd 3"),
        *("redis local", "redis prepare", "celery flower"),
    ],
)
def test_a_service_waits_for_settings_that_are_being_written(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that a unit runs; a command of a person takes the file as it is."""

    class Asked(Exception):
        pass

    def when_written(_: object) -> None:
        raise Asked

    monkeypatch.setattr(_WhenNeeded, "when_written", when_written)
    with pytest.raises(Asked):
        cli.main(args=line.split(), prog_name="gpuinfer", standalone_mode=False)


def test_version() -> None:
    """One line."""
    assert run("--version").stdout.startswith("gpuinfer ")
