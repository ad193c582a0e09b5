# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer doctor``."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click
import orjson
from click.shell_completion import CompletionItem

from gpuinfer.cli_help import examples
from gpuinfer.doctor import report
from gpuinfer.doctor.check import Check
from gpuinfer.doctor.finding import Finding
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.registry import CHECKS, NAMES, TOPICS, choose
from gpuinfer.doctor.runner import look_over
from gpuinfer.settings import Loaded


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    lines = {check.name: check.help for check in CHECKS}
    names = [*TOPICS, *NAMES]
    return [CompletionItem(name, help=lines.get(name)) for name in names if name.startswith(incomplete)]


@click.command(
    epilog=examples("gpuinfer doctor", "gpuinfer doctor redis gpu.cuda", "gpuinfer doctor --quick --json")
)
@click.argument("checks", nargs=-1, metavar="[CHECK]...", shell_complete=_complete)
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON.")
@click.option("--quick", is_flag=True, help="Leave out what takes seconds: CUDA, loading models, a request.")
@click.option("--list", "as_list", is_flag=True, help="List the checks and what each one holds.")
@click.pass_obj
def doctor(loaded: Loaded, checks: tuple[str, ...], as_json: bool, quick: bool, as_list: bool) -> int:
    """Check this host and print a fix for each problem.

    A CHECK is a check's name or its topic (redis, gpu, units ...). The exit code is 0 when all is well,
    warnings allowed, and 1 when there is an error. Run it as root, or some checks are skipped.
    """
    chosen = choose(checks, quick=quick)
    if as_list:
        _list(chosen, as_json)
        return 0
    started = time.monotonic()
    found = _look(chosen, Host(loaded), silent=as_json)
    took_s = time.monotonic() - started
    if as_json:
        click.echo(orjson.dumps(report.document(found, took_s), option=orjson.OPT_INDENT_2))
    else:
        click.echo(report.summary(found, took_s))
    return int(any(finding.status == "error" for finding in found))


def _look(chosen: Sequence[Check], host: Host, *, silent: bool) -> list[Finding]:
    """Run the checks, and print each finding as soon as those before it are there."""
    width, terminal = max(len(check.name) for check in chosen), report.on_terminal()
    found: list[Finding] = []
    for findings in look_over(chosen, host):
        found += findings
        for finding in () if silent else findings:
            click.echo(report.line(finding, width, terminal=terminal))
    return found


def _list(chosen: Sequence[Check], as_json: bool) -> None:
    if as_json:
        rows = [{"check": check.name, "holds": check.help, "slow": check.slow} for check in chosen]
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    for check in chosen:
        click.echo(f"{check.name:20} {check.help}")
