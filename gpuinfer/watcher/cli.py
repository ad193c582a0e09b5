# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer watcher``: run it, show its reasons, and try its policy in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


@click.group()
def watcher() -> None:
    """Keep as many workers running as the queues need."""


@watcher.command(epilog=examples("gpuinfer watcher run --dry-run"))
@click.option("--dry-run", is_flag=True, help="Only log decisions; the service may run beside it.")
@click.pass_obj
def run(loaded: Loaded, dry_run: bool) -> None:
    """Start and stop workers as the queues need, until SIGTERM. Workers run on when it ends."""
    import asyncio

    from gpuinfer.log import configure
    from gpuinfer.watcher.main import serve

    settings = loaded.when_written().settings
    configure(settings.log, program="gpuinfer-watcher")
    asyncio.run(serve(settings, dry_run=dry_run))


@watcher.command(epilog=examples("gpuinfer watcher explain --last 5"))
@click.option(
    "--last", type=click.IntRange(1, 500), default=10, show_default=True, help="How many decisions."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def explain(loaded: Loaded, last: int, as_json: bool) -> None:
    """Print the current and the last decisions of each watcher.

    A decision says what was done, from which numbers, and why. The journal has them too, for longer:
    journalctl -u gpuinfer-watcher.
    """
    from datetime import UTC, datetime

    import orjson

    from gpuinfer.queue.connection import connect, typed_errors, user_of
    from gpuinfer.queue.fleet import HOSTS
    from gpuinfer.watcher.notes import DECISIONS, present, told

    with typed_errors(user_of(loaded.settings.broker)):
        client = connect(loaded.settings.broker)
        texts: list[bytes] = client.lrange(DECISIONS, 0, last - 1)  # type: ignore[assignment]
        hosts: dict[bytes, bytes] = client.hgetall(HOSTS)  # type: ignore[assignment]
        seconds, microseconds = client.time()
    entries, now = [orjson.loads(text) for text in texts], present(hosts, seconds + microseconds / 1e6)
    if as_json:
        click.echo(orjson.dumps({"now": now, "decisions": entries}, option=orjson.OPT_INDENT_2))
        return
    for host, one in now.items():
        silent = f"its watcher has been silent for {one['age_s']:.0f} s"
        click.echo(f"now  {host}  {one['why'] if one['alive'] else silent}")
    for entry in entries:
        when = datetime.fromtimestamp(entry["at"], UTC).astimezone().isoformat(sep=" ", timespec="seconds")
        click.echo(told(entry, when))
    if not entries:
        click.echo("no decision yet: no watcher has run")


def _figure(name: str, kind: click.IntRange | click.FloatRange, default: int, text: str) -> Decorator:
    return click.option(name, type=kind, default=default, show_default=True, help=text)


@watcher.command(epilog=examples("gpuinfer watcher simulate --pattern flash --gpus 8 --event 600:fail:0"))
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="CSV: second,tasks[,queue].")
@click.option(
    "--pattern", type=click.Choice(["burst", "diurnal", "flash", "poisson"]), help="A made-up trace."
)
@_figure("--gpus", click.IntRange(1, 10_000), 8, "GPUs of the fleet, with a worker on each.")
@_figure("--floor", click.IntRange(0, 10_000), 0, "Workers that always run.")
@click.option("--load", type=click.FloatRange(0, 10), help="Share of all GPUs that the pattern needs.")
@_figure("--seconds", click.FloatRange(120, 7 * 86400), 3600, "Seconds that the pattern lasts.")
@_figure("--seed", click.IntRange(0), 1, "Seed of the pattern and of start-up times.")
@_figure("--startup", click.FloatRange(0.1, 3600), 12, "Seconds from start to ready.")
@_figure("--single-ms", click.FloatRange(1, 600_000), 40, "Time of one task alone, in ms.")
@_figure("--max-batch", click.IntRange(1, 65536), 32, "Most tasks in a batch.")
@_figure("--gain", click.FloatRange(1, 65536), 8, "How many times more tasks a second full batches serve.")
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="SECOND:WHAT:GPU",
    help="What happens to a worker: fail, recover, stop, start, mask, unmask. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def simulate(
    loaded: Loaded,
    trace: Path | None,
    pattern: str | None,
    gpus: int,
    floor: int,
    load: float | None,
    seconds: float,
    seed: int,
    startup: float,
    single_ms: float,
    max_batch: int,
    gain: float,
    events: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the watcher's policy in simulated time.

    It runs in both modes, with the settings of this host: "target" starts as many workers as drain the queues
    in time, "threshold" starts one more while more than N tasks wait. An event is a failure, or what an
    administrator does, such as 600:fail:0 or 600:stop:1.
    """
    import orjson

    from gpuinfer.watcher.simulator.cluster import Model
    from gpuinfer.watcher.simulator.events import parse
    from gpuinfer.watcher.simulator.policy import Policy
    from gpuinfer.watcher.simulator.report import table, to_dict
    from gpuinfer.watcher.simulator.run import Scenario, play, step_s
    from gpuinfer.watcher.simulator.traces import PATTERNS, make, read

    if (trace is None) == (pattern is None):
        raise click.UsageError("give one of --trace FILE and --pattern NAME")
    if floor > gpus:
        raise click.UsageError(f"--floor {floor} must be at most --gpus {gpus}")
    happening = [parse(text, gpus) for text in events]
    model = Model(
        startup_s=startup, single_s=single_ms / 1000, max_batch=max_batch, gain=min(gain, float(max_batch))
    )
    settings = loaded.settings.watcher.model_copy(update={"floor": floor, "ceiling": gpus})
    if trace is not None:
        arrivals = read(trace, step_s(model))
    else:
        shape = next(one for one in PATTERNS if one == pattern)
        rate, step = gpus * model.rate, step_s(model)
        arrivals = make(shape, capacity=rate, seconds=seconds, step_s=step, seed=seed, load=load)
    made = Scenario(name=arrivals.name, trace=arrivals, gpus=gpus, floor=floor, model=model, seed=seed)
    modes = [settings.model_copy(update={"mode": mode}) for mode in ("target", "threshold")]
    outcomes = [play(made, Policy(mode, events=happening)) for mode in modes]
    if as_json:
        click.echo(orjson.dumps(to_dict(made, outcomes), option=orjson.OPT_INDENT_2))
    else:
        click.echo(table(made, outcomes))
