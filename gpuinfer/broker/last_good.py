# SPDX-License-Identifier: Apache-2.0
"""What Redis was started with when the settings could be read last: it starts so again while they cannot.

A slip in the settings file must not take the queue down, nor make a host that works for another one's Redis
start one of its own. Kept beside Redis's data, as it must outlive a reboot.
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
#: What Redis starts by: a typo elsewhere in the file is no matter.
SECTIONS = ("broker", "redis")
#: Secrets stay where they are.
_NOT_KEPT = {"broker": {"username", "password"}}


def given(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return what was set, of each section, without secrets, as JSON has it."""
    found: dict[str, dict[str, Any]] = settings.model_dump(mode="json", exclude_unset=True, exclude=_NOT_KEPT)
    broker = found.get("broker", {})
    if "url" in broker:  # where Redis is decides whether ours starts; a password there is of no use for that
        broker["url"] = masked(broker["url"])
    return found


def keep(loaded: Loaded) -> None:
    """Keep the settings of this start; where another section is wrong, those of Redis alone.

    Only Redis's own user does: who calls the command by hand leaves no file that this user could not read.
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
    """Return what was set at the last good start; None where that cannot be told."""
    try:
        found = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def settings(loaded: Loaded) -> tuple[Settings, str]:
    """Return what Redis starts by, and '' or why these are the settings of the last good start.

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
        except ValidationError:  # of another edition
            raise exc from None
