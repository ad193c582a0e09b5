# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer key``: make, list, show, revoke and rotate API keys on this host."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gpuinfer.cli_help import examples
from gpuinfer.errors import BadKey, BrokerError, ConfigError, UsageError
from gpuinfer.keys import key as keys
from gpuinfer.keys import options, showing, writing
from gpuinfer.keys.key import ROLES, Key
from gpuinfer.queue.show import as_json_option, print_json, print_table

if TYPE_CHECKING:
    import redis

    from gpuinfer.settings import Loaded

T = TypeVar("T")
_JOURNAL = Path("/run/systemd/journal/socket")


@click.group()
def key() -> None:
    """Make and revoke API keys.

    A key is a file in /etc/gpuinfer/keys.d (api.keys_dir). You may edit it; changes take effect within a
    second, without a restart. Without any key, only requests over loopback and the Unix socket are served.
    As soon as there is a key, requests over loopback need one, too.
    """


@key.command(
    epilog=examples(
        "gpuinfer key add shop",
        "gpuinfer key add lab --models resnet,digits --queues batch --rate 50/s --expires 90d",
        "gpuinfer key add prometheus --role read",
    )
)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="predict",
    show_default=True,
    help="predict: submit tasks and manage its own. read: view models, queues, workers, usage and metrics. "
    "admin: everything.",
)
@click.option(
    "--models",
    multiple=True,
    metavar="NAME,...",
    callback=options.field("models"),
    help="Models that the key may use. Default: all.",
)
@click.option(
    "--queues",
    multiple=True,
    metavar="NAME,...",
    callback=options.field("queues"),
    help="Queues that the key may use. Default: all.",
)
@click.option(
    "--rate",
    metavar="N/UNIT",
    callback=options.field("rate"),
    help="Maximum rate of submitted tasks: 50/s, 100/min or 1000/h.",
)
@click.option("--burst", type=click.IntRange(1, 10**9), help="Maximum tasks submitted at once; needs --rate.")
@click.option("--max-waiting", type=click.IntRange(1, 10**9), help="Maximum tasks waiting.")
@click.option(
    "--max-waiting-bytes",
    metavar="BYTES",
    callback=options.size,
    help="Maximum bytes of waiting tasks: 64M, 2G.",
)
@click.option(
    "--weight",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Share of the workers, relative to other keys with waiting tasks.",
)
@click.option(
    "--expires",
    metavar="TIME",
    callback=options.expires,
    help="When the key expires: 90d, 2027-01-31. Default: never.",
)
@as_json_option
@click.pass_obj
def add(loaded: Loaded, /, name: str, as_json: bool, **given: Any) -> None:
    """Make a key and print its token.

    Save the token: only its hash is stored, so it cannot be shown again.
    """
    folder = _folder(loaded)
    if given["burst"] and not given["rate"]:
        raise UsageError("needs --rate", "--burst")
    _checked(name)
    first = not writing.names(folder)
    token = keys.make_token()
    fields = {field: value for field, value in given.items() if value is not None}
    made = Key(
        name=name,
        sha256=keys.digest(token),
        prefix=keys.shown(token),
        created=float(int(time.time())),
        **fields,
    )
    writing.add(folder, made)
    _audit(loaded, "key_made", made)
    notes = ["requests over loopback now need a key, too; the Unix socket does not"] if first else []
    notes += _unknown_models(loaded, made.models)
    showing.print_token(made, token, notes, as_json=as_json)


