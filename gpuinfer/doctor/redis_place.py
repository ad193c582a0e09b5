# SPDX-License-Identifier: Apache-2.0
"""Where Redis is, the commands that reach it there, and which of its common failures an exception means.

Another connection is made only where the exception does not tell: about TLS, and where Redis closed the
connection at once. Redis's words were read from 7.0 and 8; those of OpenSSL from 3.0.
"""

from __future__ import annotations

import re
import shlex
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import errorcode
from pathlib import Path

from gpuinfer.certificate import unverified
from gpuinfer.doctor.host import EDIT, Finding, error
from gpuinfer.queue.connection import me
from gpuinfer.redis_url import parse
from gpuinfer.settings import ADMIN_PASSWORD, BrokerSettings

OUR_SOCKET = "/run/gpuinfer/redis/redis.sock"
OUR_CONF = "/etc/gpuinfer/redis.conf"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROBE_LIMIT_S = 2.0


@dataclass(frozen=True)
class Place:
    """A broker's address."""

    #: Path of a Unix socket; empty for TCP.
    socket: str
    host: str
    port: int
    tls: bool
    #: Who logs in.
    user: str
    has_password: bool
    tls_ca: Path | None
    timeout_s: float

    @property
    def shown(self) -> str:
        """Return the address for a sentence, without any password."""
        return self.socket or f"{self.host}:{self.port}{' (TLS)' if self.tls else ''}"

    @property
    def ours(self) -> bool:
        """Tell whether it is the Redis that the package runs."""
        return self.socket == OUR_SOCKET

    @property
    def cli(self) -> str:
        """Return the administrator's redis-cli for this place, to be followed by a command."""
        return self._cli("admin")

    @property
    def of_api(self) -> str:
        """Return the redis-cli of the front's user, for a Redis of ours that rejects its administrator."""
        return self._cli("api")

    def _cli(self, user: str) -> str:
        login = f"REDISCLI_AUTH=$(cat {ADMIN_PASSWORD.with_name(user)}) redis-cli --user {user}"
        if not self.ours:
            login = "redis-cli" + (" --askpass" if self.has_password else "")
            login += f" --user {shlex.quote(self.user)}" if self.user != "default" else ""
        if self.socket:
            return f"{login} -s {shlex.quote(self.socket)}"
        ca = f" --cacert {shlex.quote(str(self.tls_ca))}" if self.tls_ca else ""
        return f"{login} -h {self.host} -p {self.port}" + (f" --tls{ca}" if self.tls else "")

    def config(self, key: str, value: str) -> str:
        """Return the command that sets an option at once: without an append-only file a restart loses all."""
        keep = f" && editor {OUR_CONF}  # {key} {value}, for the next start" if self.ours else ""
        return f"{self.cli} CONFIG SET {key} {value}{keep}"

    @property
    def start(self) -> str:
        """Return the command that starts Redis there, or tells which one it would be."""
        if self.ours and not Path("/run/systemd/system").is_dir():
            return "gpuinfer demo  # or name a Redis that runs: GPUINFER_BROKER_URL=redis://127.0.0.1:6379/0"
        if self.ours:
            return "systemctl start gpuinfer-redis; journalctl -u gpuinfer-redis -n 20 --no-pager"
        return "gpuinfer config show | grep broker.url  # start the Redis it names, or name another"

    def says(self, line: bytes = b"") -> str:
        """Return the answer to a line, or to a mere connection, without TLS; empty where there is none."""
        with suppress(OSError), _connected(self) as plain:
            if line:  # to a peer that has hung up even nothing cannot be sent
                plain.sendall(line)
            return plain.recv(1000).decode(errors="replace")
        return ""

    def speaks_tls(self) -> bool:
        """Tell whether TLS is spoken there, whatever the certificate."""
        with suppress(OSError), _connected(self) as plain:
            unverified().wrap_socket(plain).close()
            return True
        return False


def _connected(place: Place) -> socket.socket:
    """Return a connection without TLS. Raises OSError."""
    if not place.socket:
        return socket.create_connection((place.host, place.port), _PROBE_LIMIT_S)
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(_PROBE_LIMIT_S)
    plain.connect(place.socket)
    return plain


