# SPDX-License-Identifier: Apache-2.0
"""The passwords of Redis's users: their files, and their change without interruption.

A change has three steps: Redis accepts the new password beside the old one; each unit that logs in with it
is restarted; Redis forgets the old one. Meanwhile the hashes of old passwords are kept beside Redis's data,
so that they are valid after a restart of Redis, too. The next change finishes one that was interrupted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gpuinfer.broker import acl
from gpuinfer.errors import ConfigError, NotPermitted

if TYPE_CHECKING:
    import redis

#: Readable by root only.
PROGRAMS = Path("/etc/gpuinfer/credentials")
#: Each readable by the members of its group, gpuinfer-operator or gpuinfer-viewer.
PEOPLES = Path("/etc/gpuinfer/logins")
#: User -> hashes of old passwords that are still valid. A hash of 32 random bytes is no secret.
OLDER = Path("/var/lib/gpuinfer/redis/older-passwords.json")
#: The credential for a password file that does not exist (SetCredential=).
_NONE = "none"
_FIX = "`dpkg-reconfigure gpuinfer` makes missing passwords"


def file_of(user: str) -> Path:
    """Return the file of a user's password: the unit's credential, else the host's own file."""
    handed = os.environ.get("CREDENTIALS_DIRECTORY")
    if handed:
        return Path(handed) / user
    return (PEOPLES if user in acl.PEOPLE else PROGRAMS) / user


def read() -> dict[str, str]:
    """Read all users' passwords. Raises ConfigError naming the file of a program that is missing or empty.

    Raises NotPermitted where only root may read it. A missing password of operator or viewer is '': nobody
    can log in as that user, and nothing else fails.
    """
    found = {}
    for user in acl.USERS:
        path = file_of(user)
        if user in acl.PEOPLE:
            found[user] = _of_people(path)
            continue
        try:
            found[user] = path.read_text(encoding="utf-8").strip()
        except PermissionError as exc:
            raise NotPermitted("only root may read it: call it with sudo", str(path)) from exc
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
    """Return user -> hashes of old passwords that are still valid."""
    try:
        found = json.loads(OLDER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    hashes = {user: [one for one in found.get(user, ()) if _is_hash(one)] for user in acl.USERS}
    return {user: ones for user, ones in hashes.items() if ones}


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def keep_older(user: str, hashes: Iterable[str]) -> None:
    """Write the hashes of a user's old passwords that are still valid. Raises OSError."""
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
    """Replace a file atomically, with the owner, group and mode of ``like``."""
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
    """Return the addresses of a user's connections that are in ``known``: they used an old password."""
    before = {*known}
    return sorted({one["addr"] for one in connections(client, user) if int(one["id"]) in before})


def connections(client: redis.Redis, user: str) -> list[dict[str, str]]:
    """Return a user's connections, except this one."""
    own = client.client_id()
    found: list[dict[str, str]] = client.client_list()
    return [one for one in found if one.get("user") == user and int(one["id"]) != own]
