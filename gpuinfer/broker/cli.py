# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer redis``: what gpuinfer-redis.service asks for before it starts Redis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuinfer.settings import Loaded

FOLDER = Path("/run/gpuinfer/redis")
CREDENTIALS = Path("/etc/gpuinfer/credentials")
#: The administrator's own users, one line each as Redis's ACL files have them.
MORE_USERS = Path("/etc/gpuinfer/redis-users.acl")


@click.group(epilog="Example: gpuinfer redis show")
def redis() -> None:
    """Prepare this host's own Redis, and show what it is given."""


@redis.command()
@click.pass_obj
def show(loaded: Loaded) -> None:
    """Show what the next start of gpuinfer-redis.service takes from the settings."""
    from gpuinfer.broker.tuning import host_memory_bytes, render

    click.echo(render(loaded.settings.redis, host_memory_bytes()), nl=False)


@redis.command()
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.pass_obj
def prepare(loaded: Loaded, folder: Path) -> None:
    """Write tuning.conf and users.acl, which /etc/gpuinfer/redis.conf includes.

    Passwords come from $CREDENTIALS_DIRECTORY, else from /etc/gpuinfer/credentials.
    """
    from gpuinfer.broker import acl, tuning

    users = acl.render(passwords())
    if MORE_USERS.exists():
        users += _read(MORE_USERS).strip() + "\n"
    _write(folder / "tuning.conf", tuning.render(loaded.settings.redis, tuning.host_memory_bytes()))
    _write(folder / "users.acl", users)


@redis.command()
@click.pass_context
def local(ctx: click.Context) -> None:
    """Tell by the exit code whether broker.url is this host's own Redis: 0 yes, 1 no, 255 when unknown.

    systemd takes 1 to 254 from ExecCondition= for "not here", and 255 for a failure.
    """
    try:
        url = ctx.obj.settings.broker.url
    except ConfigError as exc:
        click.echo(f"gpuinfer: error: {exc}", err=True)
        ctx.exit(255)
    if not url.partition("://")[2].startswith(f"{FOLDER}/"):
        click.echo(f"broker.url is {url.rpartition('@')[2]}: this host has no Redis of its own to run")
        ctx.exit(1)


def passwords() -> Mapping[str, str]:
    """Read the users' passwords. Raises ConfigError naming the file that is missing or empty."""
    from gpuinfer.broker.acl import USERS

    folder = Path(os.environ.get("CREDENTIALS_DIRECTORY", CREDENTIALS))
    found = {user: _read(folder / user).strip() for user in USERS}
    for user, password in found.items():
        if not password:
            raise ConfigError("is empty; `dpkg-reconfigure gpuinfer` makes a new one", str(folder / user))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        hint = "; `dpkg-reconfigure gpuinfer` makes missing passwords"
        raise ConfigError(f"cannot be read: {exc.strerror or exc}{hint}", str(path)) from exc


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner alone."""
    new = path.with_name(path.name + ".new")
    try:
        new.touch(mode=0o600)
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as exc:
        raise ConfigError(f"cannot be written: {exc.strerror or exc}", str(path)) from exc
