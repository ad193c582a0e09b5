# SPDX-License-Identifier: Apache-2.0
"""Submits a request's body as a task and answers. Plain ASGI: this is the hot path."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple, cast

from starlette.types import Receive, Scope, Send

from gpuinfer.api import admission, encodings, query, rates, uploads
from gpuinfer.api.access import caller, check_model, check_queue
from gpuinfer.api.accounting import MODEL, RECEIVED
from gpuinfer.api.middleware import note
from gpuinfer.api.reply import send_json
from gpuinfer.api.shared import header, shared
from gpuinfer.api.showing import shown, state
from gpuinfer.api.waiting import bounded, next_news, preferred_time, until_ended, waiting_time
from gpuinfer.client import Options
from gpuinfer.errors import IdempotencyConflict, InputError, TaskExists
from gpuinfer.queue.options import OPTIONS, TRACEPARENT
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.submission import Json, Submission

#: Query parameters of a submission.
PARAMETERS = frozenset({"wait", *OPTIONS})
_WAIT = frozenset({"wait"})


class Asked(NamedTuple):
    """A parsed submission."""

    inputs: Any
    options: Options
    #: Whether the inputs are a list, run as one job.
    many: bool
    #: Seconds to wait for the end; 0: answer at once.
    wait_s: float
    #: Whether the wait comes from a Prefer header.
    preferred: bool = False


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return a request's body, chunked or not, decompressed.

    Raises PayloadTooLarge as soon as it has more bytes, compressed or not, than ``limit``
    (``queue.max_payload_bytes``) plus some slack; SlowBody, FrontBusy, UnsupportedEncoding,
    MalformedEncoding, ClientDisconnect.
    """
    coding = encodings.coding_of(header(scope, b"content-encoding"))
    body = await _received(scope, receive, limit)
    if coding is None:
        return body
    room = shared(scope).receiver.unpacking(scope)
    plain = await encodings.unpacked(body, coding, admission.body_limit(limit), room.take)
    room.keep(len(plain))
    return plain


async def _received(scope: Scope, receive: Receive, limit: int) -> bytes:
    text = header(scope, b"content-length")
    announced = int(text) if text.isdecimal() else 0
    body = await shared(scope).receiver.read(scope, receive, announced, admission.body_limit(limit))
    scope[RECEIVED] = len(body)
    return body


def understand(scope: Scope, body: bytes, *, model: str | None = None, many: bool = False) -> Asked:
    """Parse a body by its Content-Type: JSON, a form, or a file. ``model``: from the path.

    Raises InputError and its subclasses, each naming its field.
    """
    given = query.parse(scope, PARAMETERS)
    wait, preferred = given.pop("wait", None), None
    if wait is None and (preferred := preferred_time(scope)) is not None:
        wait = str(preferred)
    wait_s = waiting_time(wait, shared(scope).settings.api.max_wait_s)
    content_type, key = header(scope, b"content-type"), header(scope, b"idempotency-key") or None
    if uploads.holds_json(body, content_type):
        asked = admission.admit(body, header_key=key)
        if given:
            for name, text in given.items():
                _add(asked.options, name, uploads.option(name, text))
    elif many:
        raise InputError(
            f"a job must be a JSON list, the body is {content_type[:80]}; send files one by one to /predict",
            "body",
        )
    else:
        asked = uploads.admit_upload(body, content_type, given, header_key=key)
    if model is not None:
        _add(asked.options, "model", model)
    if (trace := header(scope, b"traceparent")) and TRACEPARENT.fullmatch(
        trace
    ):  # else as if there were none
        asked.options.setdefault("traceparent", trace)
    return Asked(asked.inputs, asked.options, many, wait_s, preferred is not None)


def _add(options: Options, name: str, value: Any) -> None:
    """Add an option from the URL. Raises InputError if the body has a different value."""
    known = cast(dict[str, Any], options)
    if known.setdefault(name, value) != value:
        raise InputError("differs between the URL and the body; give only one of them", name)


async def submit_and_answer(scope: Scope, receive: Receive, send: Send, asked: Asked) -> None:
    """Submit the task, and answer 202 with its id, or 200 with the task if it ended in time."""
    task = await prepared(scope, asked.inputs, many=asked.many, options=asked.options)
    asked = asked._replace(inputs=None)
    if not asked.wait_s:
        task_id = await sent(scope, task)
        place = (b"location", b"/result/" + task_id.encode())
        await send_json(scope, send, {"task_id": task_id}, 202, (place,))
        return
    await _answer(scope, send, asked, await _sent_and_ended(scope, receive, task, asked.wait_s))


