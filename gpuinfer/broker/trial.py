# SPDX-License-Identifier: Apache-2.0
"""A temporary Redis, which parses a configuration or a user's rules."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gpuinfer.errors import GpuinferError

#: Redis on an installed host.
BINARY = Path("/usr/lib/gpuinfer/bin/redis-server")
LIMIT_S = 10.0
#: Its own settings, which override any configuration: it listens on no port and writes nothing.
APART = {
    "port": "0",
    "tls-port": "0",
    "unixsocketperm": "700",
    "aclfile": "",
    "save": "",
    "appendonly": "no",
    "logfile": "/dev/null",
    "daemonize": "no",
    "supervised": "no",
    "pidfile": "",
}


#: Redis lowers maxclients to what its limit of open files allows.
_ALL_FILES = ("/bin/sh", "-c", 'ulimit -n "$(ulimit -H -n)"; exec "$@"', "sh")


class NotUp(GpuinferError, code="trial_redis_not_up"):
    """Raised when a Redis started for a trial does not answer."""


@contextmanager
def redis_server(binary: Path | str = BINARY, conf: str = "") -> Iterator[redis.Redis]:
    """Start a Redis with the text of a redis.conf, and yield a client of it. Raises NotUp."""
    with tempfile.TemporaryDirectory(prefix="gpuinfer-trial-") as folder:
        path = f"{folder}/redis.sock"
        (Path(folder) / "redis.conf").write_text(conf, encoding="utf-8")
        options = {**APART, "dir": folder, "unixsocket": path}
        command = [*_ALL_FILES, str(binary), f"{folder}/redis.conf"]
        command += [word for key, value in options.items() for word in (f"--{key}", value)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            once = Retry(NoBackoff(), 0)
            with redis.Redis(unix_socket_path=path, socket_timeout=LIMIT_S, retry=once) as client:
                if fault := _not_up(client, process):
                    raise NotUp(fault)
                yield client
        finally:
            process.kill()
            process.wait()


def _not_up(client: redis.Redis, process: subprocess.Popen[bytes]) -> str:
    """Wait until a Redis is up; return why it is not, or an empty string."""
    fault, end = "", time.monotonic() + LIMIT_S
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
