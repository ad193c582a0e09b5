# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer usage``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import click

from gpuinfer.cli_help import examples
from gpuinfer.queue.show import as_json_option, as_usage, print_json, print_table

if TYPE_CHECKING:
    from gpuinfer.queue.usage import Account
    from gpuinfer.settings import Loaded


@click.command(epilog=examples("gpuinfer usage --by key", "gpuinfer usage --by model --since 7d --json"))
@click.option(
    "--by", type=click.Choice(["key", "model"]), help="Sum by this only. Default: by key and model."
)
@click.option(
    "--since",
    metavar="SPAN",
    default="24h",
    show_default=True,
    help="Such as 90m, 24h or 7d; at most 35d. Whole hours (UTC) are counted.",
)
@as_json_option
@click.pass_obj
def usage(loaded: Loaded, by: Literal["key", "model"] | None, since: str, as_json: bool) -> None:
    """Show requests, bytes and device time by key and model.

    The API counts requests. Errors are invalid or failed requests; refused are those beyond a limit (429,
    503). The device time of a batch is divided among its inputs, and is counted at its end for the keys that
    submitted them. "-" means no key, or no known model: requests about tasks, unreadable ones, and those for
    an unknown model. Requests that name no model count for the default. Counts are updated once a second.
    """
    from gpuinfer.queue.connection import connect, typed_errors, user_of
    from gpuinfer.queue.usage import read, since_of

    with as_usage():
        seconds = since_of(since)
    with typed_errors(user_of(loaded.settings.broker)), connect(loaded.settings.broker) as client:
        found = read(client, seconds).by(by)
    if as_json:
        print_json(found.to_dict())
        return
    names: list[str] = [by] if by else ["key", "model"]
    rows = [_row(one, names) for one in found.accounts]
    began = datetime.fromtimestamp(found.since, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if not rows:
        click.echo(f"no usage since {began}")
        return
    click.echo(f"since {began}")
    print_table((*names, "requests", "errors", "refused", "received", "sent", "device seconds"), rows)


def _row(one: Account, names: list[str]) -> tuple[str, ...]:
    return (
        *(str(getattr(one, name)) for name in names),
        f"{one.requests:,}",
        f"{one.errors:,}",
        f"{one.refused:,}",
        _bytes(one.bytes_in),
        _bytes(one.bytes_out),
        f"{one.device_us / 1e6:,.3f}",
    )


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
