# SPDX-License-Identifier: Apache-2.0
"""Connections to Redis: the URLs and options for redis-py, Celery's results and kombu; typed errors."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from gpuinfer.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    GpuinferError,
    IdempotencyConflict,
    KeyQuota,
    QueueFull,
    RateLimited,
    UnknownModel,
)
from gpuinfer.queue import format as layout
from gpuinfer.redis_url import parse
from gpuinfer.settings import BrokerSettings


def redis_url(broker: BrokerSettings) -> str:
    """Return the URL that redis-py understands, without credentials and options."""
    place = parse(broker.url)
    if place.scheme == "unix":
        return f"unix://{place.path}?db={place.db}"
    return f"{place.scheme}://{place.netloc}/{place.db}"


def user_of(broker: BrokerSettings) -> str:
    """Return the Redis user that a connection logs in as."""
    return broker.username or parse(broker.url).user or "default"


def _credentials(broker: BrokerSettings) -> tuple[str | None, str | None]:
    """Return (user, password), from the settings or else from the URL."""
    if broker.password is not None:
        return broker.username, broker.password.get_secret_value()
    place = parse(broker.url)
    return broker.username or place.user or None, place.password or None


def celery_urls(broker: BrokerSettings) -> tuple[str, str]:
    """Return Celery's (broker URL, with our transport; result back-end URL)."""
    place = parse(broker.url)
    user, password = _credentials(broker)
    credentials = place.credentials(user, password)
    if place.scheme == "unix":
        tail = f"://{credentials}{place.path}?virtual_host={place.db}"
        return "gpuinfer+socket" + tail, "redis+socket" + tail
    tail = f"://{credentials}{place.netloc}/{place.db}"
    return "gpuinfer" + tail, place.scheme + tail


#: Option of the URL -> its name in Celery's result back end.
_OF_RESULTS = {
    "health_check_interval": "redis_backend_health_check_interval",
    "client_name": "redis_client_name",
    "socket_timeout": "redis_socket_timeout",
}


