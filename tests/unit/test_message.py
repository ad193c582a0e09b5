# SPDX-License-Identifier: Apache-2.0
"""Celery's message in all its variants, as Celery and kombu build them: each decodes to the same task."""

from __future__ import annotations

import json
import uuid
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu.utils.json import dumps

from gpuinfer.client.origin import Origin
from gpuinfer.queue.message import PREDICT, Envelope, Undecodable, decode, moment_of, tasks_by_name
from gpuinfer.queue.submission import Submission
from gpuinfer.settings import QueueSettings

pytestmark = pytest.mark.unit

EXPIRES = datetime(2040, 1, 2, 3, 4, 5, tzinfo=UTC)
#: What a producer gives, and what a worker reads of it.
TYPED: list[tuple[Any, Any]] = [
    (Decimal("1.5"), 1.5),
    (Decimal(7), 7),
    (b"\xff\x00", b"\xff\x00"),
    (b"text", b"text"),
    (EXPIRES, EXPIRES.isoformat()),
    (EXPIRES.date(), "2040-01-02"),
    (EXPIRES.time(), "03:04:05"),
    (uuid.UUID(int=5), str(uuid.UUID(int=5))),
]
PLAIN = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53), st.text())
VALUES = st.recursive(
    st.one_of(st.sampled_from(TYPED), PLAIN.map(lambda value: (value, value))),
    lambda inner: st.lists(inner, max_size=4).map(
        lambda pairs: ([a for a, _ in pairs], [b for _, b in pairs])
    ),
    max_leaves=8,
)
#: A producer in another language may write a body of two elements, and none of what it does not use.
BODIES = st.sampled_from(["whole", "two", "null", "list"])
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
)
IDS = st.sampled_from(["plain", "with/slash", 'with"quote', "\u00e4"])


def sent(
    protocol: int, value: Any, task_id: Any, *, compression: str | None = None, encoding: str = "base64"
) -> dict[str, Any]:
    """Return the message that a producer on kombu's virtual transport puts into a queue."""
    app = Celery("stranger", broker="memory://", set_as_current=False)
    app.conf.update(
        task_protocol=protocol,
        task_compression=compression,
        broker_transport_options={"body_encoding": encoding},
    )
    queue = f"realtime-{uuid.uuid4()}"
    app.send_task(
        PREDICT, [value], {"top_k": 3}, task_id=task_id, queue=queue, expires=EXPIRES, time_limit=9.0
    )
    with app.connection_for_read() as connection:
        return dict(connection.default_channel._get(queue))


