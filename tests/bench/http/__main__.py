# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench.http [--peers FOLDER] [--seconds N] [--only NAME]``: the table in figures.md."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from tests.bench.http.load import load
from tests.bench.http.servers import Ours, Peer, Served, make_environment
from tests.bench.models import vectors, write_models

PEERS = ("litserve", "mosec")
CONNECTIONS = (64, 256, 1)


def measure(server: Served, seconds: int, folder: Path) -> None:
    """Print a line for each way and number of connections."""
    body = server.body(vectors(1)[0])
    for wait in (True, False):
        url = server.url(wait=wait)
        if url is None:
            continue
        load(url, body, 64, 1, folder)
        for connections in CONNECTIONS if wait else CONNECTIONS[:1]:
            before = server.front_s()
            found = load(url, body, connections, seconds, folder)
            after = server.front_s()
            cpu = ""
            if before is not None and after is not None:
                cpu = f"| {(after - before) / found.requests * 1e6:.0f} us"
            what = "submit and wait" if wait else "submit alone"
            click.echo(
                f"| {server.name} | {what}, {connections} | {found.rate:,.0f}/s "
                f"| {found.p50_us / 1000:.2f} ms | {found.p99_us / 1000:.2f} ms {cpu}|"
            )


@click.command()
@click.option("--peers", type=click.Path(path_type=Path), help="Keep the peers' environments here.")
@click.option("--seconds", default=5, show_default=True, help="Of each measure.")
@click.option("--only", type=click.Choice(["gpuinfer", *PEERS]), multiple=True)
@click.option("--processes", default=1, show_default=True, help="api.processes.")
def main(peers: Path | None, seconds: int, only: tuple[str, ...], processes: int) -> None:
    """Measure gpuinfer's front beside LitServe and mosec: the same model, one after the other."""
    with tempfile.TemporaryDirectory(prefix="gi-http-") as text:
        folder = Path(text)
        write_models(folder / "models")
        for name in only or ("gpuinfer", *PEERS):
            if name == "gpuinfer":
                server: Served = Ours(folder, processes)
            else:
                server = Peer(name, make_environment(name, peers or folder / "peers"), folder)
            with server:
                measure(server, seconds, folder)


if __name__ == "__main__":
    main()
