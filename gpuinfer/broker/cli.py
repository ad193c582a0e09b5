# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer redis``: what gpuinfer-redis.service runs before Redis, and what an upgrade runs."""

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


FOLDER = Path("/run/gpuinfer/redis")
#: The administrator's own users, one line each as Redis's ACL files have them.
MORE_USERS = Path("/etc/gpuinfer/redis-users.acl")


@click.group()
def redis() -> None:
    """Manage this host's own Redis."""


@redis.command(epilog=examples("gpuinfer redis show"))
@click.pass_obj
def show(loaded: Loaded) -> None:
    """Print the tuning.conf of the next start.

    It is what gpuinfer-redis.service takes from the settings.
    """
    from gpuinfer.broker import durability
    from gpuinfer.broker.tuning import host_memory_bytes, render

    settings = loaded.settings.redis
    choice = durability.planned(settings, durability.folder_of())
    click.echo(render(settings, host_memory_bytes(), choice), nl=False)


@redis.command(epilog=examples("gpuinfer redis prepare", "gpuinfer redis prepare --measure"))
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=FOLDER,
    show_default=True,
    help="Where the files are written.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Redis's data folder. Default: as in redis.conf."
)
@click.option("--measure", is_flag=True, help="Measure the disk's fsync again, for appendfsync = auto.")
@click.pass_obj
def prepare(loaded: Loaded, folder: Path, data: Path | None, measure: bool) -> None:
    """Write the files that redis.conf includes.

    They are tuning.conf and users.acl. Passwords come from $CREDENTIALS_DIRECTORY, else from
    /etc/gpuinfer/credentials. Where redis.appendfsync is auto, the disk's fsync is measured once. Under
    always the command waits until the disk has free space. Exit code 75: it still has none.
    """
    from gpuinfer.broker import acl, last_good, passwords, room, tuning
    from gpuinfer.queue.connection import DURABILITY

    loaded = loaded.when_written()
    settings, fault = last_good.settings(loaded)
    if fault:
        say(
            f"gpuinfer: warning: {fault}; Redis starts with its last good settings until that is fixed",
            WARNING,
        )
    else:
        _tell_of_the_rest(loaded)
    users = acl.render(passwords.read(), _chain_queues(loaded, settings), passwords.older())
    users += "".join(f"{line}\n" for line in _their_lines())
    choice = _durability(settings, folder, data, again=measure)
    _write(folder / "tuning.conf", tuning.render(settings.redis, tuning.host_memory_bytes(), choice))
    _write(folder / "users.acl", users)
    room.leave(folder / DURABILITY, choice.mode)  # for the front's metrics


@redis.command("apply-users", epilog=examples("gpuinfer redis apply-users"))
@as_json_option
@click.pass_obj
def apply_users(loaded: Loaded, as_json: bool) -> None:
    """Give the running Redis the users in its files.

    They are gpuinfer's own, and those of /etc/gpuinfer/redis-users.acl. Rights and passwords take effect
    without a restart, also for open connections. A user that no file names is not changed. An upgrade does
    this before it restarts the workers. Passwords come from $CREDENTIALS_DIRECTORY, else from
    /etc/gpuinfer/credentials.
    """
    from gpuinfer.broker import acl, passwords

    found, theirs = passwords.read(), {words[1]: words[2:] for words in map(str.split, _their_lines())}
    with _as_admin(loaded, found) as (client, settings):
        queues = _chain_queues(loaded, settings)
        changed = acl.apply(client, found, queues, passwords.older(), theirs)
    if as_json:
        print_json({"users": [*acl.USERS, *theirs], "changed": changed})
    else:
        click.echo(
            f"new rights for {', '.join(changed)}" if changed else "all users have these rights already"
        )


@redis.command("apply-settings", epilog=examples("gpuinfer redis apply-settings"))
@as_json_option
@click.pass_obj
def apply_settings(loaded: Loaded, as_json: bool) -> None:
    """Give the running Redis the limits in [redis].

    They are maxmemory and appendfsync, and take effect without a restart. A line of redis.conf wins over the
    settings, as at a start. Where appendfsync is auto and the disk was never measured, it stays as it is: the
    next start measures.
    """
    from gpuinfer.broker import durability, tuning

    with _as_admin(loaded) as (client, settings):
        choice = durability.planned(settings.redis, durability.folder_of())
        wanted = tuning.values(settings.redis, tuning.host_memory_bytes(), choice)
        if not choice.decided:  # what runs may be the better one
            del wanted["appendfsync"]
            say("gpuinfer: appendfsync stays as it is: the next start measures the disk and chooses", INFO)
        changed = tuning.apply(client, wanted)
    if as_json:
        print_json({"changed": changed})
    elif changed:
        click.echo("\n".join(f"{key} is {value} now" for key, value in changed.items()))
    else:
        click.echo("Redis runs with these settings already")