def place_of(broker: BrokerSettings) -> Place:
    """Return the place that broker.url names."""
    url = parse(broker.url)
    is_socket = url.scheme == "unix"
    return Place(
        socket=url.path if is_socket else "",
        host=url.host,
        port=0 if is_socket else url.port,
        tls=url.scheme == "rediss",
        user=broker.username or url.user or "default",
        has_password=bool(broker.password or url.password),
        tls_ca=broker.tls_ca,
        timeout_s=broker.connect_timeout_s,
    )


@dataclass(frozen=True)
class Row:
    """A failure and its finding; ``diagnose`` formats the texts."""

    #: A regular expression for the causes: of each its class, the system's error code, its words.
    signs: str
    message: str
    remedy: str
    #: The remedy where the Redis is the package's own; empty: the same.
    ours: str = ""
    when: Callable[[Place], bool] = lambda _: True


def diagnose(exc: Exception, place: Place) -> Finding:
    """Return the finding for what redis-py raised at a place."""
    causes = list(_causes(exc))
    codes = [errorcode.get(getattr(one, "errno", None) or 0, "") for one in causes]
    seen = "\n".join(f"{type(one).__name__} {code} {one}" for one, code in zip(causes, codes, strict=True))
    if re.search("EPIPE|ECONNRESET|Broken pipe|closed by server|reset by", seen):
        # Redis closed the connection before our first command, and redis-py has not read what it said.
        seen += f"\n{place.says()}"
    row = next(row for row in ROWS if re.search(row.signs, seen) and row.when(place))
    refused = [one.verify_message for one in causes if isinstance(one, ssl.SSLCertVerificationError)]
    text = refused[0] if refused else " ".join(str(exc).split())[:300]
    words = {"place": place, "me": me(), "our_socket": OUR_SOCKET, "text": text}
    return error(row.message.format(**words), ((place.ours and row.ours) or row.remedy).format(**words))


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def _is_beside_ours(place: Place) -> bool:
    """Our own Redis runs here, and broker.url names another place on this host."""
    here = bool(place.socket) or place.host in _LOOPBACK
    return here and place.socket != OUR_SOCKET and Path(OUR_SOCKET).is_socket()


def _is_without_tls(place: Place) -> bool:
    """A Redis without TLS waits for the end of a line that never comes, and its client sees a timeout."""
    return place.tls and place.says(b"PING\r\n")[:1] in ("+", "-")


_LOG = "journalctl -u gpuinfer-redis -n 20 --no-pager"
_LOGIN = f"{EDIT} && gpuinfer doctor redis.reach  # broker.username, broker.password"
_JOIN = "usermod -aG gpuinfer-operator {me}  # or -viewer; then log in again; or: sudo gpuinfer doctor"
_CERTIFICATE = "openssl s_client -connect {place.host}:{place.port} -showcerts </dev/null"
_REJECTED = "WRONGPASS|invalid username-password|invalid password|without any password"
_ABSENT = "ENOENT|ENOTDIR|ENAMETOOLONG|ECONNREFUSED|AF_UNIX path too long"

