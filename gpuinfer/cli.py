# SPDX-License-Identifier: Apache-2.0
"""The command ``gpuinfer``. Each subcommand is in its own package, which is imported when it is called.

Exit codes are those of sysexits.h: each error's own, 64 for a wrong call, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from errno import ENOSPC, EPIPE
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from gpuinfer import __version__
from gpuinfer.cli_help import plain
from gpuinfer.errors import BrokerUnavailable, GpuinferError, MissingExtra, OutputFailed, UsageError

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded, Settings

EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


#: What comes with the extra ``host``, by the names it is imported by: a client does without.
HOST_MODULES = frozenset(
    {
        *("celery", "kombu", "torch", "numpy", "sdnotify", "dbus_fast", "structlog", "fastapi", "uvicorn"),
        *("uvloop", "httptools", "pynvml", "PIL", "rich", "textual", "jsonschema_rs", "prometheus_client"),
    }
)


@dataclass(frozen=True)
class Entry:
    """A subcommand that is not imported yet."""

    #: ``module:attribute`` of the click command.
    target: str
    #: Its line in ``gpuinfer --help``.
    help: str
    #: The Redis user that root logs in as on a host without the administrator's password.
    user: str = "api"

    def load(self) -> click.Command:
        """Import and return the command."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


COMMANDS: dict[str, Entry] = {
    "demo": Entry(
        "gpuinfer.demo.cli:demo", "Try everything here: a private Redis, workers, the API, requests."
    ),
    "serve": Entry("gpuinfer.serve.cli:serve", "Serve one model from its file or folder.", "worker"),
    "status": Entry("gpuinfer.view.cli:status", "Show the state of the fleet, problems first.", "watcher"),
    "top": Entry("gpuinfer.view.cli:top", "Show the fleet live, and act on workers, queues and tasks."),
    "submit": Entry("gpuinfer.client.cli:submit", "Submit tasks, and optionally wait for their results."),
    "result": Entry("gpuinfer.client.cli:result", "Print the result of a task."),
    "task": Entry("gpuinfer.client.task_cli:task", "Show and list tasks; retry or cancel them."),
    "cancel": Entry("gpuinfer.client.cli:cancel", "Cancel tasks that are waiting or running."),
    "queue": Entry("gpuinfer.queue.cli:queue", "Show, purge, pause and resume queues.", "watcher"),
    "dead": Entry("gpuinfer.queue.dead_cli:dead", "List, retry and drop dead letters."),
    "key": Entry("gpuinfer.keys.cli:key", "Make and revoke keys for applications on a network."),
    "usage": Entry("gpuinfer.queue.usage_cli:usage", "Show requests and device time by key and model."),
    "logs": Entry("gpuinfer.journal.cli:logs", "Show the journal of a task, a GPU or all units."),
    "model": Entry("gpuinfer.models.cli:model", "List, check, install and remove models.", "worker"),
    "redis": Entry("gpuinfer.broker.cli:redis", "Manage this host's own Redis."),
    "gpus": Entry("gpuinfer.gpus_cli:gpus", "List this host's GPUs."),
    "doctor": Entry("gpuinfer.doctor.cli:doctor", "Check this host and print a fix for each problem."),
    "config": Entry("gpuinfer.config.cli:config", "Check and show the settings."),
    "worker": Entry(
        "gpuinfer.worker.cli:worker", "Run the worker of one GPU; list, drain, restart.", "worker"
    ),
    "restore": Entry(
        "gpuinfer.worker.cli:restore", "Put a dead worker's tasks back into their queues.", "worker"
    ),
    "watcher": Entry("gpuinfer.watcher.cli:watcher", "Scale workers with the load; simulate it.", "watcher"),
    "celery": Entry("gpuinfer.celery_cli:celery", "Run Celery's own command on this application."),
    "api": Entry("gpuinfer.api.cli:api", "Run the HTTP API."),
}


