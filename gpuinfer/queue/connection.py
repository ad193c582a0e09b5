# SPDX-License-Identifier: Apache-2.0
"""One broker URL, in the three spellings that redis-py, Celery's results and kombu want."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from gpuinfer.errors import BrokerUnavailable, GpuinferError, QueueFull, UnknownModel
from gpuinfer.queue import format as layout
from gpuinfer.settings import BrokerSettings


def _socket(url: str) -> tuple[str, str, str] | None:
    """Return (user:password@ or '', path, db) of a Unix socket URL, else None."""
    parts = urlsplit(url)
    if parts.scheme not in ("unix", "redis+socket"):
        return None
    query = parse_qs(parts.query)
    db = (query.get("db") or query.get("virtual_host") or ["0"])[0]
    return parts.netloc, parts.path, db


def _credentials(broker: BrokerSettings) -> str:
    if broker.password is None:
        return ""
    return f"{quote(broker.username or '', safe='')}:{quote(broker.password.get_secret_value(), safe='')}@"


def _with_credentials(broker: BrokerSettings, scheme: str) -> str:
    rest = broker.url.partition("://")[2]
    own = _credentials(broker)
    if own and "@" in rest:
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{own}{rest}"


def redis_url(broker: BrokerSettings) -> str:
    """Return the URL that redis-py understands, without credentials of the settings."""
    found = _socket(broker.url)
    return f"unix://{found[0]}{found[1]}?db={found[2]}" if found else broker.url


def celery_urls(broker: BrokerSettings) -> tuple[str, str]:
    """Return (broker URL on our transport, result back-end URL) for Celery."""
    found = _socket(broker.url)
    if found:
        tail = f"://{_credentials(broker) or found[0]}{found[1]}?virtual_host={found[2]}"
        return "gpuinfer+socket" + tail, "redis+socket" + tail
    return _with_credentials(broker, "gpuinfer"), _with_credentials(broker, urlsplit(broker.url).scheme)


def tls_options(broker: BrokerSettings) -> dict[str, Any] | None:
    """Return what kombu and Celery call ``use_ssl``, or None without TLS."""
    if not broker.url.startswith("rediss://"):
        return None
    options: dict[str, Any] = {"ssl_cert_reqs": "required"}
    if broker.tls_ca:
        options["ssl_ca_certs"] = str(broker.tls_ca)
    return options


def _options(broker: BrokerSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"health_check_interval": 15, "socket_timeout": broker.connect_timeout_s}
    if broker.password is not None:
        options |= {"username": broker.username, "password": broker.password.get_secret_value()}
    if not redis_url(broker).startswith("unix://"):
        options["socket_connect_timeout"] = broker.connect_timeout_s
        options["socket_keepalive"] = True
    if broker.tls_ca and broker.url.startswith("rediss://"):
        options["ssl_ca_certs"] = str(broker.tls_ca)
    return options


def connect(
    broker: BrokerSettings,
    *,
    retries: int = 1,
    any_format: bool = False,
    on_mismatch: layout.OnMismatch | None = None,
) -> redis.Redis:
    """Return a client that connects when first used; one lost connection is retried ``retries`` times.

    A connection to a Redis of another format raises FormatMismatch, and tells ``on_mismatch`` before, unless
    ``any_format`` is asked for.
    """
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.01), retries)
    greeting = None if any_format else layout.greeting(on_mismatch)
    return redis.Redis.from_url(
        redis_url(broker), retry=retry, redis_connect_func=greeting, **_options(broker)
    )


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


#: Redis is away, or about to be: the same call may work in a moment.
AWAY = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, MaxConnectionsError, OSError)


def explain(exc: Exception) -> GpuinferError:
    """Return the typed error for what redis-py raised, or a script answered."""
    text = str(exc)
    if "UNKNOWN_MODEL " in text:
        known = text.rpartition("UNKNOWN_MODEL ")[2]
        return UnknownModel(
            f"no worker of this fleet has served a model of that name; known: {known}", "model"
        )
    if "FORMAT " in text:
        return layout.mismatch(text.rpartition("FORMAT ")[2])
    if isinstance(exc, OutOfMemoryError) or "OOM command not allowed" in text:
        return QueueFull("Redis has reached maxmemory and refuses new work; what was accepted goes on")
    if "HELLO must be called" in text or "Authentication required" in text:
        return BrokerUnavailable("Redis wants a password, and none is set", "broker.password")
    if isinstance(exc, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return BrokerUnavailable(f"Redis refused the password or user: {text}", "broker.password")
    if isinstance(exc, NoPermissionError) or "ACL failure" in text:
        return BrokerUnavailable(
            f"this Redis user may not do that; as root on Redis's own host it works: {text}",
            "broker.username",
        )
    if "MISCONF" in text:
        return BrokerUnavailable(f"Redis cannot write to its disk: {text}")
    if "Error 13 " in text:
        return BrokerUnavailable(
            f"this user may not open Redis's socket; as root it works: {text}", "broker.url"
        )
    return BrokerUnavailable(f"Redis does not answer: {text}", "broker.url")


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turn what redis-py raises, and what a script answers, into our errors (see ``explain``)."""
    try:
        yield
    except (RedisError, OSError) as exc:
        raise explain(exc) from exc


__all__ = [
    "AWAY",
    "ResponseError",
    "celery_urls",
    "connect",
    "connect_async",
    "explain",
    "redis_url",
    "tls_options",
    "typed_errors",
]
