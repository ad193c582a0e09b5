# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer redis``: what gpuinfer-redis.service needs before it starts Redis, and an upgrade."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import ConfigError, NotPermitted
from gpuinfer.journal.sender import INFO, WARNING, say, say_error, say_warning
from gpuinfer.queue.show import as_json_option, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis import client

    from gpuinfer.broker.durability import Choice
    from gpuinfer.broker.more_users import Users
    from gpuinfer.settings import Loaded, Settings


EX_TEMPFAIL = 75
FOLDER = Path("/run/gpuinfer/redis")
#: The administrator's own users, one line each as Redis's ACL files have them.
MORE_USERS = Path("/etc/gpuinfer/redis-users.acl")


@click.group()
def redis() -> None:
    """Prepare this host's own Redis, and show what it is given."""


@redis.command(epilog=examples("gpuinfer redis show"))
@click.pass_obj
def show(loaded: Loaded) -> None:
    """Show what the next start of gpuinfer-redis.service takes from the settings."""
    from gpuinfer.broker import durability
    from gpuinfer.broker.tuning import host_memory_bytes, render

    settings = loaded.settings.redis
    choice = durability.planned(settings, durability.folder_of())
    click.echo(render(settings, host_memory_bytes(), choice), nl=False)


@redis.command(epilog=examples("gpuinfer redis prepare", "gpuinfer redis prepare --measure"))
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Where Redis keeps its file. Default: as redis.conf says."
)
@click.option("--measure", is_flag=True, help="Measure the disk's fsync again, for appendfsync = auto.")
@click.pass_obj
def prepare(loaded: Loaded, folder: Path, data: Path | None, measure: bool) -> None:
    """Write tuning.conf and users.acl, which /etc/gpuinfer/redis.conf includes.

    Passwords come from $CREDENTIALS_DIRECTORY, else from /etc/gpuinfer/credentials. Where redis.appendfsync
    is auto, the disk's fsync is measured once. Under always it waits until the disk has room (exit 75).
    """
    from gpuinfer.broker import acl, last_good, passwords, room, tuning
    from gpuinfer.queue.connection import DURABILITY

    settings, fault = last_good.settings(loaded)
    if fault:
        say(f"gpuinfer: warning: {fault}; Redis starts as it did last, until that is fixed", WARNING)
    else:
        _tell_of_the_rest(loaded)
    users = acl.render(passwords.read(), _chain_queues(loaded, settings), passwords.older()) + _their_lines()
    choice = _durability(settings, folder, data, again=measure)
    _write(folder / "tuning.conf", tuning.render(settings.redis, tuning.host_memory_bytes(), choice))
    _write(folder / "users.acl", users)
    room.leave(folder / DURABILITY, choice.mode)  # for the front's metrics


@redis.command("apply-users", epilog=examples("gpuinfer redis apply-users"))
@as_json_option
@click.pass_obj
def apply_users(loaded: Loaded, as_json: bool) -> None:
    """Give the users of the running Redis the rights that this version needs, without a restart.

    Connections stay, and have the new rights at once; other users are not touched. An upgrade does this
    before it restarts the workers. Passwords come from $CREDENTIALS_DIRECTORY, else from
    /etc/gpuinfer/credentials.
    """
    from gpuinfer.broker import acl, passwords

    found = passwords.read()
    with _as_admin(loaded, found) as (client, settings):
        changed = acl.apply(client, found, _chain_queues(loaded, settings), passwords.older())
    if as_json:
        print_json({"users": list(acl.USERS), "changed": changed})
    else:
        click.echo(
            f"new rights for {', '.join(changed)}" if changed else "all users have their rights already"
        )


@redis.command(
    "rotate-password",
    epilog=examples("gpuinfer redis rotate-password worker", "gpuinfer redis rotate-password api --drop-old"),
)
@click.argument("user", type=click.Choice(["admin", "api", "worker", "watcher", "operator", "viewer"]))
@click.option("--drop-old", is_flag=True, help="Make no new one: forget the old ones now.")
@as_json_option
@click.pass_obj
def rotate_password(loaded: Loaded, user: str, drop_old: bool, as_json: bool) -> int:
    """Give a Redis user a new password, as root on Redis's host, while all goes on.

    Redis learns the new one beside the old; each unit that logs in with it is restarted, workers one after
    the other by gpuinfer-roll.service; then Redis forgets the old. Exit code 75: a unit did not come back, or
    a connection from another host still has the old one, which goes on to count: copy the file there,
    restart, and call --drop-old.
    """
    from gpuinfer.broker import rotation

    if os.geteuid() != 0:
        raise NotPermitted(f"only root may change the password of Redis's user {user}", "rotate-password")
    say_step = partial(click.echo, err=as_json)
    with _as_admin(loaded) as (client, _):
        done = rotation.drop_old(client, user) if drop_old else rotation.rotate(client, user, say_step)
    if as_json:
        print_json(done.to_dict())
    else:
        click.echo(done.told())
    return 0 if done.complete else EX_TEMPFAIL


