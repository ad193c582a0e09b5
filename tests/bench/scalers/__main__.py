# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench.scalers [NAMES...] [--markdown] [--json] [--plot FILE.png]``."""

from __future__ import annotations

from pathlib import Path

import click
import orjson

from tests.bench.scalers.players import compare
from tests.bench.scalers.report import comparison, markdown, medians, summary, table
from tests.bench.scalers.suite import SEEDS, suite

NAMES = [one.name for one in suite()]


@click.command(epilog="Traces: " + "; ".join(NAMES) + ". All of them without a name.")
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAMES]...")
@click.option(
    "--markdown", "as_markdown", is_flag=True, help="Print one line a trace, for packaging/doc/figures.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw it.")
def main(names: tuple[str, ...], as_markdown: bool, as_json: bool, plot: Path | None) -> None:
    """Run the watcher's policy, the usual tutorial's script, KEDA's Redis scaler and the HPA on fixed traces.

    Medians of three seeds. "bound" starts everything at the first task and stops nothing.
    """
    seeds = zip(*(suite(seed=seed) for seed in SEEDS), strict=True)
    done = [
        medians([comparison(one, compare(one)) for one in made])
        for made in seeds
        if not names or made[0].name in names
    ]
    if as_json:
        body = {"traces": [one.to_dict() for one in done], "summary": summary(done)}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2))
    else:
        click.echo(markdown(done) if as_markdown else table(done))
    if plot is not None:
        from tests.bench.scalers.plot import draw

        draw(done, plot)


if __name__ == "__main__":
    main()