@key.command("list", epilog=examples("gpuinfer key list", "gpuinfer key list --json"))
@as_json_option
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List the keys and when each was last used.

    Exit code 78: a key file is invalid; that key is refused.
    """
    folder = _folder(loaded)
    found, broken = _all(folder)
    used = _used(loaded)
    if as_json:
        print_json(
            {
                "keys": [showing.to_dict(one, used) for one in found],
                "broken": [{"file": file, "reason": reason} for file, reason in broken.items()],
            }
        )
    elif found:
        header = ("name", "role", "token", "limits", "models", "queues", "expires", "last used")
        print_table(header, [showing.row(one, used) for one in found])
    elif not broken:
        click.echo(f"no keys in {folder}; `gpuinfer key add NAME` makes one")
    if broken:
        raise BadKey("; ".join(f"{file}: {reason}" for file, reason in broken.items()), str(folder))


@key.command(epilog=examples("gpuinfer key show shop --json"))
@click.argument("name", shell_complete=options.names)
@as_json_option
@click.pass_obj
def show(loaded: Loaded, name: str, as_json: bool) -> None:
    """Show one key."""
    body = showing.to_dict(writing.load(_folder(loaded), _checked(name)), _used(loaded))
    if as_json:
        print_json(body)
        return
    for field, value in body.items():
        said = ", ".join(value) or "all" if isinstance(value, list) else value
        click.echo(f"{field.replace('_', ' ') + ':':<19}{'-' if said is None else said}")


@key.command(epilog=examples("gpuinfer key revoke shop"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=options.names)
@as_json_option
@click.pass_obj
def revoke(loaded: Loaded, names: Sequence[str], as_json: bool) -> None:
    """Remove keys.

    Requests with these keys are refused within a second. Tasks already submitted still run.
    """
    folder = _folder(loaded)
    there = writing.names(folder)
    for name in names:
        if _checked(name) not in there:
            raise writing.unknown(folder, name)
    for name in dict.fromkeys(names):
        writing.remove(folder, name)
        _audit(loaded, "key_revoked", name)
    left = len(writing.names(folder))
    if as_json:
        print_json({"revoked": list(dict.fromkeys(names)), "keys": left})
        return
    click.echo(f"revoked: {', '.join(dict.fromkeys(names))}")
    if not left:
        click.echo("no keys left: loopback needs no key, and requests from the network are refused")


@key.command(epilog=examples("gpuinfer key rotate shop", "gpuinfer key rotate shop --keep 1h"))
@click.argument("name", shell_complete=options.names)
@click.option(
    "--keep",
    metavar="SPAN",
    callback=options.span,
    help="How long the old token stays valid: 1h, 7d. Default: it is revoked at once.",
)
@click.option(
    "--expires",
    metavar="TIME",
    callback=options.expires,
    help="When the key expires: 90d, 2027-01-31. Default: unchanged.",
)
@as_json_option
@click.pass_obj
def rotate(loaded: Loaded, name: str, keep: float | None, expires: float | None, as_json: bool) -> None:
    """Give a key a new token and print it.

    The key's name, limits and tasks stay the same.
    """
    folder = _folder(loaded)
    old = writing.load(folder, _checked(name))
    token = keys.make_token()
    new = replace(
        old,
        sha256=keys.digest(token),
        prefix=keys.shown(token),
        expires=old.expires if expires is None else expires,
        old_sha256=old.sha256 if keep else "",
        old_expires=float(int(time.time() + keep)) if keep else None,
    )
    writing.replace(folder, new)
    _audit(loaded, "key_rotated", new)
    notes = [
        f"the old token is valid until {showing.day(new.old_expires)}" if keep else "the old token is refused"
    ]
    if new.expires is not None and new.expires <= time.time():
        notes.append(f"the key expired on {showing.day(new.expires)}: renew it with --expires")
    showing.print_token(new, token, notes, as_json=as_json)


# -- files, Redis, journal ------------------------------------------------------------------------


def _folder(loaded: Loaded) -> Path:
    return loaded.only("api").api.keys_dir


def _checked(name: str) -> str:
    """Return the name if it is valid. Raises UsageError."""
    try:
        return keys.checked_name(name)
    except BadKey as exc:
        raise UsageError(exc.message, "NAME") from None


def _all(folder: Path) -> tuple[list[Key], dict[str, str]]:
    """Return the valid keys, and for each invalid file the reason."""
    found, broken = [], {}
    for name in writing.names(folder):
        try:
            found.append(writing.load(folder, name))
        except BadKey as exc:
            broken[name + keys.SUFFIX] = exc.message
    return found, broken


def _used(loaded: Loaded) -> dict[str, float] | None:
    """Return name -> Unix time of last use, from Redis; None if Redis does not answer."""
    from gpuinfer.queue.keys import KEY_USED

    found: Any = _asked(loaded, lambda client: client.hgetall(KEY_USED))
    return None if found is None else {name.decode(): float(at) for name, at in found.items()}


def _unknown_models(loaded: Loaded, models: Sequence[str]) -> list[str]:
    """Return a note for each model unknown to the fleet; no notes if Redis does not answer."""
    from gpuinfer.queue import catalogue

    known = _asked(loaded, catalogue.names) if models else None
    if known is None:
        return []
    said = f"known: {', '.join(known) or 'none'}"
    return [f"the fleet knows no model {name!r} yet; {said}" for name in models if name not in known]


def _asked(loaded: Loaded, ask: Callable[[redis.Redis], T]) -> T | None:
    """Return Redis's answer; None if it does not answer."""
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    try:
        broker = loaded.settings.broker
        with typed_errors(user_of(broker)), connect(broker, retries=0) as client:
            return ask(client)
    except (BrokerError, ConfigError):
        return None


def _audit(loaded: Loaded, action: str, about: Key | str) -> None:
    """Log the change and the user to the journal, if there is one."""
    if not _JOURNAL.exists():
        return
    from gpuinfer.log import configure, get_logger

    configure(loaded.only("log").log.model_copy(update={"format": "journal"}), program="gpuinfer-key")
    fields: dict[str, Any] = {"key": about}
    if isinstance(about, Key):
        fields = {"key": about.name, "role": about.role, "token": f"{about.prefix}..."}
        fields |= {"expires": showing.day(about.expires)} if about.expires else {}
    get_logger(__name__).info(action, **fields, by=_person())


def _person() -> str:
    """Return the name of the calling user; under sudo, of the user who called it."""
    name = os.environ.get("SUDO_USER")
    if name:
        return name[:64]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
