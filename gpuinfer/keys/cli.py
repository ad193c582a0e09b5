# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer key``: make, list, show, revoke and rotate the keys of this host's front."""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from gpuinfer.cli_help import examples
from gpuinfer.errors import BadKey, BrokerError, GpuinferError, UsageError
from gpuinfer.keys import key as keys
from gpuinfer.keys import writing
from gpuinfer.keys.key import ROLES, Key
from gpuinfer.models.completion import setting
from gpuinfer.queue.show import as_json_option, print_json, print_table

if TYPE_CHECKING:
    import redis

    from gpuinfer.settings import Loaded

T = TypeVar("T")
_SPAN = re.compile(r"(\d{1,6})\s*(s|min|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]?)(?:iB|B)?")
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_FOLDER = Path("/etc/gpuinfer/keys.d")
_JOURNAL = Path("/run/systemd/journal/socket")


@click.group()
def key() -> None:
    """Make and revoke keys for applications on a network.

    A key is a file in /etc/gpuinfer/keys.d (api.keys_dir). It may be edited there; changes take effect within
    a second, without a restart. While there is no key, only requests by loopback and by the Unix socket are
    served. With the first key, loopback needs a key, too.
    """


# -- options ----------------------------------------------------------------------------------


def _names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of keys; silent where they cannot be read."""
    folder = Path(setting(ctx, "api", "keys_dir", str) or _FOLDER)
    try:
        return [CompletionItem(name) for name in writing.names(folder) if name.startswith(incomplete)]
    except (GpuinferError, ValueError):  # no name of a folder
        return []


def _read(field: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that reads an option as the field of a file. Raises BadParameter."""

    def read(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value is None or value == ():
            return None
        if isinstance(value, tuple):
            value = [name.strip() for text in value for name in text.split(",") if name.strip()]
        found, wrong = keys.read_fields({field: value})
        if wrong:
            raise click.BadParameter(wrong[0].removeprefix(f"{field} = "), param=parameter)
        return found[field]

    return read


def span(text: str) -> float | None:
    """Return the seconds of ``90s``, ``15min``, ``12h``, ``30d`` or ``2w``; None for what is none."""
    found = _SPAN.fullmatch(text.strip())
    return int(found[1]) * _SECONDS[found[2]] if found else None


def _span(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = span(text)
    if found is None:
        raise click.BadParameter(f"must be a span, as 15min, 12h or 30d, got {text!r}", param=parameter)
    return found


def _expires(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Read a span from now, or a date or time; one without a zone is in UTC. Raises BadParameter."""
    if text is None:
        return None
    found = span(text)
    if found is not None:
        return float(int(time.time() + found))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"must be a span or a time, as 30d, 2027-01-31 or 2027-01-31T12:00:00Z, got {text!r}",
            param=parameter,
        ) from None
    at = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if at <= time.time():
        raise click.BadParameter(f"{text} is past", param=parameter)
    return float(int(at))


def _bytes(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise click.BadParameter(
            f"must be a number of bytes, as 1000000, 64M or 2G, got {text!r}", param=parameter
        )
    return int(found[1]) << _SIZES[found[2]]


# -- commands -----------------------------------------------------------------------------------


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
    help="predict: submit tasks, and manage its own. read: models, queues, workers, usage and metrics. "
    "admin: everything.",
)
@click.option(
    "--models",
    multiple=True,
    metavar="NAME,...",
    callback=_read("models"),
    help="The models it may use. Default: all.",
)
@click.option(
    "--queues",
    multiple=True,
    metavar="NAME,...",
    callback=_read("queues"),
    help="The queues it may use. Default: all.",
)
@click.option(
    "--rate",
    metavar="N/UNIT",
    callback=_read("rate"),
    help="Most tasks it may submit: 50/s, 100/min or 1000/h.",
)
@click.option(
    "--burst", type=click.IntRange(1, 10**9), help="Most tasks it may submit at once; needs --rate."
)
@click.option("--max-waiting", type=click.IntRange(1, 10**9), help="Most tasks of this key that may wait.")
@click.option(
    "--max-waiting-bytes", metavar="BYTES", callback=_bytes, help="Most bytes of them, as 64M or 2G."
)
@click.option(
    "--weight",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Its share of the workers, relative to other keys whose tasks wait.",
)
@click.option(
    "--expires", metavar="TIME", callback=_expires, help="When it expires: 90d, 2027-01-31. Default: never."
)
@as_json_option
@click.pass_obj
def add(loaded: Loaded, /, name: str, as_json: bool, **given: Any) -> None:
    """Make a key and print its token.

    The token is stored nowhere: it cannot be shown again.
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
    notes = (
        ["from now on requests by loopback need a key, too; those by the Unix socket do not"] if first else []
    )
    notes += _unknown_models(loaded, made.models)
    _print_token(made, token, notes, as_json=as_json)


@key.command("list", epilog=examples("gpuinfer key list", "gpuinfer key list --json"))
@as_json_option
@click.pass_obj
def list_(loaded: Loaded, as_json: bool) -> None:
    """List the keys, with the time of their last use.

    Exit code 78: a file is broken, and its key is refused.
    """
    folder = _folder(loaded)
    found, broken = _all(folder)
    used = _used(loaded)
    if as_json:
        print_json(
            {
                "keys": [to_dict(one, used) for one in found],
                "broken": [{"file": file, "reason": reason} for file, reason in broken.items()],
            }
        )
    elif found:
        header = ("name", "role", "token", "limits", "models", "queues", "expires", "last used")
        print_table(header, [_row(one, used) for one in found])
    elif not broken:
        click.echo(f"no keys in {folder}; `gpuinfer key add NAME` makes one")
    if broken:
        raise BadKey("; ".join(f"{file}: {reason}" for file, reason in broken.items()), str(folder))


@key.command(epilog=examples("gpuinfer key show shop --json"))
@click.argument("name", shell_complete=_names)
@as_json_option
@click.pass_obj
def show(loaded: Loaded, name: str, as_json: bool) -> None:
    """Show one key."""
    body = to_dict(writing.load(_folder(loaded), _checked(name)), _used(loaded))
    if as_json:
        print_json(body)
        return
    for field, value in body.items():
        said = ", ".join(value) or "all" if isinstance(value, list) else value
        click.echo(f"{field.replace('_', ' ') + ':':<19}{'-' if said is None else said}")


@key.command(epilog=examples("gpuinfer key revoke shop"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=_names)
@as_json_option
@click.pass_obj
def revoke(loaded: Loaded, names: Sequence[str], as_json: bool) -> None:
    """Remove keys.

    Requests with them are refused within a second. Their waiting tasks still run.
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
        click.echo("no key is left: requests by loopback need none, and requests from a network are refused")


@key.command(epilog=examples("gpuinfer key rotate shop", "gpuinfer key rotate shop --keep 1h"))
@click.argument("name", shell_complete=_names)
@click.option(
    "--keep",
    metavar="SPAN",
    callback=_span,
    help="How long the old token stays valid: 1h, 7d. Default: not at all.",
)
@click.option(
    "--expires",
    metavar="TIME",
    callback=_expires,
    help="When the key expires: 90d, 2027-01-31. Default: as before.",
)
@as_json_option
@click.pass_obj
def rotate(loaded: Loaded, name: str, keep: float | None, expires: float | None, as_json: bool) -> None:
    """Give a key a new token, and print it.

    Everything else about the key stays as it is, including its tasks.
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
    notes = [f"the old token is valid until {_day(new.old_expires)}" if keep else "the old token is refused"]
    if new.expires is not None and new.expires <= time.time():
        notes.append(f"the key expired on {_day(new.expires)}: renew it with --expires")
    _print_token(new, token, notes, as_json=as_json)


# -- output -------------------------------------------------------------------------------------


def to_dict(one: Key, used: Mapping[str, float] | None) -> dict[str, Any]:
    """Return a key for JSON, without its hashes. ``used``: name -> Unix time of last use; None: not known."""
    at = None if used is None else used.get(one.name)
    return {
        "name": one.name,
        "role": one.role,
        "token": f"{one.prefix}..." if one.prefix else None,
        "models": list(one.models),
        "queues": list(one.queues),
        "rate": keys.rate_text(one.rate) if one.rate else None,
        "burst": one.burst or None,
        "max_waiting": one.max_waiting or None,
        "max_waiting_bytes": one.max_waiting_bytes or None,
        "weight": one.weight,
        "created": _day(one.created),
        "expires": _day(one.expires),
        "old_token_until": _day(one.old_expires),
        "last_used": _day(at),
    }


def _row(one: Key, used: Mapping[str, float] | None) -> tuple[str, ...]:
    limits = [keys.rate_text(one.rate)] if one.rate else []
    limits += [f"{one.max_waiting} waiting"] if one.max_waiting else []
    limits += [f"{one.max_waiting_bytes} B waiting"] if one.max_waiting_bytes else []
    limits += [f"weight {one.weight}"] if one.weight != 1 else []
    expired = one.expires is not None and one.expires <= time.time()
    return (
        one.name,
        one.role,
        f"{one.prefix}..." if one.prefix else "",
        ", ".join(limits) or "none",
        ", ".join(one.models) or "all",
        ", ".join(one.queues) or "all",
        "expired" if expired else _day(one.expires) or "never",
        "not known" if used is None else _day(used.get(one.name)) or "never",
    )


def _day(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _print_token(one: Key, token: str, notes: Sequence[str], *, as_json: bool) -> None:
    """Print the token on stdout, for ``TOKEN=$(gpuinfer key add shop)``, and everything else on stderr."""
    if as_json:
        print_json({**to_dict(one, {}), "token": token, "notes": list(notes)})
        return
    click.echo(token)
    click.echo(f"{one.name} ({one.role}) is valid within a second. Its token is not shown again:", err=True)
    click.echo("  curl -H 'Authorization: Bearer gpi_...' http://HOST:8080/models", err=True)
    for text in notes:
        click.echo(f"note: {text}", err=True)


# -- files, Redis, journal ------------------------------------------------------------------------


def _folder(loaded: Loaded) -> Path:
    return loaded.only("api").api.keys_dir


def _checked(name: str) -> str:
    """Return a key's name. Raises UsageError."""
    try:
        return keys.checked_name(name)
    except BadKey as exc:
        raise UsageError(exc.message, "NAME") from None


def _all(folder: Path) -> tuple[list[Key], dict[str, str]]:
    """Return the keys, and file -> what is wrong with it."""
    found, broken = [], {}
    for name in writing.names(folder):
        try:
            found.append(writing.load(folder, name))
        except BadKey as exc:
            broken[name + keys.SUFFIX] = exc.message
    return found, broken


def _used(loaded: Loaded) -> dict[str, float] | None:
    """Return name -> Unix time of last use, from Redis; None where it does not answer."""
    from gpuinfer.queue.keys import KEY_USED

    found: Any = _asked(loaded, lambda client: client.hgetall(KEY_USED))
    return None if found is None else {name.decode(): float(at) for name, at in found.items()}


def _unknown_models(loaded: Loaded, models: Sequence[str]) -> list[str]:
    """Return a note for each model that the fleet does not know; none where Redis does not answer."""
    from gpuinfer.queue import catalogue

    known = _asked(loaded, catalogue.names) if models else None
    if known is None:
        return []
    said = f"known: {', '.join(known) or 'none'}"
    return [f"the fleet knows no model {name!r} yet; {said}" for name in models if name not in known]


def _asked(loaded: Loaded, ask: Callable[[redis.Redis], T]) -> T | None:
    """Return Redis's answer; None where it does not answer."""
    from gpuinfer.errors import ConfigError
    from gpuinfer.queue.connection import connect, typed_errors, user_of

    try:
        broker = loaded.settings.broker
        with typed_errors(user_of(broker)), connect(broker, retries=0) as client:
            return ask(client)
    except (BrokerError, ConfigError):
        return None


def _audit(loaded: Loaded, action: str, about: Key | str) -> None:
    """Log what was done, and by which user, where there is a journal."""
    if not _JOURNAL.exists():
        return
    from gpuinfer.log import configure, get_logger

    configure(loaded.only("log").log.model_copy(update={"format": "journal"}), program="gpuinfer-key")
    fields: dict[str, Any] = {"key": about}
    if isinstance(about, Key):
        fields = {"key": about.name, "role": about.role, "token": f"{about.prefix}..."}
        fields |= {"expires": _day(about.expires)} if about.expires else {}
    get_logger(__name__).info(action, **fields, by=_person())


def _person() -> str:
    """Return who calls: behind sudo, who called that."""
    name = os.environ.get("SUDO_USER")
    if name:
        return name[:64]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
