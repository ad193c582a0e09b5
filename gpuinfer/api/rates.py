# SPDX-License-Identifier: Apache-2.0
"""The headers ``RateLimit-Policy`` and ``RateLimit``, for keys with a rate limit.

Source: draft-ietf-httpapi-ratelimit-headers-10. The policy gives the number of tasks per number of seconds;
``RateLimit`` gives how many tasks would be accepted now, and after how many seconds a full burst would be.
"""

from __future__ import annotations

import math
from functools import lru_cache

from starlette.types import Scope

from gpuinfer.errors import RateLimited
from gpuinfer.keys.key import Key, per_unit
from gpuinfer.queue.quota import Rate

_HEADERS = "gpuinfer.rates"


def told(scope: Scope) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers for the answer; none if the request submitted nothing under a rate limit."""
    found: tuple[tuple[bytes, bytes], ...] = scope.get(_HEADERS, ())
    return found


def stands(scope: Scope, key: Key | None, rate: Rate | None) -> None:
    """Record the state of a key's rate limit after a submission."""
    if key is not None and rate is not None and key.rate:
        scope[_HEADERS] = _headers(key.rate, rate.remaining, math.ceil(rate.reset_s))


def refused(scope: Scope, key: Key | None, error: RateLimited) -> None:
    """Record the state of the rate limit of a refused key."""
    if key is not None and key.rate:
        scope[_HEADERS] = _headers(key.rate, 0, math.ceil(error.reset_s))


def _headers(rate: float, remaining: int, reset_s: int) -> tuple[tuple[bytes, bytes], ...]:
    state = b'"key";r=%d;t=%d' % (remaining, reset_s)
    return (b"ratelimit-policy", _policy(rate)), (b"ratelimit", state)


@lru_cache(maxsize=256)
def _policy(rate: float) -> bytes:
    number, seconds = per_unit(rate)
    return b'"key";q=%d;w=%d' % (number, seconds)
