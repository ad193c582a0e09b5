# SPDX-License-Identifier: Apache-2.0
"""Where Redis is, in words, and the commands that reach that very place."""

from __future__ import annotations

import getpass
import shlex
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from gpuinfer.doctor.finding import edit
from gpuinfer.redis_url import parse
from gpuinfer.settings import ADMIN_PASSWORD, BrokerSettings

OUR_SOCKET = "/run/gpuinfer/redis/redis.sock"
OUR_CONF = "/etc/gpuinfer/redis.conf"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROBE_LIMIT_S = 2.0
_SYSTEMD = Path("/run/systemd/system")


@dataclass(frozen=True)
class Place:
    """A broker's address."""

    #: Path of a Unix socket; empty for TCP.
    socket: str
    host: str
    port: int
    tls: bool
    username: str
    has_password: bool
    tls_ca: Path | None
    timeout_s: float

    @property
    def shown(self) -> str:
        """Return it for a sentence; no password can be in it."""
        return self.socket or f"{self.host}:{self.port}{' (TLS)' if self.tls else ''}"

    @property
    def ours(self) -> bool:
        """Tell whether it is the instance the package runs."""
        return self.socket == OUR_SOCKET

    @property
    def local(self) -> bool:
        """Tell whether it is on this host."""
        return bool(self.socket) or self.host in _LOOPBACK

    @property
    def user(self) -> str:
        """Return who logs in, for a sentence."""
        return self.username or "default"

    def cli(self, command: str) -> str:
        """Return a redis-cli call of an administrator at this place."""
        if self.ours:
            login = f"REDISCLI_AUTH=$(cat {ADMIN_PASSWORD}) redis-cli --user admin"
        else:
            login = "redis-cli" + (" --askpass" if self.has_password else "")
            login += f" --user {shlex.quote(self.username)}" if self.username else ""
        return f"{login} {self._address()} {command}"

    def config(self, key: str, value: str) -> str:
        """Return what sets an option of redis.conf there; in our own instance for good, not until its end."""
        if self.ours:
            return f"{edit(OUR_CONF)} && systemctl restart gpuinfer-redis  # {key} {value}"
        return self.cli(f"CONFIG SET {key} {value}")

    def _address(self) -> str:
        if self.socket:
            return f"-s {shlex.quote(self.socket)}"
        ca = f" --cacert {shlex.quote(str(self.tls_ca))}" if self.tls_ca else ""
        return f"-h {self.host} -p {self.port}" + (f" --tls{ca}" if self.tls else "")

    @property
    def start(self) -> str:
        """Return the command that starts Redis there, as far as we can know it."""
        if self.ours and not _SYSTEMD.is_dir():
            return "gpuinfer demo  # or name a Redis that runs: GPUINFER_BROKER_URL=redis://127.0.0.1:6379/0"
        if self.ours:
            return "systemctl start gpuinfer-redis; journalctl -u gpuinfer-redis -n 20 --no-pager"
        if self.local:
            return "gpuinfer config show | grep broker.url  # start the Redis it names, or name another"
        return f"ssh {self.host} systemctl start gpuinfer-redis"

    def greeting(self) -> str:
        """Return what Redis says to a client that it turns away at once: too many clients, protected mode."""
        try:
            with socket.socket(socket.AF_UNIX if self.socket else socket.AF_INET) as plain:
                plain.settimeout(_PROBE_LIMIT_S)
                plain.connect(self.socket or (self.host, self.port))
                return plain.recv(1000).decode(errors="replace")
        except OSError:
            return ""

    def answers_plainly(self) -> bool:
        """Tell whether a Redis without TLS is there: it answers a line, if only with an error."""
        try:
            with socket.create_connection((self.host, self.port), _PROBE_LIMIT_S) as plain:
                plain.sendall(b"PING\r\n")
                return plain.recv(1)[:1] in (b"+", b"-")
        except OSError:
            return False

    def answers_tls(self) -> bool:
        """Tell whether somebody speaks TLS there, whatever the certificate."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with socket.create_connection((self.host, self.port), _PROBE_LIMIT_S) as plain:
                context.wrap_socket(plain).close()
        except (OSError, ssl.SSLError):
            return False
        return True


def place_of(broker: BrokerSettings) -> Place:
    """Read a broker's URL."""
    url = parse(broker.url)
    is_socket = url.scheme == "unix"
    return Place(
        socket=url.path if is_socket else "",
        host=url.host,
        port=0 if is_socket else url.port,
        tls=url.scheme == "rediss",
        username=broker.username or url.user,
        has_password=bool(broker.password or url.password),
        tls_ca=broker.tls_ca,
        timeout_s=broker.connect_timeout_s,
    )


def me() -> str:
    """Return who runs this command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "this user"
