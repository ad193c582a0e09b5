# SPDX-License-Identifier: Apache-2.0
"""What Redis and redis-py say, told apart: away, refused, of another kind, or not ours."""

from __future__ import annotations

import pytest
from redis import exceptions as said

from gpuinfer.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ClusterUnsupported,
    FormatMismatch,
    GpuinferError,
    QueueFull,
    UnknownModel,
)
from gpuinfer.queue.connection import explain, refuses

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("exc", "kind", "status"),
    [
        (said.ConnectionError("Error 111 connecting"), BrokerUnavailable, 503),
        (said.TimeoutError("Timeout reading from socket"), BrokerUnavailable, 503),
        (said.BusyLoadingError("Redis is loading the dataset in memory"), BrokerUnavailable, 503),
        (said.ReadOnlyError("You can't write against a read only replica."), BrokerUnavailable, 503),
        (said.ResponseError("MISCONF Redis is configured to save"), BrokerUnavailable, 503),
        (said.ResponseError("BUSY Redis is busy running a script"), BrokerUnavailable, 503),
        (said.MasterDownError("Link with MASTER is down"), BrokerUnavailable, 503),
        (said.OutOfMemoryError("command not allowed when used memory"), QueueFull, None),
        (said.NoPermissionError("this user has no permissions to run 'get'"), BrokerRefused, 500),
        (said.ResponseError("ACL failure in script: can't run this command"), BrokerRefused, 500),
        (said.ResponseError("WRONGTYPE Operation against a key script: 12, on line 3"), BrokerError, 500),
        (said.ResponseError("ERR user_script:12: attempt to index nil script: 12"), BrokerError, 500),
        (said.ClusterCrossSlotError("Keys in request don't hash to the same slot"), ClusterUnsupported, 503),
        (said.MovedError("866 127.0.0.1:7001"), ClusterUnsupported, 503),
        (said.ClusterDownError("CLUSTERDOWN Hash slot not served"), ClusterUnsupported, 503),
        (
            said.ResponseError("Script attempted to access a non local key in a cluster node"),
            ClusterUnsupported,
            503,
        ),
        (said.ResponseError("FORMAT 7"), FormatMismatch, 503),
        (said.ResponseError("UNKNOWN_MODEL x a, b"), UnknownModel, 404),
        (said.ResponseError("UNKNOWN_DEFAULT x a, b"), UnknownModel, 404),
    ],
)
def test_each_answer_has_its_error(exc: Exception, kind: type[GpuinferError], status: int | None) -> None:
    """Only what may pass is a 503 with Retry-After; what another attempt will not change says so."""
    error = explain(exc, "api")
    assert type(error) is kind
    assert status in (None, error.http_status)
    assert ("does not answer" in str(error)) == (isinstance(exc, said.ConnectionError | said.TimeoutError))
    if isinstance(error, BrokerError):
        assert error.transient == (error.http_status in (503, 429))


def test_a_refusal_names_user_and_right() -> None:
    """Who reads it at night knows whom to give what."""
    error = explain(
        said.NoPermissionError("this user has no permissions to run the 'evalsha' command"), "api"
    )
    assert error.field == "broker.username"
    assert "the Redis user api lacks" in error.message
    assert "'evalsha'" in error.message


def test_the_worker_tells_refusals_from_an_absence() -> None:
    """Its log says redis_refuses, not redis_away."""
    assert refuses(said.NoPermissionError("no"))
    assert not refuses(said.ConnectionError("gone"))
    assert not refuses(said.ReadOnlyError("a replica"))
