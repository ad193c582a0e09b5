# SPDX-License-Identifier: Apache-2.0
"""Write the manual pages with scdoc.

``python packaging/manpages.py ROOT FOLDER``, with an interpreter that has gpuinfer. gpuinfer(1) comes from
the commands' own help and packaging/man/gpuinfer.1.end, gpuinfer.toml(5) from the settings file that is
shipped; the others are packaging/man/*.scd. They are written when the package is built, so that they
are always up to date. SOURCE_DATE_EPOCH gives the date.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from gpuinfer import __version__
from gpuinfer.cli import cli

SECTION = re.compile(r"^\[([\w.-]+)\]$")
#: A setting, shown with its default; without its "#" it would be changed.
SETTING = re.compile(r"^#?([A-Za-z_][\w-]*) = (.*)$")
PROSE = re.compile(r"^# ?(.*)$")


def escape(text: str) -> str:
    """Return text as scdoc would print it; a line of it is never taken for a list or a table."""
    text = re.sub(r"([\\*_])", r"\\\1", text)
    return re.sub(r"(?m)^([-#|:.\[\]`]|\d+\.)", r"\\\1", text) if not text.startswith(".") else text


def literal(lines: list[str]) -> str:
    """Return lines that are kept as they are."""
    return "```\n" + "\n".join(line.replace("\\", "\\\\") for line in lines) + "\n```\n"


def paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring's paragraphs; one that begins with \\b keeps its lines, as in click.

    Its heading, such as "Examples:", is text: a literal block after options would be indented as their help.
    """
    for block in re.split(r"\n\s*\n", text.replace("\f", "").strip()):
        lines = block.strip("\n").splitlines()
        if lines and lines[0].strip() == "\b":
            heading, *rest = lines[1:]
            yield escape(heading.strip()) + "\n"
            yield literal(textwrap.dedent("\n".join(rest)).splitlines())
        elif lines:
            yield escape(" ".join(line.strip() for line in lines)) + "\n"


def header(name: str, section: int, kind: str) -> str:
    """Return the title line."""
    return f'{name}({section}) "gpuinfer {__version__}" "{kind}"\n\n'


def options_of(command: click.Command, ctx: click.Context) -> Iterator[str]:
    """Yield each option and described argument with its help; --help is said once, above."""
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record and record[1] and not {"-h", "--help"} & set(parameter.opts):
            yield f"*{escape(record[0])}*\n\t{escape(' '.join(record[1].split()))}\n"


def command_text(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    """Yield the parts of a command, or those of a group's commands."""
    ctx = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield f"## {escape(usage)}\n"
    yield from paragraphs(command.help or "")
    yield from options_of(command, ctx)
    if command.epilog:
        yield from paragraphs(command.epilog)
    if isinstance(command, click.Group):
        for below in command.list_commands(ctx):
            found = command.get_command(ctx, below)
            if found and not found.hidden:
                yield from command_text(below, found, ctx)


def command_page(ending: Path) -> str:
    """Return the source of gpuinfer(1)."""
    top = click.Context(cli, info_name="gpuinfer")
    purpose = (cli.help or "").strip().rstrip(".")
    parts = [
        f"# NAME\n\ngpuinfer - {escape(purpose[:1].lower() + purpose[1:])}\n",
        "# SYNOPSIS\n\n*gpuinfer* [*--config* _FILE_] _COMMAND_ [_ARGUMENT_]...\n",
        "# DESCRIPTION\n\nRequests wait in Redis, and one worker per GPU runs them in micro-batches, each "
        "under systemd. *gpuinfer* is the command for all tasks; *--help* explains each subcommand. "
        "*gpuinfer*(7) describes the units and files of a host and how they work together.\n",
        "# OPTIONS\n",
        *options_of(cli, top),
        "# COMMANDS\n",
    ]
    for name in cli.list_commands(top):
        found = cli.get_command(top, name)
        if found and not found.hidden:
            parts += command_text(name, found, top)
    return header("gpuinfer", 1, "User Commands") + "\n".join([*parts, ending.read_text(encoding="utf-8")])


def spoken(prose: list[str]) -> str:
    """Return comments of the settings file as a paragraph; text between backticks is bold."""
    return re.sub(r"`([^`]+)`", r"*\1*", escape(" ".join(prose)))


def settings_text(lines: list[str]) -> Iterator[str]:
    """Yield the parts of gpuinfer.toml(5); raises ValueError for a line it cannot read.

    Settings in a row, without an empty line between them, share the comment above them.
    """
    prose: list[str] = []
    names: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if found := SETTING.match(line):
            names.append(f"*{escape(found[1])} = {escape(found[2])}*")
            continue
        if names:
            yield "++\n".join(names) + f"\n\t{spoken(prose)}\n"
            names, prose = [], []
        if found := SECTION.match(line):
            if prose:
                yield spoken(prose) + "\n"
            yield f"# [{escape(found[1])}]\n"
            prose = []
        elif not line.strip():
            if prose:
                yield spoken(prose) + "\n"
            prose = []
        elif found := PROSE.match(line):
            prose.append(found[1])
        else:
            raise ValueError(f"line {number} is no comment, section or setting: {line!r}")


def settings_page(file: Path) -> str:
    """Return the source of gpuinfer.toml(5)."""
    return header("gpuinfer.toml", 5, "File Formats") + "\n".join(
        [
            "# NAME\n\ngpuinfer.toml - settings of gpuinfer\n",
            "# SYNOPSIS\n\n_/etc/gpuinfer/gpuinfer.toml_\n",
            "# DESCRIPTION\n",
            *settings_text(file.read_text(encoding="utf-8").splitlines()),
            "# SEE ALSO\n\n*gpuinfer*(1), *gpuinfer*(7)\n",
        ]
    )


def sources(root: Path) -> dict[str, str]:
    """Return each page's name -> its source in scdoc. ``root``: of a checkout."""
    pages = {
        "gpuinfer.1": command_page(root / "packaging" / "man" / "gpuinfer.1.end"),
        "gpuinfer.toml.5": settings_page(root / "etc" / "gpuinfer.toml"),
    }
    for file in sorted((root / "packaging" / "man").glob("*.scd")):
        pages[file.stem] = file.read_text(encoding="utf-8").replace("@VERSION@", __version__)
    return pages


def roff(source: str) -> str:
    """Return a page. Raises ValueError with scdoc's words for a wrong source.

    scdoc turns hyphenation off above the title, which turns it on again: a name of a file or setting that is
    hyphenated cannot be copied.
    """
    done = subprocess.run(["scdoc"], input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return re.sub(r"(?m)^(\.TH .*)$", r"\1\n.nh", done.stdout, count=1)


def main() -> None:
    """Write all pages into a folder."""
    root, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for name, source in sources(root).items():
        (target / name).write_text(roff(source), encoding="utf-8")


if __name__ == "__main__":
    main()