def celery_options(broker: BrokerSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the URL's options as kombu's transport options, and as settings of Celery's result back end.

    The protocol version is left to kombu and Celery.
    """
    asked = {name: value for name, value in parse(broker.url).options.items() if name != "protocol"}
    of_results = {_OF_RESULTS[name]: value for name, value in asked.items()}
    return {"socket_timeout": broker.connect_timeout_s, **asked}, of_results


def tls_options(broker: BrokerSettings) -> dict[str, Any] | None:
    """Return the value of kombu's and Celery's ``use_ssl`` options; None without TLS."""
    if not broker.url.startswith("rediss://"):
        return None
    options: dict[str, Any] = {"ssl_cert_reqs": "required"}
    if broker.tls_ca:
        options["ssl_ca_certs"] = str(broker.tls_ca)
    return options


def _options(broker: BrokerSettings) -> dict[str, Any]:
    place = parse(broker.url)
    options: dict[str, Any] = {"health_check_interval": 15, "socket_timeout": broker.connect_timeout_s}
    user, password = _credentials(broker)
    if password is not None:
        options |= {"username": user, "password": password}
    if place.scheme != "unix":
        options["socket_connect_timeout"] = broker.connect_timeout_s
        options["socket_keepalive"] = True
    if broker.tls_ca and place.scheme == "rediss":
        options["ssl_ca_certs"] = str(broker.tls_ca)
    return options | dict(place.options)


def connect(
    broker: BrokerSettings,
    *,
    retries: int = 1,
    patience_s: float | None = None,
    any_format: bool = False,
    on_mismatch: layout.OnMismatch | None = None,
) -> redis.Redis:
    """Return a client that connects when first used; a lost connection is retried ``retries`` times.

    ``patience_s``: timeout for connecting and for each answer, if that is shorter than the settings' own.
    Unless ``any_format`` is true, connecting to a Redis with another data format calls ``on_mismatch``, then
    raises UnusableRedis.
    """
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.01), retries)
    greeting = None if any_format else layout.greeting(on_mismatch)
    options = _options(broker)
    if patience_s is not None:
        for name in ("socket_timeout", "socket_connect_timeout"):
            options[name] = min(patience_s, options.get(name, patience_s))
    return redis.Redis.from_url(redis_url(broker), retry=retry, redis_connect_func=greeting, **options)


def connect_async(broker: BrokerSettings, *, max_connections: int = 32) -> redis.asyncio.Redis:
    """Return an asyncio client that connects when first used.

    A burst beyond ``max_connections`` waits for a free one instead of failing.
    """
    from redis.asyncio.retry import Retry as AsyncRetry

    retry = AsyncRetry(ExponentialBackoff(cap=0.2, base=0.01), 1)
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        redis_url(broker),
        retry=retry,
        max_connections=max_connections,
        timeout=2 * broker.connect_timeout_s,
        redis_connect_func=layout.async_greeting,
        **_options(broker),
    )
    return redis.asyncio.Redis.from_pool(pool)


#: File beside the socket, written by ``gpuinfer redis prepare``: how Redis writes to disk.
DURABILITY = "durability"

#: Errors of a Redis that is down, starting or stopping: the same call may succeed in a moment.
AWAY = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, MaxConnectionsError, OSError)


#: Errors in answers after which the same call may succeed in a moment.
_PASSING = ("LOADING ", "READONLY ", "BUSY ", "MASTERDOWN ", "NOREPLICAS ", "max number of clients")


def explain(exc: Exception, user: str = "") -> GpuinferError:
    """Return the typed error for redis-py's exception or a script's error. ``user``: the Redis user."""
    text = str(exc)
    if "UNKNOWN_DEFAULT " in text:
        model, _, known = text.rpartition("UNKNOWN_DEFAULT ")[2].partition(" ")
        return UnknownModel(
            f"the fleet does not know its own default model {model!r}; known: {known}; "
            "gpuinfer model default NAME sets another",
            "model",
        )
    if "UNKNOWN_MODEL " in text:
        model, _, known = text.rpartition("UNKNOWN_MODEL ")[2].partition(" ")
        return UnknownModel(f"the fleet knows no model {model!r}; known: {known}", "model")
    if "RATE_LIMITED " in text:
        _, wait_s, reset_s, rate, burst = text.rpartition("RATE_LIMITED ")[2].split()
        return RateLimited(
            f"this key may submit {rate} tasks a second, {burst} at once; try again in {float(wait_s):.3f} s",
            retry_after_s=float(wait_s),
            reset_s=float(reset_s),
        )
    if "KEY_FULL " in text:
        what, *_, most = text.rpartition("KEY_FULL ")[2].split()
        what = "tasks" if what == "tasks" else "bytes of tasks"
        return KeyQuota(f"this key may have at most {most} {what} waiting; accepted tasks continue")
    if "LATER_FULL " in text:
        most = text.rpartition("LATER_FULL ")[2]
        return QueueFull(f"too many tasks wait for their time; queue.max_later is {most}", "countdown_s")
    if "FORMAT " in text:
        return layout.mismatch(text.rpartition("FORMAT ")[2])
    if layout.is_of_a_cluster(exc):
        return layout.clustered()
    if "IDEMPOTENCY_CONFLICT" in text:
        return IdempotencyConflict("was used for a request with other inputs or options", "idempotency_key")
    return _of_room(exc, text) or _of_a_login(exc, text, user) or _of_the_server(exc, text)


#: What submit.lua reports as full -> message.
_FULL = {
    "tasks": "too many tasks are waiting: queue.max_waiting is {}",
    "bytes": "too many bytes are waiting: the limit is {} (queue.max_waiting_bytes, or half of Redis's "
    "memory)",
    "bytes-of-batch": "too many bytes are waiting in batch: the limit is half of {} "
    "(queue.max_waiting_bytes, or half of Redis's memory)",
    "keys": "too many idempotency keys are stored: the limit is {} (queue.max_keys, or a sixteenth of "
    "Redis's memory)",
}


def _of_room(exc: Exception, text: str) -> QueueFull | None:
    """Return the error if there is no room for new tasks; None for another error."""
    if "QUEUE_FULL " in text:
        what, _, bound = text.rpartition("QUEUE_FULL ")[2].partition(" ")
        return QueueFull(f"{_FULL[what].format(bound)}; accepted tasks continue")
    if "BODY_GONE" in text:
        return QueueFull("Redis is full and dropped the inputs of this request; accepted tasks continue")
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return QueueFull("Redis has reached maxmemory and refuses new work; accepted tasks continue")
    return None


#: Redis's words for a missing right; the last one is a script's (7.0) and does not name the command.
_NO_RIGHT = ("ACL failure", "NOPERM", "The user executing the script can't")


def _of_a_login(exc: Exception, text: str, user: str) -> BrokerError | None:
    """Return the error if the login or the user's rights are the cause; None for another error."""
    if "HELLO must be called" in text or "Authentication required" in text:
        return BrokerUnavailable(
            f"Redis requires a login, and the user {me()} has none; {_GROUPS}; on other hosts set "
            "broker.username and broker.password",
            "broker.password",
        )
    if isinstance(exc, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return BrokerUnavailable(f"Redis refused the password or user: {text}", "broker.password")
    if isinstance(exc, NoPermissionError) or any(words in text for words in _NO_RIGHT):
        return BrokerRefused(_lacks(text, user), "broker.username")
    if "Error 13 " in text:
        return BrokerUnavailable(
            f"the user {me()} may not open Redis's socket; {_GROUPS}: {text}", "broker.url"
        )
    return None


#: Redis user -> who has the rights that it lacks.
_WHO_MAY = {
    "viewer": "members of the group gpuinfer-operator may, and root",
    "operator": "root on Redis's own host may",
}
_GROUPS = (
    "on Redis's own host root and members of the groups gpuinfer-operator and gpuinfer-viewer have one "
    "(usermod -aG GROUP USER, then log in again)"
)


def me() -> str:
    """Return the name of the user that this process runs as."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _lacks(text: str, user: str) -> str:
    """Return a sentence: which right a Redis user lacks, and who has it."""
    user = user or "of this login"
    command = re.search(r"'([\w|]+)' command", text)
    what = (
        f"the right to run {command[1].upper().replace('|', ' ')}"
        if command
        else "the right to run a command that is needed here"
    )
    for kind in ("key", "channel"):
        if not command and re.search(rf"\b{kind}s?\b", text):
            what = f"the right to a {kind} that is needed here"
    who = _WHO_MAY.get(
        user,
        "gpuinfer redis apply-users grants gpuinfer's users their rights; root on Redis's host may do all",
    )
    return f"the Redis user {user} lacks {what}: {text}; {who}"


def _of_the_server(exc: Exception, text: str) -> BrokerError:
    if "MISCONF" in text:
        return BrokerUnavailable(f"Redis cannot write to its disk: {text}")
    if refuses(exc):
        what = "Redis refuses this, and a retry will not help"
        if "WRONGTYPE" in text:
            what = "a key in Redis has the wrong type: another program uses its name"
        return BrokerError(f"{what}: {text}")
    if isinstance(exc, ResponseError):
        return BrokerUnavailable(f"Redis cannot do this now: {text}")
    return BrokerUnavailable(f"Redis does not answer: {_notice(text) or text}", "broker.url")


def _notice(text: str) -> str:
    """Return why Redis is not started: the notice by ``gpuinfer redis prepare`` beside its socket."""
    found = re.search(r"connecting to (?:unix:)?(/\S+/)[^/\s]+\.(?: |$)", text)
    if found is None:
        return ""
    try:
        with Path(found[1], "notice").open(encoding="utf-8", errors="replace") as file:
            return file.read(500).strip()
    except OSError:
        return ""


def refuses(exc: BaseException) -> bool:
    """Tell whether Redis would refuse the same call again; False if it is down or may accept it later."""
    if isinstance(exc, (ReadOnlyError, OutOfMemoryError, MasterDownError)) or not isinstance(
        exc, ResponseError
    ):
        return False
    return "MISCONF" not in str(exc) and not any(words in str(exc) for words in _PASSING)


class typed_errors:
    """Turn redis-py's exceptions and scripts' errors into our errors (see ``explain``).

    A class, because a generator would add a microsecond to each call.
    """

    __slots__ = ("_user",)

    def __init__(self, user: str = "") -> None:
        self._user = user

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, (RedisError, OSError)):
            raise explain(exc, self._user) from exc


__all__ = [
    "AWAY",
    "ResponseError",
    "celery_options",
    "celery_urls",
    "connect",
    "connect_async",
    "explain",
    "redis_url",
    "refuses",
    "tls_options",
    "typed_errors",
    "user_of",
]