class LazyGroup(click.Group):
    """A group that knows its subcommands' names and help lines, and imports only the one that is called.

    ``commands`` holds placeholders for the listing and for click's "Did you mean".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = {name: click.Command(name, short_help=entry.help) for name, entry in COMMANDS.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table: what a new user needs comes first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that is called."""
        entry = COMMANDS.get(cmd_name)
        return plain(entry.load()) if entry else None

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command. A closed pipe on standard output gives exit code 141 instead of click's 1.

        Where Redis does not answer, the error also has the command that ``gpuinfer status`` names then.
        """
        try:
            return super().invoke(ctx)
        except BrokerUnavailable as exc:
            fault = exc.__cause__
            if isinstance(fault, OSError):  # a table is printed while Redis is asked
                if fault.errno == EPIPE and _nobody_reads():
                    raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from exc
                if fault.errno == ENOSPC:
                    raise fault from exc
            if not exc.message.startswith("Redis does not answer"):
                raise
            from gpuinfer.doctor.redis_place import place_of

            start = place_of(ctx.obj.settings.broker).start
            raise BrokerUnavailable(f"{exc.message.rstrip('.')}; try: {start}", exc.field) from exc
        except BrokenPipeError as exc:
            raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the listing from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names from the table."""
        found = [CompletionItem(n, help=e.help) for n, e in COMMANDS.items() if n.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


class _WhenNeeded:
    """``Loaded`` settings that are read when they are first used.

    So ``--help`` works with a broken file, and completion does without pydantic, whose import takes 0.15 s.
    """

    def __init__(self, file: Path | None, user: str = "api") -> None:
        self._file, self._user = file, user
        self._patient = False

    def when_written(self) -> _WhenNeeded:
        """Return settings that a service starts with: a file that is being written is waited for."""
        self._patient = True
        return self

    @cached_property
    def _loaded(self) -> Loaded:
        from gpuinfer.settings import load

        return load(self._file, user=self._user, patient=self._patient)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def only(self, *sections: str) -> Settings:
        from gpuinfer.settings import load

        return load(self._file, only=sections, patient=self._patient).settings


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Settings file. Default: $GPUINFER_CONFIG, else /etc/gpuinfer/gpuinfer.toml.",
)
@click.version_option(__version__, prog_name="gpuinfer", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, file: Path | None) -> None:
    """A queue-backed inference appliance for GPU hosts."""
    entry = COMMANDS.get(ctx.invoked_subcommand or "")
    ctx.obj = _WhenNeeded(file, *((entry.user,) if entry else ()))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads the rest of the buffer. Without this, Python fails to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_BROKEN_PIPE
    except OSError as exc:
        if not _fills_output(exc):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        failed = OutputFailed(f"the output cannot be written: {exc.strerror}")
        _report(failed, as_json=False)
        code = failed.exit_code
    sys.exit(code)


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe that is closed at its other end."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fills_output(fault: OSError) -> bool:
    """Tell whether the disk below standard output is full, rather than that of another file.

    An error of opening a file names it. What writes to a pipe, a socket or a terminal fills no disk there.
    """
    if fault.errno != ENOSPC or fault.filename is not None:
        return False
    mode = os.fstat(1).st_mode
    return not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(1))


def _run(arguments: list[str]) -> int:
    try:
        result = cli.main(args=arguments, prog_name="gpuinfer", standalone_mode=False)
    except GpuinferError as exc:
        _report(exc, as_json=_wants_json(arguments))
        return exc.exit_code
    except click.ClickException as exc:
        if _wants_json(arguments) and not isinstance(exc, click.exceptions.NoArgsIsHelpError):
            _report(UsageError(exc.format_message()), as_json=True)
        else:
            exc.show()
        return _click_code(exc)
    except ModuleNotFoundError as exc:
        missing = _missing_extra(exc)
        if missing is None:
            raise
        _report(missing, as_json=_wants_json(arguments))
        return missing.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def _missing_extra(exc: ModuleNotFoundError) -> MissingExtra | None:
    """Return the error for a library that ``pip install gpuinfer`` leaves out; None for any other library."""
    library = (exc.name or "").partition(".")[0]
    if library not in HOST_MODULES:
        return None
    return MissingExtra(f"needs {library}, which comes with: pip install 'gpuinfer[host]'", "this command")


def _click_code(exc: click.ClickException) -> int:
    if isinstance(exc, click.UsageError):
        return os.EX_USAGE
    return os.EX_NOINPUT if isinstance(exc, click.FileError) else exc.exit_code


def _wants_json(arguments: list[str]) -> bool:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return "--json" in arguments[:end]


def _report(exc: GpuinferError, *, as_json: bool) -> None:
    """Print an error: one line on stderr, or with --json an object on stdout."""
    if as_json:
        import orjson

        click.echo(orjson.dumps({"error": exc.to_dict()}, option=orjson.OPT_INDENT_2))
    else:
        from gpuinfer.journal.sender import say_error

        say_error(f"{' '.join(str(exc).split())} ({exc.code})")