@redis.command(epilog=examples("gpuinfer redis migrate", "gpuinfer redis migrate --json"))
@as_json_option
@click.pass_obj
def migrate(loaded: Loaded, as_json: bool) -> None:
    """Change what an older edition left in Redis to this edition's format.

    Nothing of gpuinfer may run meanwhile. There is one format so far, so there is nothing to change. Exit
    code 78: Redis has a format that this edition does not know. Messages in Celery's own format stay.
    """
    from gpuinfer.queue import format as layout
    from gpuinfer.queue import keys
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with (
        typed_errors(user_of(loaded.settings.broker)),
        connect(loaded.settings.broker, any_format=True) as client,
    ):
        number: bytes | None = client.get(keys.FORMAT_KEY)
    layout.check(number)  # where a later edition changes what it knows
    found = int(number) if number else None
    if as_json:
        print_json({"format": keys.FORMAT, "found": found, "changed": False})
    elif found is None:
        click.echo(
            f"nothing to do: Redis has no format yet; the first worker or watcher makes it {keys.FORMAT}"
        )
    else:
        click.echo(f"nothing to do: Redis has format {found}, which is this edition's")


@redis.command(epilog=examples("gpuinfer redis local && systemctl status gpuinfer-redis"))
@click.pass_context
def local(ctx: click.Context) -> None:
    """Tell by the exit code whether broker.url is this host's own Redis: 0 yes, 1 no, 255 when unknown.

    systemd takes 1 to 254 from ExecCondition= for "not here", and 255 for a failure.
    """
    from gpuinfer.broker import last_good

    try:
        settings, fault = last_good.settings(ctx.obj)
    except ConfigError as exc:
        say_error(str(exc))
        ctx.exit(255)
    if not fault:  # else `prepare` says so
        _keep(ctx.obj)
    url = settings.broker.url
    if not url.rpartition("@")[2].rpartition("://")[2].startswith(f"{FOLDER}/"):
        from gpuinfer.settings import shown

        say(f"broker.url is {shown('broker.url', url)}: this host has no Redis of its own to run", INFO)
        ctx.exit(1)


@contextmanager
def _as_admin(
    loaded: Loaded, found: Mapping[str, str] | None = None
) -> Iterator[tuple[client.Redis, Settings]]:
    """Connect to Redis as its administrator, by what it was started with where the settings are wrong."""
    from gpuinfer.broker import last_good, passwords
    from gpuinfer.queue.connection import connect, typed_errors

    login = {"username": "admin", "password": (found or passwords.read())["admin"]}
    settings, fault = last_good.settings(loaded)
    if fault:
        say(f"gpuinfer: warning: {fault}; taken from Redis's last start", WARNING)
    broker = type(settings.broker).model_validate(settings.broker.model_dump() | login)
    with typed_errors("admin"), connect(broker, any_format=True) as connected:
        yield connected, settings


def _durability(settings: Settings, folder: Path, data: Path | None, *, again: bool) -> Choice:
    """Decide how Redis writes, say what that means, and wait for the room that it needs. Raises DiskFull."""
    from gpuinfer.broker import durability, room

    data = data or durability.folder_of()
    choice, before = durability.decide(settings.redis, data, again=again)
    if before:
        say_warning(f"durability has changed: {choice}; it was {before}")
    else:
        say(f"gpuinfer: {choice}", INFO)
    if choice.mode == "always":
        room.wait_for_room(data, folder / room.NOTICE)
    return choice


def _chain_queues(loaded: Loaded, last: Settings) -> Sequence[str]:
    """Return where chains may go on; with a mistake in that section, where they might at the last start."""
    try:
        return loaded.only("queue").queue.foreign_queues
    except ConfigError:  # _tell_of_the_rest says what is wrong
        return last.queue.foreign_queues


def _keep(loaded: Loaded) -> None:
    from gpuinfer.broker import last_good

    try:
        last_good.keep(loaded)
    except OSError as exc:
        say(f"gpuinfer: warning: {last_good.FILE} cannot be written: {exc.strerror or exc}", WARNING)


def _tell_of_the_rest(loaded: Loaded) -> None:
    """Say what is wrong in the other sections, which others will not start with."""
    try:
        _ = loaded.settings
    except ConfigError as exc:
        say(f"gpuinfer: warning: {exc}", WARNING)


def more_users() -> Users:
    """Return the administrator's own users, and which lines Redis would reject. Raises ConfigError."""
    from gpuinfer.broker.more_users import read

    handed = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / MORE_USERS.name
    path = handed if handed.exists() else MORE_USERS
    try:
        return read(path.read_text(encoding="utf-8")) if path.exists() else read("")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"cannot be read: {getattr(exc, 'strerror', None) or exc}", str(MORE_USERS)
        ) from exc


def _their_lines() -> str:
    """Return the administrator's own users; a line that Redis rejects is named, and left out."""
    try:
        found = more_users()
    except ConfigError as exc:
        say(f"gpuinfer: warning: {exc}; its users are unknown", WARNING)
        return ""
    for fault in found.faults:
        say(f"gpuinfer: warning: {MORE_USERS}: {fault}; this line is left out", WARNING)
    return "".join(f"{line}\n" for line in found.lines)


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner alone.

    What lies in the place of the new one goes first: no link there is followed.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        number = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    except OSError as exc:
        raise ConfigError(f"cannot be written: {exc.strerror or exc}", str(path)) from exc
