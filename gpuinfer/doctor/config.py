# SPDX-License-Identifier: Apache-2.0
"""The settings, and the files of passwords."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.errors import ConfigError

CREDENTIALS = "/etc/gpuinfer/credentials"
LOGINS = "/etc/gpuinfer/logins"
#: Redis's users, of whom the administrator may be another host's; and who logs in to Flower.
USERS = ("admin", "api", "worker", "watcher", "flower")
#: Each for the members of its group.
PEOPLE = ("operator", "viewer")
_MIN_PASSWORD_BYTES = 16


def file(host: Host) -> Finding:
    """The settings file, the variables and the credentials are valid."""
    try:
        changed = len(host.loaded.origins)
    except ConfigError as exc:
        where = exc.field or exc.message.partition(":")[0]
        fix = edit(where) if where.startswith("/") else f"unset {where}"
        return error(str(exc), f"{fix} && gpuinfer config check")
    return ok(f"settings are valid, {changed} of them changed")


def credentials(host: Host) -> Findings:
    """The passwords of Redis's users and of Flower are there, and root's alone."""
    folder = host.path(CREDENTIALS)
    if not folder.exists():
        raise Skipped(f"{CREDENTIALS} is not there: the package is not installed")
    try:
        users = _users(host, folder)
        found = [*_modes(folder, CREDENTIALS, 0o700), *_files(folder, users), *_logins(host)]
    except PermissionError:
        raise Skipped(f"only root may look into {CREDENTIALS}") from None
    return found or ok(f"{len(users)} passwords, readable by root alone")


def _users(host: Host, folder: Path) -> Sequence[str]:
    """Return whose passwords are looked for: the administrator's may stay with Redis's host."""
    try:
        own = place_of(host.settings.broker).ours
    except Skipped:
        own = True
    return USERS if own or (folder / "admin").exists() else USERS[1:]


def _files(folder: Path, users: Sequence[str]) -> Iterator[Finding]:
    for user in users:
        path, shown = folder / user, f"{CREDENTIALS}/{user}"
        if not path.exists():
            yield error(f"{shown} is missing", "dpkg-reconfigure gpuinfer")
            continue
        yield from _modes(path, shown, 0o600)
        if path.stat().st_size < _MIN_PASSWORD_BYTES:
            yield error(
                f"{shown} holds no password",
                f"openssl rand -hex 32 > {shown} && systemctl restart gpuinfer-redis gpuinfer.target",
            )


def _logins(host: Host) -> Iterator[Finding]:
    for user in PEOPLE:
        path = host.path(LOGINS) / user
        if path.exists():
            yield from _modes(path, f"{LOGINS}/{user}", 0o640)


def _modes(path: Path, shown: str, wanted: int) -> Iterator[Finding]:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~wanted:
        yield error(f"{shown} has mode {mode:04o}: others may read passwords", f"chmod {wanted:04o} {shown}")
    if status.st_uid != 0:
        yield warning(f"{shown} belongs to user {status.st_uid}, not to root", f"chown root:root {shown}")
