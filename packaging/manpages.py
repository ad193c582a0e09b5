# SPDX-License-Identifier: Apache-2.0
"""Write gpuinfer(1) from the commands' own help, and gpuinfer.toml(5) from the settings file that is shipped.

``python packaging/manpages.py etc/gpuinfer.toml FOLDER``, with an interpreter that has gpuinfer. Both are
written when the package is built, so that neither can fall behind. SOURCE_DATE_EPOCH gives the date.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from gpuinfer import __version__
from gpuinfer.cli import cli

SECTION = re.compile(r"^\[([\w.-]+)\]$")
#: A setting, shown with its default; without its "#" it would be changed.
SETTING = re.compile(r"^#?([A-Za-z_][\w-]*) = (.*)$")
PROSE = re.compile(r"^# ?(.*)$")

ENDING = """\
.SH EXIT STATUS
0 when all went well; 64 for a wrong call; otherwise the code of
.BR sysexits.h (3head)
for what was wrong, which the message names too; 130 after Ctrl\\-C.
.SH ENVIRONMENT
.TP
.B GPUINFER_CONFIG
The settings file to read.
.TP
.BI GPUINFER_ SECTION _ NAME
A setting; it wins over the file: GPUINFER_API_PORT=8080.
.SH FILES
.TP
.I /etc/gpuinfer/gpuinfer.toml
The settings, see
.BR gpuinfer.toml (5).
.TP
.I /etc/gpuinfer/worker@N.env
Settings of the worker of GPU N alone, as variables.
.TP
.I /etc/gpuinfer/redis.conf
The settings of the appliance's own Redis.
.TP
.I /etc/gpuinfer/redis\\-users.acl
Redis users for programs of your own; it shows one for a plain Celery producer.
.TP
.I /etc/gpuinfer/logins
Passwords of Redis's users operator and viewer, for the members of the groups gpuinfer\\-operator and
gpuinfer\\-viewer: their commands log in by themselves.
.TP
.I /var/lib/gpuinfer/models
Models, a folder each.
.SH SEVERAL HOSTS
A second host installs the same package and works for the first one's queue.
On the first, open Redis with TLS at the end of
.I /etc/gpuinfer/redis.conf
(the commented lines show how) and restart gpuinfer\\-redis.
The key is for Redis alone; the workers, which run models, must not read it:
.PP
.nf
install \\-o gpuinfer\\-redis \\-m 0400 redis.key /etc/gpuinfer/tls/redis.key
.fi
.PP
On the second, put the CA's certificate and, in
.IR /etc/gpuinfer/credentials ,
the first one's
.IR api ,
.I worker
and
.IR watcher ;
remove
.IR admin ,
which stays with the first: it may do everything to the queue.
Where people who are not root work on the second, it wants the first one's
.I /etc/gpuinfer/logins
too.
Then set in
.IR /etc/gpuinfer/gpuinfer.toml :
.PP
.nf
[broker]
url = "rediss://FIRST:6380/0"
tls_ca = "/etc/gpuinfer/tls/ca.crt"
.fi
.PP
Then
.BR "systemctl restart gpuinfer.target" :
its own Redis is skipped, and its workers join.
Root's commands log in there as the program they belong to, so that what is the administrator's (dead letters,
.BR "gpuinfer celery" ")"
is done on the first.
Hosts are told apart by their host names, which must differ.
.SH SEE ALSO
.BR gpuinfer.toml (5),
.BR systemctl (1),
.BR journalctl (1)
"""


def escape(text: str) -> str:
    """Return text as roff would print it; a line of it is never taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti").replace('"', "\\(dq")
    return re.sub(r"(?m)^\.", r"\\&.", text)


def paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring's paragraphs as roff; one that begins with \\b keeps its lines, as in click."""
    for block in re.split(r"\n\s*\n", text.replace("\f", "").strip()):
        lines = [line.strip() for line in block.strip().splitlines()]
        if lines and lines[0] == "\b":
            yield ".nf\n" + escape("\n".join(lines[1:])) + "\n.fi"
        elif lines:
            yield escape(" ".join(lines))


def header(name: str, section: int, kind: str) -> str:
    """Return the title line, dated by SOURCE_DATE_EPOCH."""
    when = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    date = time.strftime("%Y-%m-%d", when)
    return f'.TH {name.upper()} {section} "{date}" "gpuinfer {__version__}" "{kind}"\n'


def options_of(command: click.Command, ctx: click.Context) -> Iterator[str]:
    """Yield a tagged paragraph for each option and described argument; --help is said once, above."""
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record and record[1] and not {"-h", "--help"} & set(parameter.opts):
            yield f".TP\n.B {escape(record[0])}\n{escape(' '.join(record[1].split()))}\n"


def command_text(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    """Yield the part of a command, or those of a group's commands."""
    ctx = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield f'.SS "{escape(usage)}"\n' + "\n.PP\n".join(paragraphs(command.help or "")) + "\n"
    yield from options_of(command, ctx)
    if command.epilog:
        yield ".PP\n" + escape(" ".join(command.epilog.split())) + "\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(ctx):
            found = command.get_command(ctx, below)
            if found and not found.hidden:
                yield from command_text(below, found, ctx)


def command_page() -> str:
    """Return gpuinfer(1)."""
    top = click.Context(cli, info_name="gpuinfer")
    text = header("gpuinfer", 1, "User Commands")
    purpose = (cli.help or "").strip().rstrip(".")
    text += f".SH NAME\ngpuinfer \\- {escape(purpose[:1].lower() + purpose[1:])}\n"
    text += ".SH SYNOPSIS\n.B gpuinfer\n"
    text += "[\\fB\\-\\-config\\fR \\fIFILE\\fR] \\fICOMMAND\\fR [\\fIARGUMENT\\fR]...\n"
    text += ".SH DESCRIPTION\n"
    text += "Requests wait in Redis, and one worker a GPU runs them in micro\\-batches, each under systemd.\n"
    text += "This is the command for all of it; every command explains itself with \\fB\\-\\-help\\fR.\n"
    text += ".SH OPTIONS\n" + "".join(options_of(cli, top)) + ".SH COMMANDS\n"
    for name in cli.list_commands(top):
        found = cli.get_command(top, name)
        if found and not found.hidden:
            text += "".join(command_text(name, found, top))
    return text + ENDING


def settings_text(lines: list[str]) -> Iterator[str]:
    """Yield the parts of gpuinfer.toml(5); raises ValueError for a line it cannot read."""
    prose: list[str] = []
    for number, line in enumerate(lines, 1):
        if found := SECTION.match(line):
            if prose:
                yield ".PP\n" + escape(" ".join(prose)) + "\n"
            yield f".SH [{escape(found[1])}]\n"
            prose = []
        elif found := SETTING.match(line):
            yield f".TP\n.B {escape(found[1])} = {escape(found[2])}\n"
            # Settings in a row share the words above them.
            yield (escape(" ".join(prose)) or "See above.") + "\n"
            prose = []
        elif not line.strip():
            if prose:
                yield ".PP\n" + escape(" ".join(prose)) + "\n"
            prose = []
        elif found := PROSE.match(line):
            prose.append(found[1])
        else:
            raise ValueError(f"line {number} is no comment, section or setting: {line!r}")


def settings_page(file: Path) -> str:
    """Return gpuinfer.toml(5)."""
    text = header("gpuinfer.toml", 5, "File Formats")
    text += ".SH NAME\ngpuinfer.toml \\- settings of gpuinfer\n"
    text += ".SH SYNOPSIS\n.I /etc/gpuinfer/gpuinfer.toml\n.SH DESCRIPTION\n"
    text += "".join(settings_text(file.read_text(encoding="utf-8").splitlines()))
    return text + ".SH SEE ALSO\n.BR gpuinfer (1)\n"


def main() -> None:
    """Write both pages into a folder."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    (target / "gpuinfer.1").write_text(command_page(), encoding="utf-8")
    (target / "gpuinfer.toml.5").write_text(settings_page(source), encoding="utf-8")


if __name__ == "__main__":
    main()
