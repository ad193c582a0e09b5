# SPDX-License-Identifier: Apache-2.0
"""A new password for a user of Redis, step by step, while all goes on."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuinfer.broker import acl, login_units, passwords

if TYPE_CHECKING:
    import redis

#: Restarts units, says so, and gives each and whether it came back: see ``login_units.restart``.
Restart = Callable[[Sequence[str], Callable[[str], object]], Iterator[tuple[str, bool]]]
#: Connections of a unit that was restarted are gone within this time.
WAIT_S = 10.0


@dataclass
class Rotation:
    """What was done."""

    user: str
    restarted: list[str] = field(default_factory=list)
    #: Units that did not come back; of workers, those behind the first of them run on as they are.
    failed: list[str] = field(default_factory=list)
    #: Addresses of connections that still have an old password.
    left: list[str] = field(default_factory=list)
    #: How many old passwords Redis has forgotten.
    forgotten: int = 0

    @property
    def complete(self) -> bool:
        """Tell whether no old password counts any more."""
        return not self.failed and not self.left

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "user": self.user,
            "complete": self.complete,
            "restarted": self.restarted,
            "failed": self.failed,
            "left": self.left,
            "forgotten": self.forgotten,
        }

    def told(self) -> str:
        """Return it for people."""
        if self.failed:
            unit = self.failed[0]
            return (
                f"the old password of {self.user} still counts: {unit} did not come back with the new one "
                f"(journalctl -u gpuinfer-roll -u {unit}); once all that runs has been restarted: gpuinfer "
                f"redis rotate-password {self.user} --drop-old"
            )
        if self.left:
            return (
                f"the old password of {self.user} still counts: {', '.join(self.left)} logged in with it; "
                f"copy {passwords.file_of(self.user)} there and restart what runs there, then: gpuinfer "
                f"redis rotate-password {self.user} --drop-old"
            )
        old = "1 old one is" if self.forgotten == 1 else f"{self.forgotten} old ones are"
        return f"the password of {self.user} is new, {old} forgotten"


def rotate(
    client: redis.Redis,
    user: str,
    say: Callable[[str], object] = lambda _: None,
    *,
    running: Callable[[str], list[str]] = login_units.running,
    restart: Restart = login_units.restart,
    wait_s: float = WAIT_S,
) -> Rotation:
    """Change a user's password. Raises redis-py's errors, OSError; ConfigError where there is none to change.

    Whatever ends it in between, the old password and the new one count, also after a restart of Redis.
    """
    done = Rotation(user)
    old, new = acl.digest(passwords.of(user)), secrets.token_hex(32)
    client.execute_command("ACL", "SETUSER", user, f"#{acl.digest(new)}")  # type: ignore[no-untyped-call]
    passwords.keep_older(user, dict.fromkeys((*passwords.older().get(user, ()), old)))
    passwords.write(user, new)
    before = {int(one["id"]) for one in passwords.connections(client, user)}
    for unit, came_back in restart(running(user), say):
        (done.restarted if came_back else done.failed).append(unit)
    if done.failed:
        return done
    # Who works by hand as one of these may stay.
    end = time.monotonic() + (wait_s if user not in acl.PEOPLE else 0)
    while (left := passwords.still_in(client, user, before)) and time.monotonic() < end:
        time.sleep(0.1)
    done.left = left if user not in acl.PEOPLE else []
    if done.complete:
        done.forgotten = drop_old(client, user).forgotten
    return done


def drop_old(client: redis.Redis, user: str) -> Rotation:
    """Let Redis forget all passwords of a user but the one in its file. Raises as ``rotate`` does."""
    new = acl.digest(passwords.of(user))
    lines = [line.decode() if isinstance(line, bytes) else str(line) for line in client.acl_list()]
    mine = next((line for line in lines if line.split()[1] == user), "")
    hashes = set(re.findall(r" #([0-9a-f]{64})", mine)) - {new}
    words = [f"#{new}", *(f"!{one}" for one in sorted(hashes))]
    client.execute_command("ACL", "SETUSER", user, *words)  # type: ignore[no-untyped-call]
    passwords.keep_older(user, ())
    return Rotation(user, forgotten=len(hashes))
