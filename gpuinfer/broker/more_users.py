# SPDX-License-Identifier: Apache-2.0
"""The administrator's own users of Redis, from /etc/gpuinfer/redis-users.acl.

One wrong line in its ACL file stops Redis from starting. So each line is first tried in a temporary Redis. A
line that it rejects is left out and logged; so are all lines where the temporary Redis ends or hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis

from gpuinfer.broker import acl, trial

#: Redis refuses to start with a user that is named twice.
TAKEN = ("default", *acl.USERS)


@dataclass(frozen=True)
class Users:
    """The lines that Redis accepts, and why it rejects others."""

    lines: list[str] = field(default_factory=list)
    #: ``line 3 (user shop): ...``
    faults: list[str] = field(default_factory=list)


def read(text: str, binary: Path | str | None = None) -> Users:
    """Return the lines that Redis accepts; without a Redis to try them in, those in the right form."""
    found = Users()
    wanted: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] != "user" or len(words) < 2 or words[1] in TAKEN:
            names = ", ".join(TAKEN)
            found.faults.append(f"line {number} must be `user NAME RULES...`, with another name than {names}")
        elif words[1] in wanted:
            found.faults.append(f"line {number} names the user {words[1]} a second time")
        else:
            # Joined by spaces: in its file Redis takes a tab as part of a word, and does not start.
            wanted[words[1]] = (number, " ".join(words))
    refused = _refused({name: line for name, (_, line) in wanted.items()}, binary or trial.BINARY)
    for name, (number, line) in wanted.items():
        if name in refused:
            found.faults.append(f"line {number} (user {name}): {refused[name]}")
        else:
            found.lines.append(line)
    return found


def _refused(lines: dict[str, str], binary: Path | str) -> dict[str, str]:
    """Return name -> Redis's message, for the users that it rejects or that could not be tried."""
    if not lines or not Path(binary).exists():
        return {}
    refused: dict[str, str] = {}
    fault = ""
    try:
        with trial.redis_server(binary) as client:
            for name, line in lines.items():
                try:
                    client.execute_command("ACL", "SETUSER", *line.split()[1:])  # type: ignore[no-untyped-call]
                except redis.ResponseError as exc:
                    refused[name] = str(exc)
                except redis.RedisError as exc:
                    fault = str(exc)
                    break
    except trial.NotUp as exc:
        fault = str(exc)
    if fault:
        why = f"it could not be checked: the Redis started to check it does not answer: {fault}"
        refused |= {name: why for name in lines if name not in refused}
    return refused


__all__: Sequence[str] = ("TAKEN", "Users", "read")
