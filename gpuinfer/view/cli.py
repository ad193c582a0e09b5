# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer status`` and ``gpuinfer top``."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import UsageError
from gpuinfer.queue.show import as_json_option, one_line, print_json

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded
    from gpuinfer.view.model import Status

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
#: How long the history is kept, in seconds.
_MOST_S = 30 * 86400


class Span(click.ParamType[float]):
    """A time span such as ``90s``, ``15m``, ``24h`` or ``7d``."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|min|m|h|d)", str(value))
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if not 60 <= seconds <= _MOST_S:
            self.fail(f"{value!r} is not a time span from 60s to 30d, such as 15m, 24h or 7d", param, ctx)
        return seconds


@click.command(
    epilog=examples("gpuinfer status", "gpuinfer status --watch 2", "gpuinfer status --json --since 24h")
)
@as_json_option
@click.option(
    "--watch",
    type=click.FloatRange(min=0.2),
    metavar="SECONDS",
    help="Repeat at this interval, until Ctrl-C.",
)
@click.option(
    "--since",
    "since_s",
    type=Span(),
    default="1h",
    show_default=True,
    metavar="SPAN",
    help="Time that the curves cover.",
)
@click.pass_obj
def status(loaded: Loaded, as_json: bool, watch: float | None, since_s: float) -> int:
    """Show the state of the fleet, problems first.

    Each problem comes with a fix; workers, queues and history follow. gpuinfer doctor checks this host in
    more detail. Exit code 0: no problems. 1: warnings. 2: an error, or Redis does not answer. 64: wrong
    usage. 78: wrong settings. 130: Ctrl-C, with --watch.
    """
    gc.disable()  # saves a fifth of the time of these imports, which leave no garbage
    from gpuinfer.view.build import build
    from gpuinfer.view.gather import Gatherer

    gc.enable()
    with Gatherer(loaded, since_s=since_s) as gatherer:
        if watch is not None:
            _watch(lambda: build(gatherer.look()), watch, as_json=as_json)
        found = build(gatherer.look())
    if as_json:
        print_json(found.to_dict())
    else:
        from gpuinfer.view.screen import show

        show(found)
    return found.exit_code


def _watch(look: Callable[[], Status], every_s: float, *, as_json: bool) -> None:
    """Show the status repeatedly until Ctrl-C."""
    if not as_json:
        from gpuinfer.view.screen import live

        live(look, every_s)
    while True:
        click.echo(one_line(look().to_dict()))
        time.sleep(every_s)


@click.command(epilog=examples("gpuinfer top", "gpuinfer top --every 5"))
@click.option(
    "--every",
    type=click.FloatRange(min=0.2),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Update interval.",
)
@click.pass_obj
def top(loaded: Loaded, every: float) -> int:
    """Show the fleet live, and act on workers, queues and tasks.

    Keys: 1 workers, 2 queues, 3 recently ended tasks; s and S sort, / filters; d (drain), p (pause), r
    (retry) and l (log) act on the selected row. For scripts, use gpuinfer status.
    """
    from gpuinfer.view.actions import OnFleet
    from gpuinfer.view.build import build
    from gpuinfer.view.gather import Gatherer
    from gpuinfer.view.top import Top

    if not sys.stdout.isatty():
        raise UsageError("needs a terminal; gpuinfer status --watch 2 does not")
    actions = OnFleet(loaded)
    try:
        with Gatherer(loaded) as gatherer:
            application = Top(lambda: build(gatherer.look()), actions, every_s=every)
            application.run()
    finally:
        actions.close()
    return application.return_code or 0
