# SPDX-License-Identifier: Apache-2.0
"""A new password for a user of Redis, without interruption."""

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

#: Restarts units, and yields each with whether it came back: see ``login_units.restart``.
Restart = Callable[[Sequence[str], Callable[[str], object]], Iterator[tuple[str, bool]]]
#: Seconds within which the connections of a restarted unit are closed.
WAIT_S = 10.0


@dataclass
class Rotation:
    """What was done."""

    user: str
    restarted: list[str] = field(default_factory=list)
    #: Units that did not come back. Workers after the first of them were not restarted.
    failed: list[str] = field(default_factory=list)
    #: Addresses of connections that still have an old password.
    left: list[str] = field(default_factory=list)
    #: How many old passwords Redis has forgotten.
    forgotten: int = 0

    @property
    def complete(self) -> bool:
        """Tell whether no old password is valid any more."""
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
                f"the old password of {self.user} is still valid: {unit} did not come back with the new one "
                f"(journalctl -u gpuinfer-roll -u {unit}); when all units have been restarted, run gpuinfer "
                f"redis rotate-password {self.user} --drop-old"
            )
        if self.left:
            return (
                f"the old password of {self.user} is still valid: {', '.join(self.left)} logged in with it; "
                f"copy {passwords.file_of(self.user)} there and restart gpuinfer there, then run gpuinfer "
                f"redis rotate-password {self.user} --drop-old"
            )
        old = "1 old one is" if self.forgotten == 1 else f"{self.forgotten} old ones are"
        return f"{self.user} has a new password, {old} forgotten"


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

    If it is interrupted, both passwords are valid, also after a restart of Redis.
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
    # People who are logged in as operator or viewer are not disconnected.
    end = time.monotonic() + (wait_s if user not in acl.PEOPLE else 0)
    while (left := passwords.still_in(client, user, before)) and time.monotonic() < end:
        time.sleep(0.1)
    done.left = left if user not in acl.PEOPLE else []
    if done.complete:
        done.forgotten = drop_old(client, user).forgotten
    return done


def drop_old(client: redis.Redis, user: str) -> Rotation:
    """Make Redis forget all passwords of a user except the one in its file. Raises as ``rotate`` does."""
    new = acl.digest(passwords.of(user))
    lines = [line.decode() if isinstance(line, bytes) else str(line) for line in client.acl_list()]
    mine = next((line for line in lines if line.split()[1] == user), "")
    hashes = set(re.findall(r" #([0-9a-f]{64})", mine)) - {new}
    words = [f"#{new}", *(f"!{one}" for one in sorted(hashes))]
    client.execute_command("ACL", "SETUSER", user, *words)  # type: ignore[no-untyped-call]
    passwords.keep_older(user, ())
    return Rotation(user, forgotten=len(hashes))
