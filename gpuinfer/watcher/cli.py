# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer watcher``: run it, ask it for its reasons, and try its policy in simulated time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples

if TYPE_CHECKING:
    from gpuinfer.settings import Loaded
    from gpuinfer.watcher.simulator.cluster import Model
    from gpuinfer.watcher.simulator.run import Scenario


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

    settings = loaded.settings
    configure(settings.log, program="gpuinfer-watcher")
    asyncio.run(serve(settings, dry_run=dry_run))


@watcher.command(epilog=examples("gpuinfer watcher explain --last 5"))
@click.option(
    "--last", type=click.IntRange(1, 500), default=10, show_default=True, help="How many decisions."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def explain(loaded: Loaded, last: int, as_json: bool) -> None:
    """Print what each host's watcher decides just now, and the last decisions, the newest first.

    A decision says what was done, from which numbers, and why. The journal has them too, for longer:
    journalctl -u gpuinfer-watcher.
    """
    from datetime import UTC, datetime

    import orjson

    from gpuinfer.queue.connection import connect, typed_errors, user_of
    from gpuinfer.queue.fleet import HOSTS
    from gpuinfer.watcher.notes import present, told
    from gpuinfer.watcher.probe import DECISIONS

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
        click.echo("no decision yet: no watcher has looked")


@watcher.command(
    epilog=examples("gpuinfer watcher simulate --pattern flash --gpus 8 --plot flash.png"),
)
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="CSV lines second,tasks[,queue]."
)
@click.option("--pattern", type=click.Choice(["burst", "diurnal", "flash", "poisson"]), help="A made trace.")
@click.option("--suite", is_flag=True, help="The fixed set of traces; medians of three seeds.")
@click.option("--gpus", type=click.IntRange(1, 10_000), default=8, show_default=True)
@click.option("--floor", type=click.IntRange(0, 10_000), default=0, show_default=True, help="Least workers.")
@click.option(
    "--load", type=click.FloatRange(0, 10), help="Share of all GPUs that a pattern asks for; flash: its peak."
)
@click.option(
    "--seconds",
    type=click.FloatRange(120, 7 * 86400),
    default=3600,
    show_default=True,
    help="A pattern's length.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option(
    "--startup", type=click.FloatRange(0.1, 3600), default=12, show_default=True, help="Seconds until ready."
)
@click.option(
    "--single-ms", type=click.FloatRange(1, 600_000), default=40, show_default=True, help="One task alone."
)
@click.option("--max-batch", type=click.IntRange(1, 65536), default=32, show_default=True)
@click.option(
    "--gain",
    type=click.FloatRange(1, 65536),
    default=8,
    show_default=True,
    help="How many times more a full batch serves; at most --max-batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print one line a trace, for a README.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw it.")
@click.pass_obj
def simulate(
    loaded: Loaded,
    trace: Path | None,
    pattern: str | None,
    suite: bool,
    gpus: int,
    floor: int,
    load: float | None,
    seconds: float,
    seed: int,
    startup: float,
    single_ms: float,
    max_batch: int,
    gain: float,
    as_json: bool,
    as_markdown: bool,
    plot: Path | None,
) -> None:
    """Run the watcher's very policy in simulated time, beside what others do.

    The others: the usual tutorial's script (every 10 s, more than 50 waiting, at most 4, never down), KEDA's
    Redis scaler and the HPA, both with their defaults. "bound" starts everything at once and stops nothing.
    """
    from gpuinfer.watcher.simulator.cluster import Model
    from gpuinfer.watcher.simulator.report import comparison, markdown, medians, summary, table
    from gpuinfer.watcher.simulator.run import compare

    if [trace is not None, pattern is not None, suite].count(True) != 1:
        raise click.UsageError("give one of --trace FILE, --pattern NAME and --suite")
    if floor > gpus:
        raise click.UsageError(f"--floor {floor} must be at most --gpus {gpus}")
    model = Model(
        startup_s=startup, single_s=single_ms / 1000, max_batch=max_batch, gain=min(gain, float(max_batch))
    )
    settings = loaded.settings.watcher
    if suite:
        runs = [[comparison(one, compare(one)) for one in made] for made in _suite(loaded, startup)]
        done = [medians(of_one) for of_one in runs]
    elif trace is not None:
        read = _from_file(loaded, trace, gpus, floor, seed, model)
        done = [comparison(read, compare(read))]
    else:
        from gpuinfer.watcher.simulator.suite import scenario

        made = scenario(
            pattern,  # type: ignore[arg-type]  # one of the patterns, says click
            gpus=gpus,
            floor=floor,
            load=load,
            seconds=seconds,
            model=model,
            seed=seed,
            settings=settings,
        )
        done = [comparison(made, compare(made))]
    if as_json:
        import orjson

        body = {"traces": [one.to_dict() for one in done], "summary": summary(done)}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2))
    else:
        click.echo(markdown(done) if as_markdown else table(done))
    if plot is not None:
        from gpuinfer.watcher.simulator.plot import draw

        draw(done, plot)


def _suite(loaded: Loaded, startup: float) -> list[list[Scenario]]:
    """Return each trace with all seeds."""
    from gpuinfer.watcher.simulator.suite import SEEDS, suite

    made = [suite(loaded.settings.watcher, seed) for seed in SEEDS]
    return [
        [replace(one, model=replace(one.model, startup_s=startup)) for one in seeds]
        for seeds in zip(*made, strict=True)
    ]


def _from_file(loaded: Loaded, file: Path, gpus: int, floor: int, seed: int, model: Model) -> Scenario:
    from gpuinfer.watcher.simulator.run import Scenario
    from gpuinfer.watcher.simulator.suite import step_s
    from gpuinfer.watcher.simulator.traces import read

    trace = read(file, step_s(model))
    return Scenario(
        name=trace.name,
        trace=trace,
        gpus=gpus,
        floor=floor,
        model=model,
        seed=seed,
        settings=loaded.settings.watcher,
    )
