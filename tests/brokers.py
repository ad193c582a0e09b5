# SPDX-License-Identifier: Apache-2.0
"""Our own Redis as the package starts it: etc/redis.conf, tuning.conf and the users, in a test's folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from gpuinfer.broker import acl, tuning
from gpuinfer.broker.durability import Choice
from gpuinfer.settings import RedisSettings
from tests.conftest import need
from tests.services import RedisServer, ServiceError, redis_binary

CONF = Path(__file__).resolve().parents[1] / "etc" / "redis.conf"
PASSWORDS = {user: f"{user}-secret" for user in acl.USERS}


class OurRedis(RedisServer):
    """redis-server with our configuration, its paths replaced; ``more`` stands at the end of the file."""

    def __init__(self, more: str = "", settings: RedisSettings | None = None) -> None:
        binary = redis_binary()
        if binary is None:
            raise ServiceError("there is no redis-server")
        self.folder = Path(tempfile.mkdtemp(prefix="gi-redis-"))
        self.socket = self.folder / "redis.sock"
        (self.folder / "data").mkdir()
        conf = CONF.read_text(encoding="utf-8").replace("/run/gpuinfer/redis/", f"{self.folder}/")
        conf = conf.replace("/var/lib/gpuinfer/redis", f"{self.folder}/data")
        (self.folder / "redis.conf").write_text(conf + more, encoding="utf-8")
        chosen = settings or RedisSettings(maxmemory_mb=256)
        host_bytes = tuning.host_memory_bytes()
        choice = Choice("always" if chosen.appendfsync == "always" else "everysec", "for this test")
        (self.folder / "tuning.conf").write_text(tuning.render(chosen, host_bytes, choice), encoding="utf-8")
        (self.folder / "users.acl").write_text(acl.render(PASSWORDS), encoding="utf-8")
        for user, password in PASSWORDS.items():
            self.credentials(user).mkdir(parents=True)
            (self.credentials(user) / "broker_password").write_text(password + "\n", encoding="utf-8")
        self._command = [binary, str(self.folder / "redis.conf")]
        self._process = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def credentials(self, user: str) -> Path:
        """Return the folder that systemd would hand to a unit of this user."""
        return self.folder / "credentials" / user

    def client(self, user: str = "admin") -> redis.Redis:
        """Return a client of a user, whose answers are bytes."""
        return redis.Redis(unix_socket_path=str(self.socket), username=user, password=PASSWORDS[user])

    def login(self, user: str) -> dict[str, str]:
        """Return ``[broker]`` for a user."""
        return {"url": self.url, "username": user, "password": PASSWORDS[user]}

    def denied(self) -> list[str]:
        """Return what was refused since the last call: user, reason, what."""
        with self.client() as client:
            found = client.acl_log()
            client.acl_log_reset()
        return [
            f"{_text(entry['username'])} {_text(entry['reason'])} {_text(entry['object'])}" for entry in found
        ]


@contextmanager
def our_redis(more: str = "", settings: RedisSettings | None = None) -> Iterator[OurRedis]:
    """Start one; in the end, nothing must have been refused that the test has not taken from the log."""
    need(redis_binary() is not None, "redis-server")
    server = OurRedis(more, settings)
    try:
        yield server
        assert server.denied() == []
    finally:
        server.close()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