@redis.command(
    "rotate-password",
    epilog=examples("gpuinfer redis rotate-password worker", "gpuinfer redis rotate-password api --drop-old"),
)
@click.argument(
    "user", metavar="USER", type=click.Choice(["admin", "api", "worker", "watcher", "operator", "viewer"])
)
@click.option("--drop-old", is_flag=True, help="Make no new password; make Redis forget the old ones.")
@as_json_option
@click.pass_obj
def rotate_password(loaded: Loaded, user: str, drop_old: bool, as_json: bool) -> int:
    """Give a Redis user a new password.

    USER is admin, api, worker, watcher, operator or viewer. Run it as root on Redis's host; the service is
    not interrupted. Redis accepts the new password beside the old one, each unit that logs in with it is
    restarted (workers one after the other, by gpuinfer-roll.service), then Redis forgets the old one. Exit
    code 75: a unit did not come back, or a connection from another host uses the old password, which stays
    valid. Then copy the password file there, restart, and call --drop-old.
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
    return 0 if done.complete else os.EX_TEMPFAIL


@redis.command(epilog=examples("gpuinfer redis migrate", "gpuinfer redis migrate --json"))
@as_json_option
@click.pass_obj
def migrate(loaded: Loaded, as_json: bool) -> None:
    """Convert data in Redis to the format of this version.

    Stop all of gpuinfer first. There is one format so far, so there is nothing to convert. Exit code 78:
    Redis has a format that this version does not know. Messages in Celery's own format are not changed.
    """
    from gpuinfer.queue import format as layout
    from gpuinfer.queue import keys
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    with (
        typed_errors(user_of(loaded.settings.broker)),
        connect(loaded.settings.broker, any_format=True) as client,
    ):
        number: bytes | None = client.get(keys.FORMAT_KEY)
    layout.check(number)  # a later version converts here
    found = int(number) if number else None
    if as_json:
        print_json({"format": keys.FORMAT, "found": found, "changed": False})
    elif found is None:
        click.echo(
            f"nothing to do: Redis has no format yet; the first worker or watcher makes it {keys.FORMAT}"
        )
    else:
        click.echo(f"nothing to do: Redis has format {found}, that of this version")


@redis.command(epilog=examples("gpuinfer redis local && systemctl status gpuinfer-redis"))
@click.pass_context
def local(ctx: click.Context) -> None:
    """Test whether broker.url is this host's own Redis.

    Exit code 0: it is. 1: it is not. 255: the settings cannot be read. systemd skips a unit whose
    ExecCondition= exits with 1 to 254, and fails it for 255.
    """
    from gpuinfer.broker import last_good

    loaded: Loaded = ctx.obj.when_written()
    try:
        settings, fault = last_good.settings(loaded)
    except ConfigError as exc:
        say_error(str(exc))
        ctx.exit(255)
    if not fault:  # else `prepare` says so
        _keep(loaded)
    url = settings.broker.url
    if not url.rpartition("@")[2].rpartition("://")[2].startswith(f"{FOLDER}/"):
        from gpuinfer.settings import shown

        say(f"broker.url is {shown('broker.url', url)}: this host does not run its own Redis", INFO)
        ctx.exit(1)


@contextmanager
def _as_admin(
    loaded: Loaded, found: Mapping[str, str] | None = None
) -> Iterator[tuple[client.Redis, Settings]]:
    """Connect to Redis as its administrator; with wrong settings, use those of its last start."""
    from gpuinfer.broker import last_good, passwords
    from gpuinfer.queue.connection import connect, typed_errors

    login = {"username": "admin", "password": (found or passwords.read())["admin"]}
    settings, fault = last_good.settings(loaded)
    if fault:
        say(f"gpuinfer: warning: {fault}; using the settings of Redis's last start", WARNING)
    broker = type(settings.broker).model_validate(settings.broker.model_dump() | login)
    with typed_errors("admin"), connect(broker, any_format=True) as connected:
        yield connected, settings


def _durability(settings: Settings, folder: Path, data: Path | None, *, again: bool) -> Choice:
    """Choose appendfsync, log what it means, and wait for the free space that it needs. Raises DiskFull."""
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
    """Return the queues to which chains may send; those of the last start where the section is wrong."""
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
    """Log what is wrong in the other sections: the other units will not start with it."""
    try:
        _ = loaded.settings
    except ConfigError as exc:
        say(f"gpuinfer: warning: {exc}", WARNING)


def more_users() -> Users:
    """Return the administrator's own users, and the lines that Redis would reject. Raises ConfigError."""
    from gpuinfer.broker.more_users import read

    handed = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / MORE_USERS.name
    path = handed if handed.exists() else MORE_USERS
    try:
        return read(path.read_text(encoding="utf-8")) if path.exists() else read("")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"cannot be read: {getattr(exc, 'strerror', None) or exc}", str(MORE_USERS)
        ) from exc


def _their_lines() -> list[str]:
    """Return the lines of the administrator's own users. One that Redis rejects is logged and left out."""
    try:
        found = more_users()
    except ConfigError as exc:
        say(f"gpuinfer: warning: {exc}; none of its users can log in", WARNING)
        return []
    for fault in found.faults:
        say(f"gpuinfer: warning: {MORE_USERS}: {fault}; this line is left out", WARNING)
    return found.lines


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, readable by its owner only.

    A file or link with the name of the temporary file is deleted first, so that no link is followed.
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