async def _answer(scope: Scope, send: Send, asked: Asked, status: TaskStatus) -> None:
    """Answer with a task: 200 if it has ended, successfully or not, else 202 with its URL."""
    headers = [] if status.final else [(b"location", b"/result/" + status.id.encode())]
    if asked.preferred:  # RFC 7240
        headers.append((b"preference-applied", b"wait=%d" % asked.wait_s))
    await send_json(scope, send, await shown(scope, status), 200 if status.final else 202, headers)


async def _sent_and_ended(scope: Scope, receive: Receive, task: Submission, seconds: float) -> TaskStatus:
    """Submit a task and wait for its end on the reply channel, without reading the result key."""
    client = shared(scope).client
    with client.watch(task.id) as watch:
        task_id = await sent(scope, task)
        if task_id == task.id:
            until = monotonic() + seconds
            with suppress(TimeoutError):
                news = await next_news(scope, receive, watch, seconds)
                if isinstance(news, TaskStatus) and news.final:
                    return news
                watch.put_back(news)
                async with bounded(scope, receive, max(0.0, until - monotonic())):
                    return await client.ended(task_id, watch, submitted=True)
            return await client.status(task_id)
    return await until_ended(scope, receive, task_id, seconds)


async def prepared(
    scope: Scope, inputs: Any, *, many: bool, options: Options, task_id: str | None = None
) -> Submission:
    """Return a checked task for the caller. Raises Forbidden for a model or queue that its key may not
    use."""
    name, _, key, _ = caller(scope)
    if key is not None and (model := options.get("model")) is not None:
        check_model(scope, model)
    client, quota = shared(scope).client, None if key is None else key.quota
    try:
        task = await client.prepare(
            inputs, many=many, options=options, task_id=task_id, caller=name, quota=quota
        )
    except InputError:
        scope[MODEL] = client.known_model(options)
        raise
    if key is not None:
        check_model(scope, task.model)
        check_queue(scope, task.queue)
    return task


async def sent(scope: Scope, task: Submission) -> str:
    """Submit a task and return its id, or that of the earlier task with its key. Frees the inputs."""
    ours = shared(scope)
    scope[MODEL] = task.model
    task_id = await ours.client.send(task)
    if task.rate is not None:
        rates.stands(scope, caller(scope).key, task.rate)
    ours.receiver.release(scope)
    task.inputs = None
    note(
        scope,
        action="task_accepted",
        task_id=task_id,
        queue=task.queue,
        model=task.model,
        priority=task.priority,
        **({"traceparent": task.traceparent} if task.traceparent else {}),
    )
    return task_id


async def predict(scope: Scope, receive: Receive, send: Send) -> None:
    """``POST /predict``: one input."""
    await _predict(scope, receive, send, None, many=False)


async def batch_predict(scope: Scope, receive: Receive, send: Send) -> None:
    """``POST /batch_predict``: a list of inputs as one job."""
    await _predict(scope, receive, send, None, many=True)


async def predict_with(scope: Scope, receive: Receive, send: Send, model: str) -> None:
    """``POST /models/{model}/predict``: one input for that model."""
    await _predict(scope, receive, send, model, many=False)


async def _predict(scope: Scope, receive: Receive, send: Send, model: str | None, *, many: bool) -> None:
    body = await read_body(scope, receive, shared(scope).settings.queue.max_payload_bytes)
    asked = understand(scope, body, model=model, many=many)
    del body
    await submit_and_answer(scope, receive, send, asked)


async def result(scope: Scope, receive: Receive, send: Send, task_id: str) -> None:
    """``GET /result/{task_id}?wait=``: a task's state, once it has ended or the time is over."""
    note(scope, task_id=task_id)
    given = query.parse(scope, _WAIT)
    seconds = waiting_time(given.get("wait"), shared(scope).settings.api.max_wait_s)
    await send_json(scope, send, state(scope, await until_ended(scope, receive, task_id, seconds)))


async def put_task(scope: Scope, receive: Receive, send: Send, task_id: str) -> None:
    """``PUT /tasks/{task_id}``: one input under the client's own id.

    A repeated request returns the existing task; a different one under the same id is a 409.
    """
    body = await read_body(scope, receive, shared(scope).settings.queue.max_payload_bytes)
    asked = understand(scope, body)
    del body
    # Compare requests by content, not by white space.
    inputs = asked.inputs.value if isinstance(asked.inputs, Json) else asked.inputs
    task = await prepared(scope, inputs, many=False, options=asked.options, task_id=task_id)
    asked, inputs = asked._replace(inputs=None), None
    try:
        await sent(scope, task)
    except IdempotencyConflict:
        raise TaskExists("stands for another request already; take another id", "task_id") from None
    await _answer(scope, send, asked, await until_ended(scope, receive, task_id, asked.wait_s))
