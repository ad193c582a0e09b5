# SPDX-License-Identifier: Apache-2.0
"""The headers ``RateLimit-Policy`` and ``RateLimit``: how a key that has a rate stands after a submission.

Source: draft-ietf-httpapi-ratelimit-headers-10. The policy says how many tasks may be submitted in how many
seconds; the other one how many would be accepted now, and when a whole burst would be.
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
    """Return the headers that the answer to a request has; none where it has submitted nothing by a rate."""
    found: tuple[tuple[bytes, bytes], ...] = scope.get(_HEADERS, ())
    return found


def stands(scope: Scope, key: Key | None, rate: Rate | None) -> None:
    """Note how a key stands after a submission."""
    if key is not None and rate is not None and key.rate:
        scope[_HEADERS] = _headers(key.rate, rate.remaining, math.ceil(rate.reset_s))


def refused(scope: Scope, key: Key | None, error: RateLimited) -> None:
    """Note how a key stands that was refused by its rate."""
    if key is not None and key.rate:
        scope[_HEADERS] = _headers(key.rate, 0, math.ceil(error.reset_s))


def _headers(rate: float, remaining: int, reset_s: int) -> tuple[tuple[bytes, bytes], ...]:
    state = b'"key";r=%d;t=%d' % (remaining, reset_s)
    return (b"ratelimit-policy", _policy(rate)), (b"ratelimit", state)


@lru_cache(maxsize=256)
def _policy(rate: float) -> bytes:
    number, seconds = per_unit(rate)
    return b'"key";q=%d;w=%d' % (number, seconds)
