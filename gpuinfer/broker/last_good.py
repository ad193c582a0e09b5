# SPDX-License-Identifier: Apache-2.0
"""The settings of Redis's last good start. Redis uses them while the settings file cannot be read.

A mistake in the settings file must not take the queue down, nor make a host that uses the Redis of another
host start its own. They are kept beside Redis's data, because they must survive a reboot.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gpuinfer.errors import ConfigError
from gpuinfer.redis_url import masked
from gpuinfer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuinfer.settings import Loaded

FILE = Path("/var/lib/gpuinfer/redis/settings.json")
#: The sections that Redis needs: a mistake in another one does not matter.
SECTIONS = ("broker", "redis")
#: Secrets are not copied.
_NOT_KEPT = {"broker": {"username", "password"}}


def given(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return section -> settings that were set, without secrets, for JSON."""
    found: dict[str, dict[str, Any]] = settings.model_dump(mode="json", exclude_unset=True, exclude=_NOT_KEPT)
    broker = found.get("broker", {})
    if "url" in broker:  # only its address is needed, not a password in it
        broker["url"] = masked(broker["url"])
    return found


def keep(loaded: Loaded) -> None:
    """Keep the settings of this start; where another section is wrong, only those of Redis.

    Only Redis's own user does: the command started by hand must not leave a file that this user cannot read.
    Raises ConfigError, OSError.
    """
    try:
        settings = loaded.settings
    except ConfigError:
        settings = loaded.only(*SECTIONS)
    folder = FILE.parent
    if not folder.is_dir() or folder.stat().st_uid != os.geteuid():
        return
    new = FILE.with_name(FILE.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(json.dumps(given(settings), indent=2) + "\n")
    new.replace(FILE)


def kept() -> Mapping[str, Mapping[str, Any]] | None:
    """Return what was set at the last good start; None where it is not known."""
    try:
        found = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def settings(loaded: Loaded) -> tuple[Settings, str]:
    """Return the settings for Redis's start, and '' or why they are those of the last good start.

    Raises ConfigError where there was none.
    """
    try:
        return loaded.only(*SECTIONS), ""
    except ConfigError as exc:
        found = kept()
        if found is None:
            raise
        try:
            return Settings(**found), str(exc)  # type: ignore[arg-type]  # pydantic makes sections of them
        except ValidationError:  # written by another version
            raise exc from None