ROWS: tuple[Row, ...] = (
    # What Redis answers.
    Row(
        "LOADING|loading the dataset|BusyLoadingError",
        "Redis is loading its data after a start, and answers when it has finished",
        "{place.cli} INFO persistence | grep loading; sleep 10; gpuinfer doctor redis.reach",
    ),
    Row(
        "OOM command not allowed|OOM allow|command not allowed when used memory",
        "Redis is full (maxmemory) and refuses new work; workers still finish what was accepted",
        "gpuinfer queue status; {place.cli} CONFIG SET maxmemory 2gb",
        f"gpuinfer queue status; {EDIT} && gpuinfer redis apply-settings  # [redis] maxmemory_mb",
    ),
    Row(
        "MISCONF",
        "Redis cannot write to its disk, and refuses all writes until it can (MISCONF)",
        "{place.cli} INFO persistence; df -h",
        f"df -h /var/lib/gpuinfer/redis; {_LOG}",
    ),
    Row(
        "READONLY|ReadOnlyError",
        "{place.shown} is a read-only replica; broker.url must name its master",
        "{place.cli} INFO replication",
    ),
    Row("Error compiling script", "Redis is too old: 7.0 or newer is needed", "{place.cli} INFO server"),
    Row(
        "NOPERM|has no permissions|NoPermissionError",
        "Redis's user {place.user} lacks a right (NOPERM): {text}",
        "{place.cli} ACL GETUSER {place.user}; {place.cli} ACL LOG 5",
        "gpuinfer redis apply-users  # gives this version's rights; {place.cli} ACL GETUSER {place.user}",
    ),
    Row(
        _REJECTED,
        "Redis rejects user admin: its password file has changed since Redis was started",
        # Without an append-only file a restart would lose the queue, and only admin could turn one on.
        "{place.of_api} INFO persistence | grep aof_enabled:1 && systemctl restart gpuinfer-redis",
        when=lambda place: place.ours and place.user == "admin",
    ),
    Row(
        _REJECTED,
        "Redis rejects user {place.user}: broker.password is wrong, or Redis has not read a new one yet",
        _LOGIN,
        "gpuinfer redis apply-users  # gives Redis the passwords of /etc/gpuinfer/credentials",
    ),
    Row(
        "NOAUTH|Authentication required|HELLO must be called",
        "Redis wants a password, and none is set for {me} (broker.password)",
        _LOGIN,
        _JOIN,
    ),
    Row("DB index", "broker.url names a database that Redis does not have; 0 is right", EDIT),
    Row(
        "Redis is running in protected mode",
        "Redis accepts no connection from other hosts until it has passwords (protected mode)",
        "{place.cli} ACL SETUSER ...  # on Redis's host",
    ),
    Row("max number of clients", "Redis has reached its limit of clients", "{place.cli} CLIENT LIST"),
    # TLS.
    Row(
        "CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError",
        "TLS: the certificate of {place.host} is refused: {text}",
        f"{_CERTIFICATE}; date; {EDIT}  # broker.url: its name; broker.tls_ca: its CA's file",
    ),
    Row(
        "certificate or crl|NO_CERT|ENOENT|EACCES",
        "TLS: broker.tls_ca = {place.tls_ca} cannot be read, or holds no certificate",
        "ls -l {place.tls_ca}; file {place.tls_ca}",
        when=lambda place: place.tls,
    ),
    # What the system answers.
    Row(
        "ECONNREFUSED|ENOTSOCK",
        "{place.socket} is not a socket: broker.url is wrong",
        f"ls -l {{place.socket}}; {EDIT}",
        when=lambda place: bool(place.socket) and not Path(place.socket).is_socket(),
    ),
    Row(
        _ABSENT,
        "nothing listens at {place.shown}, but Redis does at {our_socket}: broker.url is wrong",
        f"GPUINFER_BROKER_URL='unix://{{our_socket}}?db=0' gpuinfer doctor redis.reach; {EDIT}",
        when=_is_beside_ours,
    ),
    Row(_ABSENT, "nothing listens at {place.shown}: Redis does not run there", "{place.start}"),
    Row(
        "EACCES|EPERM",
        "user {me} may not use the socket {place.socket}: only members of its group may",
        "usermod -aG $(stat -c %G {place.socket}) {me}  # then log in again",
        _JOIN,
    ),
    Row("gaierror", "the name service does not know {place.host} (broker.url)", "getent hosts {place.host}"),
    Row("EHOSTUNREACH|ENETUNREACH", "{place.host} cannot be reached", "ping -c 3 {place.host}; ip route"),
    # The rest.
    Row(
        "",
        "TLS: Redis at {place.host}:{place.port} does not speak TLS; broker.url must begin with redis://",
        f"{EDIT}  # broker.url, or give that Redis a tls-port",
        when=_is_without_tls,
    ),
    Row("SSLError", "TLS: {place.shown}: {text}", f"{_CERTIFICATE}  # or tls-auth-clients no, in redis.conf"),
    Row(
        "",
        "TLS: {place.shown} speaks TLS, broker.url does not: it must begin with rediss://",
        f"{EDIT}  # broker.url, and broker.tls_ca",
        when=lambda place: not place.socket and not place.tls and place.speaks_tls(),
    ),
    Row(
        "TimeoutError|Timeout|timed out",
        "{place.shown} gave no answer in {place.timeout_s:g} s: it is stopped, busy, or behind a firewall",
        "{place.cli} --latency",
    ),
    Row("InvalidResponse|Protocol Error", "what answers at {place.shown} is not Redis", EDIT),
    Row("", "Redis at {place.shown} cannot be used: {text}", f"gpuinfer config show; {_LOG}"),
)