def rewritten(message: dict[str, Any], how: str) -> dict[str, Any]:
    """Return a message without its kwargs and embed, as other languages write it."""
    if how == "whole" or message["headers"].get("compression"):
        return message
    coded = message["properties"]["body_encoding"] == "base64"
    body = json.loads(b64decode(message["body"]) if coded else message["body"])
    empty: list[Any] | None = [] if how == "list" else None
    if isinstance(body, dict):
        body["kwargs"] = empty
    else:
        body = [body[0], {}] if how == "two" else [body[0], empty, empty]
    text = json.dumps(body)
    return message | {"body": b64encode(text.encode()).decode() if coded else text}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    protocol=st.sampled_from([1, 2]),
    values=VALUES,
    task_id=IDS,
    compression=st.sampled_from([None, "gzip"]),
    encoding=st.sampled_from(["base64", "utf-8"]),
    how=BODIES,
    content_type=TYPES,
)
def test_any_variant_decodes_to_the_same_task(
    protocol: int,
    values: Any,
    task_id: str,
    compression: str | None,
    encoding: str,
    how: str,
    content_type: str,
) -> None:
    """Protocol, encoding, compression, types and what is left out change nothing about the task."""
    encoding = "base64" if compression else encoding  # what is compressed is no text
    given_value, read_value = values
    message = rewritten(sent(protocol, given_value, task_id, compression=compression, encoding=encoding), how)
    envelope = decode(dumps(message | {"content-type": content_type}).encode())
    args, kwargs, embed = envelope.body()
    assert (envelope.task, envelope.id) == (PREDICT, task_id)
    assert args == [read_value]
    assert [type(value) for value in args] == [type(read_value)]
    assert kwargs in ({"top_k": 3}, {})
    assert not any(embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord"))
    assert moment_of(envelope.headers, "expires") == EXPIRES.timestamp()
    assert envelope.headers["timelimit"] == [9.0, None]


@pytest.mark.parametrize("protocol", [1, 2])
def test_an_id_may_be_a_uuid(protocol: int) -> None:
    """Celery takes a UUID object for an id, and kombu writes it as one."""
    task_id = uuid.uuid4()
    message = sent(protocol, 1, task_id)
    assert decode(dumps(message).encode()).id == str(task_id)


def hybrid() -> Envelope:
    """Return a message with its task in the headers, and a body of protocol 1, as Celery 3.1 could."""
    body = {"args": [1], "kwargs": {}, "expires": EXPIRES.isoformat(), "taskset": "group", "callbacks": [7]}
    return decode(
        json.dumps(
            {
                "body": json.dumps(body),
                "content-type": "application/json",
                "headers": {"task": PREDICT, "id": "x", "retries": 2},
                "properties": {},
            }
        ).encode()
    )


def test_protocol_one_with_headers() -> None:
    """What the body says of the task counts where the headers do not say it."""
    envelope = hybrid()
    args, kwargs, embed = envelope.body()
    assert (args, kwargs, embed["callbacks"]) == ([1], {}, [7])
    assert moment_of(envelope.headers, "expires") == EXPIRES.timestamp()
    assert (envelope.headers["group"], envelope.headers["retries"]) == ("group", 2)


def refusal(**changes: object) -> Undecodable:
    message = sent(1, 1, "t") | changes
    with pytest.raises(Undecodable) as found:
        decode(json.dumps(message).encode()).body()
    return found.value


def test_what_is_not_read_says_why() -> None:
    """Another charset, a type nobody knows, no task at all: refused, by its id where that can be read."""
    assert "UTF-8" in str(refusal(**{"content-type": "application/json; charset=latin-1"}))
    assert "UTF-8" in str(refusal(**{"content-type": "application/x-yaml"}))
    nothing = refusal(body=b64encode(b"[[], {}, {}]").decode())
    assert "protocol 1 nor 2" in str(nothing)
    assert nothing.task_id == "t"
    strange = {"task": PREDICT, "id": "t", "args": [{"__type__": "set", "__value__": [1]}]}
    assert "unsupported __type__ 'set'" in str(refusal(body=b64encode(json.dumps(strange).encode()).decode()))
    broken = {"task": PREDICT, "id": "t", "args": [{"__type__": "uuid", "__value__": 7}]}
    assert "is not a uuid" in str(refusal(body=b64encode(json.dumps(broken).encode()).decode()))


ODD = 'a "word", \\ \u00e4\n\U0001f600'


@given(
    task_id=st.one_of(st.uuids().map(str), st.text(min_size=1)),
    reply_to=st.text(),
    priority=st.integers(0, 9),
    limits=st.tuples(*2 * [st.one_of(st.none(), st.floats(0.001, 1e6))]),
    expires_at=st.one_of(st.none(), st.integers(1, 2**32).map(float)),
    key=st.sampled_from(["", ODD]),
    most=st.sampled_from([0, 65536]),
)
def test_a_message_says_what_was_submitted(
    task_id: str,
    reply_to: str,
    priority: int,
    limits: tuple[float | None, float | None],
    expires_at: float | None,
    key: str,
    most: int,
) -> None:
    """What is written into a message's gaps stands where it belongs, whatever it holds."""
    task = Submission(
        task=PREDICT,
        inputs=ODD,
        queue="realtime",
        priority=priority,
        id=task_id,
        reply_to=reply_to,
        time_limit_s=limits[0],
        soft_time_limit_s=limits[1],
        expires_at=expires_at,
        ignore_result=priority > 5,
        key=key,
    )
    packed = task.pack(most)
    message = json.loads(packed.payload)
    headers, properties = message["headers"], message["properties"]
    assert {headers["id"], headers["root_id"], properties["correlation_id"]} == {task_id}
    assert (properties["delivery_tag"], properties["reply_to"]) == (task_id, reply_to)
    assert (properties["priority"], properties["delivery_info"]["routing_key"]) == (priority, "realtime")
    assert headers["timelimit"] == list(limits)
    assert headers["ignore_result"] is (priority > 5)
    assert moment_of(headers, "expires") == expires_at
    assert type(headers["gpuinfer_sent"]) is float
    assert headers.get("gpuinfer_key", "") == task.keyed
    assert headers.get("gpuinfer_body", 0) == len(packed.beside or b"")
    args, _, _ = decode(packed.payload).body()
    assert args == ([] if packed.beside else [ODD])


def test_ids_are_uuids_of_their_origin() -> None:
    """An id is a random UUID as everybody writes it, and its process knows it."""
    ours, other = Origin(), Origin()
    ids = {ours.new_id() for _ in range(500)}
    assert len(ids) == 500
    for task_id in ids:
        parsed = uuid.UUID(task_id)
        assert (str(parsed), parsed.version, parsed.variant) == (task_id, 4, uuid.RFC_4122)
        assert ours.made(task_id)
        assert not other.made(task_id)


def test_aliases() -> None:
    """A name that applications send already stands for one of our tasks."""
    names = tasks_by_name(QueueSettings(batch_predict_aliases=("shop.score",)))
    assert names["celery_app.predict"] == names[PREDICT] == PREDICT
    assert names["shop.score"] == "gpuinfer.batch_predict"
    assert "celery_app.batch_predict" not in names
