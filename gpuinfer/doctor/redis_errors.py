# SPDX-License-Identifier: Apache-2.0
"""Which of Redis's common failures it is, from what redis-py raised.

Another connection is made only where that does not tell: about TLS, and at a door that was shut at once.
Redis's words were read from 7.0 and 8; those of OpenSSL from 3.0. The first rule that fits decides.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redis.exceptions import BusyLoadingError, InvalidResponse, NoPermissionError, ReadOnlyError

from gpuinfer.doctor.finding import Finding, edit, error
from gpuinfer.doctor.redis_place import OUR_CONF, OUR_SOCKET, Place, me

_EDIT = edit("/etc/gpuinfer/gpuinfer.toml")
_SHOW_LOG = "journalctl -u gpuinfer-redis -n 20 --no-pager"


@dataclass(frozen=True)
class Failure:
    """An exception with all its causes, and where it happened."""

    causes: tuple[BaseException, ...]
    place: Place

    @property
    def text(self) -> str:
        return str(self.causes[0])

    def says(self, *words: str) -> bool:
        """Tell whether any of the causes says one of the words."""
        return any(word in str(cause) for cause in self.causes for word in words)

    def errno(self, *numbers: int) -> bool:
        """Tell whether the system refused for one of these reasons."""
        return any(isinstance(cause, OSError) and cause.errno in numbers for cause in self.causes)

    def is_a(self, *classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in self.causes)


Rule = Callable[[Failure], Finding | None]


def diagnose(exc: Exception, place: Place) -> Finding:
    """Return the finding for what redis-py raised at a place."""
    failure = Failure(tuple(_causes(exc)), place)
    if failure.errno(errno.EPIPE, errno.ECONNRESET) or failure.says(
        "Broken pipe", "closed by server", "reset by"
    ):
        # The door was shut before our first word: what was said then is lost to redis-py.
        failure = Failure((*failure.causes, ConnectionError(place.greeting())), place)
    found = (rule(failure) for rule in RULES)
    return next(finding for finding in found if finding)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


# -- what Redis answers ---------------------------------------------------------------------


def _loading(failure: Failure) -> Finding | None:
    if not (failure.is_a(BusyLoadingError) or failure.says("LOADING", "loading the dataset")):
        return None
    return error(
        "Redis is reading its data after a start, and serves nobody until it has",
        failure.place.cli("INFO persistence | grep loading") + "; sleep 10; gpuinfer doctor redis.reach",
    )


def _out_of_memory(failure: Failure) -> Finding | None:
    if not failure.says("OOM command not allowed", "OOM allow", "command not allowed when used memory"):
        return None
    fix = failure.place.cli("CONFIG SET maxmemory 2gb")
    if failure.place.ours:
        fix = f"{_EDIT} && systemctl restart gpuinfer-redis  # [redis] maxmemory_mb; workers go on meanwhile"
    return error(
        "Redis is full (maxmemory) and refuses new work; what was accepted is still worked off",
        f"gpuinfer queue status; {fix}",
    )


def _cannot_save(failure: Failure) -> Finding | None:
    if not failure.says("MISCONF"):
        return None
    look = f"df -h /var/lib/gpuinfer/redis; {_SHOW_LOG}"
    if not failure.place.ours:
        look = failure.place.cli("INFO persistence") + "; df -h"
    return error("Redis cannot write to its disk and refuses all writes until it can (MISCONF)", look)


def _read_only(failure: Failure) -> Finding | None:
    if not (failure.is_a(ReadOnlyError) or failure.says("READONLY")):
        return None
    return error(
        f"{failure.place.shown} is a read-only replica; broker.url must name its master",
        failure.place.cli("INFO replication"),
    )


def _not_allowed(failure: Failure) -> Finding | None:
    if not (failure.is_a(NoPermissionError) or failure.says("NOPERM", "has no permissions")):
        return None
    user, place = failure.place.user, failure.place
    remedy = f"{place.cli(f'ACL GETUSER {user}')}; {place.cli('ACL LOG 5')}"
    if place.ours:
        remedy = f"gpuinfer redis apply-users  # gives this version's rights; {remedy}"
    return error(f"Redis's user {user} may not do what is needed (NOPERM): {failure.text}", remedy)


def _wrong_password(failure: Failure) -> Finding | None:
    if not failure.says("WRONGPASS", "invalid username-password", "invalid password", "without any password"):
        return None
    user, place = failure.place.user, failure.place
    if place.ours:
        return error(
            f"Redis does not know this password of user {user}: it was changed, or Redis has not read it yet",
            "systemctl restart gpuinfer-redis  # reads /etc/gpuinfer/credentials again",
        )
    return error(
        f"Redis does not know this password of user {user}: broker.username or broker.password is wrong",
        f"{_EDIT} && gpuinfer doctor redis.reach",
    )


def _no_password(failure: Failure) -> Finding | None:
    if not failure.says("NOAUTH", "Authentication required", "HELLO must be called"):
        return None
    if failure.place.ours:
        return error(
            f"Redis wants a login, and {me()} has none of its own",
            f"usermod -aG gpuinfer-operator {me()}  # or -viewer; then log in again; or sudo gpuinfer doctor",
        )
    return error(
        "Redis wants a password, and none is set: broker.password, or a user with broker.username",
        f"{_EDIT} && gpuinfer doctor redis.reach",
    )


def _no_such_database(failure: Failure) -> Finding | None:
    if not failure.says("DB index is out of range", "invalid DB index"):
        return None
    return error(
        "broker.url names a database that Redis has not; 0 is right", f"{_EDIT}  # broker.url, at its end"
    )


def _protected(failure: Failure) -> Finding | None:
    if not failure.says("DENIED Redis is running in protected mode"):
        return None
    return error(
        "Redis lets nobody in from other hosts before it has passwords (protected mode)",
        failure.place.cli("ACL SETUSER ...") + "  # on Redis's host",
    )


def _too_many(failure: Failure) -> Finding | None:
    if not failure.says("max number of clients reached"):
        return None
    return error("Redis has as many clients as it takes (maxclients)", failure.place.cli("CLIENT LIST"))


# -- what the system answers ----------------------------------------------------------------


def _no_socket(failure: Failure) -> Finding | None:
    path = failure.place.socket
    if not path or not failure.errno(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return None
    if path != OUR_SOCKET and _is_socket(OUR_SOCKET):
        return error(
            f"there is no socket {path}; Redis's own is {OUR_SOCKET}: broker.url is wrong",
            f"GPUINFER_BROKER_URL='unix://{OUR_SOCKET}?db=0' gpuinfer doctor redis.reach; {_EDIT}",
        )
    return error(f"there is no socket {path}: Redis does not run, or listens elsewhere", failure.place.start)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False


def _closed_socket(failure: Failure) -> Finding | None:
    path = failure.place.socket
    if not path or not failure.errno(errno.EACCES, errno.EPERM):
        return None
    text = f"user {me()} may not use the socket {path}"
    if not failure.place.ours:
        group = f"$(stat -c %G {path})"
        return error(
            f"{text}: it is for members of its group", f"usermod -aG {group} {me()}  # then log in again"
        )
    return error(
        f"{text}: members of the groups gpuinfer-operator and gpuinfer-viewer may",
        f"usermod -aG gpuinfer-operator {me()}  # or -viewer; then log in again; or: sudo gpuinfer doctor",
    )


def _refused(failure: Failure) -> Finding | None:
    if not failure.errno(errno.ECONNREFUSED, errno.ENOTSOCK):
        return None
    path = failure.place.socket
    if path and not _is_socket(path):
        return error(f"{path} is no socket: broker.url is wrong", f"ls -l {path}; {_EDIT}")
    text = f"nobody listens at {failure.place.shown}: Redis does not run there"
    if not path and failure.place.local and _is_socket(OUR_SOCKET):
        return error(f"{text}; our own listens on {OUR_SOCKET} alone", f"{_EDIT}  # broker.url")
    return error(text, failure.place.start)


def _unknown_host(failure: Failure) -> Finding | None:
    if not failure.is_a(socket.gaierror):
        return None
    name = failure.place.host
    return error(f"no host is called {name}: broker.url or the name service is wrong", f"getent hosts {name}")


def _unreachable(failure: Failure) -> Finding | None:
    if not failure.errno(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT):
        return None
    return error(f"{failure.place.host} cannot be reached", f"ping -c 3 {failure.place.host}; ip route")


# -- TLS ------------------------------------------------------------------------------------


def _certificate(failure: Failure) -> Finding | None:
    if not (failure.is_a(ssl.SSLCertVerificationError) or failure.says("CERTIFICATE_VERIFY_FAILED")):
        return None
    place = failure.place
    show = f"openssl s_client -connect {place.host}:{place.port} -showcerts </dev/null"
    if failure.says("Hostname mismatch", "IP address mismatch"):
        return error(f"TLS: the certificate is not for {place.host}; broker.url must use its name", show)
    if failure.says("expired", "not yet valid"):
        return error("TLS: the certificate has expired, or this host's clock is wrong", f"{show}; date")
    return error(
        "TLS: the certificate is not signed by a CA this host trusts; broker.tls_ca must name that CA's file",
        f"{show}; {_EDIT}",
    )


def _no_ca_file(failure: Failure) -> Finding | None:
    ca = failure.place.tls_ca
    if not failure.place.tls or ca is None or failure.says("CERTIFICATE_VERIFY_FAILED"):
        return None
    if os.access(ca, os.R_OK) and not failure.says("no certificate or crl found", "NO_CERTIFICATE"):
        return None
    return error(
        f"TLS: broker.tls_ca = {ca} cannot be read, or holds no certificate", f"ls -l {ca}; file {ca}"
    )


def _wants_certificate(failure: Failure) -> Finding | None:
    if not failure.says("CERTIFICATE_REQUIRED", "certificate required"):
        return None
    return error(
        "TLS: Redis wants a certificate of its clients; gpuinfer logs in by user and password",
        f"{edit(OUR_CONF)} && systemctl restart gpuinfer-redis  # on Redis's host: tls-auth-clients no",
    )


def _no_tls_there(failure: Failure) -> Finding | None:
    place, address = failure.place, f"{failure.place.host}:{failure.place.port}"
    if not place.tls:
        return None
    # A Redis without TLS waits for the end of a line that never comes: its client sees a timeout.
    if not failure.errno(errno.ECONNREFUSED) and place.answers_plainly():
        return error(
            f"TLS: Redis at {address} does not speak TLS; broker.url must begin with redis://",
            f"{_EDIT}  # broker.url, or give that Redis a tls-port",
        )
    if not failure.is_a(ssl.SSLError):
        return None
    text = f"TLS: {address} does not agree with us: {failure.text}"
    return error(text, f"openssl s_client -connect {address} </dev/null")


def _tls_there(failure: Failure) -> Finding | None:
    place = failure.place
    if place.socket or place.tls or failure.errno(errno.ECONNREFUSED) or not place.answers_tls():
        return None
    return error(
        f"TLS: {place.shown} speaks TLS, broker.url does not: it must begin with rediss://",
        f"{_EDIT}  # broker.url, and broker.tls_ca",
    )


# -- the rest -------------------------------------------------------------------------------


def _silent(failure: Failure) -> Finding | None:
    if not (failure.is_a(TimeoutError) or failure.says("Timeout", "timed out")):
        return None
    place = failure.place
    return error(
        f"{place.shown} gave no answer in {place.timeout_s:g} s: it is stopped, busy, or behind a firewall",
        place.cli("--latency") if place.local else f"nc -vz {place.host} {place.port}",
    )


def _no_redis(failure: Failure) -> Finding | None:
    if not (failure.is_a(InvalidResponse) or failure.says("Protocol Error")):
        return None
    return error(f"what answers at {failure.place.shown} is no Redis", f"{_EDIT}  # broker.url")


def _other(failure: Failure) -> Finding:
    words = " ".join(failure.text.split())[:300]
    return error(
        f"Redis at {failure.place.shown} cannot be used: {words}", f"gpuinfer config show; {_SHOW_LOG}"
    )


RULES: tuple[Rule, ...] = (
    *(_loading, _out_of_memory, _cannot_save, _read_only, _not_allowed, _wrong_password, _no_password),
    *(_no_such_database, _protected, _too_many),
    *(_no_ca_file, _certificate, _wants_certificate, _no_tls_there),
    *(_no_socket, _closed_socket, _refused, _unknown_host, _unreachable),
    *(_tls_there, _silent, _no_redis, _other),
)
