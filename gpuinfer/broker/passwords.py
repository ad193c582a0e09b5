# SPDX-License-Identifier: Apache-2.0
"""The passwords of Redis's users: where they lie, and how one is changed while all goes on.

A change takes three steps: Redis learns the new password beside the old; each unit that logs in with it is
restarted; Redis forgets the old. The hashes of old ones lie beside Redis's data meanwhile, so that a restart
of Redis in between refuses nobody. A change that was cut off is finished by the next one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gpuinfer.broker import acl
from gpuinfer.errors import ConfigError

if TYPE_CHECKING:
    import redis

#: Root's alone.
PROGRAMS = Path("/etc/gpuinfer/credentials")
#: Each readable by the members of its group, gpuinfer-operator or gpuinfer-viewer.
PEOPLES = Path("/etc/gpuinfer/logins")
#: User -> hashes of the passwords that still count. A hash of 32 random bytes is no secret.
OLDER = Path("/var/lib/gpuinfer/redis/older-passwords.json")
#: What systemd hands over for a password that is not there (SetCredential=).
_NONE = "none"
_FIX = "`dpkg-reconfigure gpuinfer` makes missing passwords"


def file_of(user: str) -> Path:
    """Return where a user's password lies: what systemd has handed over, else the host's own file."""
    handed = os.environ.get("CREDENTIALS_DIRECTORY")
    if handed:
        return Path(handed) / user
    return (PEOPLES if user in acl.PEOPLE else PROGRAMS) / user


def read() -> dict[str, str]:
    """Read all users' passwords. Raises ConfigError naming the file of a program that is missing or empty.

    A user of people may have none, '': nobody logs in as that one, and no queue is down for want of it.
    """
    found = {}
    for user in acl.USERS:
        path = file_of(user)
        if user in acl.PEOPLE:
            found[user] = _of_people(path)
            continue
        try:
            found[user] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(
                f"cannot be read: {getattr(exc, 'strerror', None) or exc}; {_FIX}", str(path)
            ) from exc
        if not found[user]:
            raise ConfigError(f"is empty; {_FIX}", str(path))
    return found


def of(user: str) -> str:
    """Return a user's password. Raises ConfigError naming its file where it has none."""
    found = read()[user]
    if not found:
        raise ConfigError(f"holds no password; {_FIX}", str(file_of(user)))
    return found


def _of_people(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    return "" if text == _NONE else text


def older() -> dict[str, list[str]]:
    """Return the hashes of passwords that still count, of each user."""
    try:
        found = json.loads(OLDER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    hashes = {user: [one for one in found.get(user, ()) if _is_hash(one)] for user in acl.USERS}
    return {user: ones for user, ones in hashes.items() if ones}


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def keep_older(user: str, hashes: Iterable[str]) -> None:
    """Write down which of a user's passwords still count, for Redis's own user to read. Raises OSError."""
    found = {name: ones for name, ones in older().items() if name != user} | {user: [*hashes]}
    found = {name: ones for name, ones in found.items() if ones}
    if not found:
        OLDER.unlink(missing_ok=True)
        return
    _replace(OLDER, json.dumps(found), OLDER.parent)


def write(user: str, password: str) -> None:
    """Replace the password in a user's file. Raises OSError."""
    _replace(file_of(user), password, file_of(user))


def _replace(path: Path, text: str, like: Path) -> None:
    """Replace a file in one step; it belongs to whom ``like`` belongs, and may be read by as many."""
    status = like.stat()
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        os.fchown(file.fileno(), status.st_uid, status.st_gid)
        os.fchmod(file.fileno(), status.st_mode & 0o640)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def still_in(client: redis.Redis, user: str, known: Iterable[int]) -> list[str]:
    """Return where those of a user's connections come from that were there before: by an old password."""
    before = {*known}
    return sorted({one["addr"] for one in connections(client, user) if int(one["id"]) in before})


def connections(client: redis.Redis, user: str) -> list[dict[str, str]]:
    """Return the connections that a user has now, this one left out."""
    own = client.client_id()
    found: list[dict[str, str]] = client.client_list()
    return [one for one in found if one.get("user") == user and int(one["id"]) != own]
