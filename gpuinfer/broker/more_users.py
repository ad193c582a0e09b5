# SPDX-License-Identifier: Apache-2.0
"""The administrator's own users of Redis, from /etc/gpuinfer/redis-users.acl.

Redis ends at its start for one wrong line in its ACL file. Ours must work whatever theirs are: each line is
tried in a Redis that is there for this alone, and one that it rejects is left out, and named.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import redis

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
    """Return name -> Redis's words, of the users that it would not take."""
    if not lines or not Path(binary).exists():
        return {}
    refused = {}
    with tempfile.TemporaryDirectory(prefix="gpuinfer-users-") as folder:
        options = ("--port", "0", "--unixsocket", f"{folder}/redis.sock", "--unixsocketperm", "700")
        command = [str(binary), *options, "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([*command, "--logfile", "/dev/null"], stdin=subprocess.DEVNULL)
        try:
            client = _connected(f"{folder}/redis.sock", process)
            for name, line in lines.items() if client else ():
                try:
                    client.execute_command("ACL", "SETUSER", *line.split()[1:])  # type: ignore[union-attr]
                except redis.ResponseError as exc:
                    refused[name] = str(exc)
        finally:
            process.kill()
            process.wait()
    return refused


def _connected(path: str, process: subprocess.Popen[bytes]) -> redis.Redis | None:
    """Return a client of a Redis that is starting; None when it does not come up."""
    client = redis.Redis(unix_socket_path=path, socket_timeout=_LIMIT_S)
    for _ in _until(_LIMIT_S):
        try:
            client.ping()
        except redis.ConnectionError:
            if process.poll() is not None:
                return None
        else:
            return client
    return None


def _until(limit_s: float) -> Iterator[None]:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        yield
        time.sleep(0.01)


__all__: Sequence[str] = ("BINARY", "TAKEN", "Users", "read")
