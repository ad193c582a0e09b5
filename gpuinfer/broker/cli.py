# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer redis``: what gpuinfer-redis.service needs before it starts Redis, and an upgrade."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuinfer.errors import ConfigError
from gpuinfer.journal.sender import INFO, WARNING, say, say_error
from gpuinfer.queue.show import as_json_option, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuinfer.settings import Loaded, Settings


FOLDER = Path("/run/gpuinfer/redis")
CREDENTIALS = Path("/etc/gpuinfer/credentials")
#: The administrator's own users, one line each as Redis's ACL files have them.
MORE_USERS = Path("/etc/gpuinfer/redis-users.acl")
_FIX = "`dpkg-reconfigure gpuinfer` makes missing passwords"
#: Redis refuses to start with a user that is named twice.
_TAKEN = ("default", "admin", "api", "worker", "watcher")


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
    from gpuinfer.broker import acl, last_good, tuning

    settings, fault = last_good.settings(loaded)
    if fault:
        say(f"gpuinfer: warning: {fault}; Redis starts as it did last, until that is mended", WARNING)
    else:
        _tell_of_the_rest(loaded)
    users = acl.render(passwords(), _chain_queues(loaded, settings)) + more_users()
    _write(folder / "tuning.conf", tuning.render(settings.redis, tuning.host_memory_bytes()))
    _write(folder / "users.acl", users)


@redis.command("apply-users", epilog="Example: gpuinfer redis apply-users")
@as_json_option
@click.pass_obj
def apply_users(loaded: Loaded, as_json: bool) -> None:
    """Give the users of the running Redis the rights that this version needs, without a restart.

    Connections stay, and have the new rights at once; other users are not touched. An upgrade does this
    before it restarts the workers. Passwords come from $CREDENTIALS_DIRECTORY, else from
    /etc/gpuinfer/credentials.
    """
    from gpuinfer.broker import acl, last_good
    from gpuinfer.queue.connection import connect, typed_errors

    found = passwords()
    login = {"username": "admin", "password": found["admin"]}
    settings, fault = last_good.settings(loaded)
    if fault:
        say(f"gpuinfer: warning: {fault}; taken from Redis's last start", WARNING)
    broker = type(settings.broker).model_validate(settings.broker.model_dump() | login)
    with typed_errors(), connect(broker, any_format=True) as client:
        changed = acl.apply(client, found, _chain_queues(loaded, settings))
    if as_json:
        print_json({"users": list(acl.USERS), "changed": changed})
    else:
        click.echo(
            f"new rights for {', '.join(changed)}" if changed else "all users have their rights already"
        )


@redis.command(epilog="Examples: gpuinfer redis migrate; gpuinfer redis migrate --json")
@as_json_option
@click.pass_obj
def migrate(loaded: Loaded, as_json: bool) -> None:
    """Change what an older edition left in Redis to this edition's format.

    Nothing of gpuinfer may run meanwhile. There is one format so far, so there is nothing to change. Exit
    code 78: Redis has a format that this edition does not know. Messages in Celery's own format stay.
    """
    from gpuinfer.queue import format as layout
    from gpuinfer.queue import keys
    from gpuinfer.queue.connection import connect, typed_errors

    with typed_errors(), connect(loaded.settings.broker, any_format=True) as client:
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


@redis.command()
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


def passwords() -> Mapping[str, str]:
    """Read the users' passwords. Raises ConfigError naming the file that is missing or empty."""
    from gpuinfer.broker.acl import USERS

    folder = Path(os.environ.get("CREDENTIALS_DIRECTORY", CREDENTIALS))
    found = {user: _read(folder / user, f"; {_FIX}").strip() for user in USERS}
    for user, password in found.items():
        if not password:
            raise ConfigError(f"is empty; {_FIX}", str(folder / user))
    return found


def more_users() -> str:
    """Return the administrator's own users, without comments, which Redis would refuse to start with.

    Raises ConfigError naming the line that is no user of his own.
    """
    if not MORE_USERS.exists():
        return ""
    lines = []
    for number, line in enumerate(_read(MORE_USERS).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] != "user" or len(words) < 2 or words[1] in _TAKEN:
            wanted = f"must be `user NAME RULES...`, with another name than {', '.join(_TAKEN)}"
            raise ConfigError(f"line {number} {wanted}", str(MORE_USERS))
        lines.append(line.strip() + "\n")
    return "".join(lines)


def _read(path: Path, hint: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"cannot be read: {reason}{hint}", str(path)) from exc


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
