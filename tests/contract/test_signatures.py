# SPDX-License-Identifier: Apache-2.0
"""What models take: said by who serves them, read by who submits, forgotten with them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gpuinfer import AsyncClient, Client
from gpuinfer.client.signatures import versions
from gpuinfer.errors import ShapeMismatch
from gpuinfer.models.signature import Input, Signature
from gpuinfer.queue import catalogue, keys
from gpuinfer.queue.membership import DESCRIBE_EVERY_S
from gpuinfer.queue.store import Store
from gpuinfer.settings import BrokerSettings, Settings
from tests.contract.conftest import store_of

pytestmark = pytest.mark.integration


def takes(*shape: int) -> bytes:
    one = Input(name="x", kind="tensor", dtype="float32", shape=shape)
    return orjson.dumps(Signature(inputs=(one,)).to_json())


def says(store: Store, **signatures: bytes) -> None:
    """Let a worker say what its models take, as after its start."""
    store.membership.signatures, store.membership._described_at = signatures, 0.0
    store.register()


def test_a_request_is_checked_by_what_holds_now(store: Store, client: Client) -> None:
    """What was remembered is not believed when it refuses; what is refused is in no queue."""
    client.submit([1, 2, 3])  # nothing is known yet
    says(store, digits=takes(2))
    client._signatures._known.clear()
    with pytest.raises(ShapeMismatch, match=r"has shape \[3\], the model wants \[2\]"):
        client.submit([1, 2, 3])
    with pytest.raises(ShapeMismatch, match="input 2 of 3"):
        client.submit_many([[1, 2], [1], [1, 2]])
    assert len(store.claim(10)) == 1
    says(store, digits=takes(3))
    known = client._signatures._known["digits"]
    client._signatures._known["digits"] = known._replace(at=known.at - 1)  # it has been a second
    client.submit([1, 2, 3])
    assert len(store.claim(10)) == 1


async def test_the_asyncio_client_does_the_same(store: Store, broker: BrokerSettings) -> None:
    """One question for many requests, and the same error."""
    says(store, digits=takes(2))
    async with AsyncClient(Settings(broker=broker)) as client:
        await client.submit([1, 2])
        with pytest.raises(ShapeMismatch):
            await client.submit([1, 2, 3])
        with pytest.raises(ShapeMismatch, match="input 1 of 2"):
            await client.submit_many([[1], [1, 2]])
        assert len(store.claim(10)) == 1


def test_it_is_written_again_and_forgotten_with_the_model(store: Store, broker: BrokerSettings) -> None:
    """For a Redis that came back empty; a model that nobody has served for long leaves nothing."""
    raw: Any = store.client
    says(store, digits=takes(2))
    old = store_of(broker, "gpu0@gone", ("old",))
    says(old, old=takes(9))
    assert set(raw.hkeys(keys.SIGNATURES)) == {b"digits", b"old"}
    raw.zadd(keys.CATALOGUE, {"old": 1})
    raw.hdel(keys.SIGNATURES, "digits")
    store.membership._described_at += 3600
    store.register()  # drops it from the catalogue; it is not yet time to say it again
    assert raw.hkeys(keys.SIGNATURES) == [b"old"]
    store.membership._described_at -= 3600 + DESCRIBE_EVERY_S
    store.register()
    assert raw.hkeys(keys.SIGNATURES) == [b"digits"]
    assert versions(raw.hget(keys.SIGNATURES, "digits")) == (takes(2).decode(),)
    assert catalogue.forget(raw, "digits")
    assert not raw.exists(keys.SIGNATURES)


def test_hosts_may_have_different_versions(store: Store, client: Client, broker: BrokerSettings) -> None:
    """What one of them takes is taken, whoever spoke last; a version that nobody has is forgotten."""
    raw: Any = store.client
    other = store_of(broker, "gpu0@other", ("digits",))
    says(other, digits=takes(3))
    says(store, digits=takes(2))
    for inputs in ([1, 2], [1, 2, 3]):
        client.submit(inputs)
    with pytest.raises(ShapeMismatch):
        client.submit([1])
    says(other, digits=takes(2))
    assert versions(raw.hget(keys.SIGNATURES, "digits")) == (takes(2).decode(),)
    says(other, digits=takes(4))
    body = orjson.loads(raw.hget(keys.SIGNATURES, "digits"))
    body["said"]["gpu0@other"][0] -= keys.SIGNATURE_VOID_S
    raw.hset(keys.SIGNATURES, "digits", orjson.dumps(body))
    says(store, digits=takes(2))
    assert versions(raw.hget(keys.SIGNATURES, "digits")) == (takes(2).decode(),)
