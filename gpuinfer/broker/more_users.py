# SPDX-License-Identifier: Apache-2.0
"""The administrator's own users of Redis, from /etc/gpuinfer/redis-users.acl.

Redis ends at its start for one wrong line in its ACL file. Ours must work whatever theirs are: each line is
tried in a Redis that is there for this alone. One that it rejects is left out, and named; so are all where
that Redis ends, or hangs.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gpuinfer.broker import acl

#: Where Redis lies on an installed host.
BINARY = Path("/usr/lib/gpuinfer/bin/redis-server")
#: Redis refuses to start with a user that is named twice.
TAKEN = ("default", *acl.USERS)
_LIMIT_S = 10.0


@dataclass(frozen=True)
class Users:
    """The lines that Redis takes, and why it would not take others."""

    lines: list[str] = field(default_factory=list)
    #: ``line 3 (user shop): ...``
    faults: list[str] = field(default_factory=list)


def read(text: str, binary: Path | str | None = None) -> Users:
    """Return what of the file Redis takes; without a Redis to try it in, what looks right."""
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
            # By spaces, as it is tried below: in its file Redis takes a tab for a part of a word, and ends.
            wanted[words[1]] = (number, " ".join(words))
    refused = _refused({name: line for name, (_, line) in wanted.items()}, binary or BINARY)
    for name, (number, line) in wanted.items():
        if name in refused:
            found.faults.append(f"line {number} (user {name}): {refused[name]}")
        else:
            found.lines.append(line)
    return found


def _refused(lines: dict[str, str], binary: Path | str) -> dict[str, str]:
    """Return name -> Redis's words, of the users that it would not take, or that could not be tried."""
    if not lines or not Path(binary).exists():
        return {}
    with tempfile.TemporaryDirectory(prefix="gpuinfer-users-") as folder:
        options = ("--port", "0", "--unixsocket", f"{folder}/redis.sock", "--unixsocketperm", "700")
        command = [str(binary), *options, "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([*command, "--logfile", "/dev/null"], stdin=subprocess.DEVNULL)
        try:
            return _tried(lines, f"{folder}/redis.sock", process)
        finally:
            process.kill()
            process.wait()


def _tried(lines: dict[str, str], path: str, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Return name -> why not, from a Redis that is starting; once it fails to answer, no more is tried."""
    refused: dict[str, str] = {}
    once = Retry(NoBackoff(), 0)
    with redis.Redis(unix_socket_path=path, socket_timeout=_LIMIT_S, retry=once) as client:
        fault = _not_up(client, process)
        for name, line in lines.items():
            try:
                if not fault:
                    client.execute_command("ACL", "SETUSER", *line.split()[1:])
            except redis.ResponseError as exc:
                refused[name] = str(exc)
            except redis.RedisError as exc:
                fault = str(exc)
            if fault:
                refused[name] = f"it could not be tried, as a Redis started for that does not answer: {fault}"
    return refused


def _not_up(client: redis.Redis, process: subprocess.Popen[bytes]) -> str:
    """Wait until a Redis is up; return why it is not, or an empty string."""
    fault, end = "", time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        try:
            client.ping()
        except redis.RedisError as exc:
            if process.poll() is not None:
                return f"it ended with {process.returncode}"
            fault = str(exc)
        else:
            return ""
        time.sleep(0.01)
    return fault


__all__: Sequence[str] = ("BINARY", "TAKEN", "Users", "read")
