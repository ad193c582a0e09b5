# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor``: one line a finding, its remedy under it; or a document in JSON."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from dataclasses import asdict

import click
from click.shell_completion import CompletionItem

import gpuinfer
from gpuinfer.cli_help import examples
from gpuinfer.doctor.check import run_all
from gpuinfer.doctor.host import STATUSES, Finding, Host, Status
from gpuinfer.doctor.registry import CHECKS, NAMES, TOPICS, choose
from gpuinfer.plural import many
from gpuinfer.queue.show import print_json
from gpuinfer.settings import Loaded

#: Status -> its mark and colour on a terminal, and its plural.
_MARKS: dict[Status, tuple[str, str, str]] = {
    "ok": ("✓", "green", "ok"),
    "warning": ("!", "yellow", "warnings"),
    "error": ("✗", "red", "errors"),
    "skipped": ("-", "bright_black", "skipped"),
}


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    lines = {check.name: check.help for check in CHECKS}
    found = [name for name in (*TOPICS, *NAMES) if name.startswith(incomplete)]
    return [CompletionItem(name, help=lines.get(name)) for name in found]


@click.command(
    epilog=examples("gpuinfer doctor", "gpuinfer doctor redis gpu.cuda", "gpuinfer doctor --quick --json")
)
@click.argument("checks", nargs=-1, metavar="[CHECK]...", shell_complete=_complete)
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON.")
@click.option("--quick", is_flag=True, help="Skip what takes seconds: CUDA and a request.")
@click.option("--list", "as_list", is_flag=True, help="List the checks and what each expects.")
@click.pass_obj
def doctor(loaded: Loaded, checks: tuple[str, ...], as_json: bool, quick: bool, as_list: bool) -> int:
    """Check this host and print a fix for each problem.

    A CHECK is a check's name or its topic (redis, gpu, units ...). The exit code is 0 when all is well,
    warnings allowed, and 1 when there is an error. Run it as root, or some checks are skipped.
    """
    chosen = choose(checks, quick=quick)
    width = max(len(check.name) for check in chosen)
    if as_list:
        if as_json:
            print_json([{"check": one.name, "holds": one.help, "slow": one.slow} for one in chosen])
        else:
            click.echo("\n".join(f"{check.name:{width}}  {check.help}" for check in chosen))
        return 0
    started, found = time.monotonic(), list[Finding]()
    # A person reads, on a terminal that has our marks.
    terminal = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    colour = False if os.environ.get("NO_COLOR") else None
    for findings in run_all(chosen, Host(loaded)):  # each is printed as soon as those before it are there
        found += findings
        for finding in () if as_json else findings:
            click.echo(line(finding, width, terminal=terminal), color=colour)
    counts, took_s = Counter(finding.status for finding in found), time.monotonic() - started
    if as_json:
        print_json(
            {
                "ok": not counts["error"],
                "host": socket.gethostname(),
                "version": gpuinfer.__version__,
                "took_s": round(took_s, 3),
                "summary": {status: counts[status] for status in STATUSES},
                "findings": [{"check": finding.check, **asdict(finding)} for finding in found],
            }
        )
    else:
        parts = [f"{counts[s]} {_MARKS[s][2] if counts[s] > 1 else s}" for s in STATUSES if counts[s]]
        click.echo(f"{many(len(found), 'finding')}: {', '.join(parts) or 'none'} ({took_s:.1f} s)")
    return int(bool(counts["error"]))


def line(finding: Finding, width: int, *, terminal: bool) -> str:
    """Return a finding for people: marks and colours on a terminal, words elsewhere."""
    mark, colour, _ = _MARKS[finding.status]
    shown = click.style(mark, fg=colour, bold=True) if terminal else f"{finding.status:7}"
    name = f"{finding.check:{width}}"
    text = f"{shown} {click.style(name, dim=True) if terminal else name}  {finding.message}"
    if not finding.remedy:
        return text
    arrow = click.style(f"→ {finding.remedy}", fg="cyan") if terminal else f"-> {finding.remedy}"
    return f"{text}\n{'' if terminal else '        '}  {arrow}"
