# SPDX-License-Identifier: Apache-2.0
"""``POST /v2/models/{model}/infer``: submit tensors as a task, wait, answer with tensors.

The client does not learn the task's id, so the task is cancelled if the client disconnects or the wait ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gpuinfer.api.accounting import MODEL
from gpuinfer.api.oip.inputs import inputs_of
from gpuinfer.api.oip.outputs import outputs_of
from gpuinfer.api.oip.replies import write
from gpuinfer.api.oip.requests import InferRequest, Wanted, read
from gpuinfer.api.reply import JSON, send_bytes
from gpuinfer.api.shared import header, shared
from gpuinfer.api.submission import prepared, read_body, sent
from gpuinfer.api.waiting import until_ended
from gpuinfer.client import Options
from gpuinfer.errors import InputError, NotReady, UnknownModel, WaitTimeout
from gpuinfer.models.signature import Signature
from gpuinfer.queue.options import BINARY, Encoding
from gpuinfer.queue.results import TaskStatus
from gpuinfer.settings import QUEUES

#: Header with the number of bytes of JSON in a body, in requests and answers.
LENGTH = b"inference-header-content-length"
_OCTETS = b"application/octet-stream"
#: The protocol's most urgent priority is 1, and 0 is the default; ours is 9, and 0 is the default and lowest.
_FIRST, _LAST = 9, 0


async def infer(scope: Scope, receive: Receive, send: Send, model: str, version: str) -> None:
    """Answer with the outputs of a model that the caller may use. Raises GpuinferError."""
    ours = shared(scope)
    asked = read(await read_body(scope, receive, ours.settings.queue.max_payload_bytes), _length(scope))
    signature = await signature_of(scope, model)
    inputs = inputs_of(asked.inputs, signature, ours.settings.queue.max_items)
    options, seconds = _options(asked, model, ours.settings.api.max_wait_s)
    scope[MODEL] = model
    task_id = await sent(scope, await prepared(scope, inputs.value, many=inputs.many, options=options))
    status = await _ended(scope, receive, task_id, seconds)
    result = status.unwrap()
    tensors = outputs_of(result, signature, inputs.items, asked.outputs)
    binary = {one.name for one in asked.outputs if one.binary} if asked.outputs else set()
    if asked.outputs is None and asked.binary:
        binary = {one.name for one in tensors}
    head: dict[str, Any] = {"model_name": model, "model_version": status.about.get("version", version)}
    if asked.id:
        head["id"] = asked.id
    content, length = write(head, tensors, binary)
    if length is None:
        await send_bytes(scope, send, content, JSON)
        return
    await send_bytes(scope, send, content, _OCTETS, headers=[(LENGTH, b"%d" % length)])


def _length(scope: Scope) -> str:
    return header(scope, LENGTH)


async def signature_of(scope: Scope, model: str) -> Signature:
    """Return a model's signature. Raises UnknownModel; NotReady if no worker has reported it yet."""
    client = shared(scope).client
    signature = await client.takes(model, fresh=False)
    if signature is not None:
        return signature
    capacity = await client.capacity()
    if not capacity.knows(model):
        raise unknown_model(model, capacity.catalogue)
    raise NotReady(
        f"the inputs of model {model} are not known yet: no worker that serves it has reported them", "model"
    )


def unknown_model(model: str, known: tuple[str, ...]) -> UnknownModel:
    """Return the error for a model unknown to the fleet."""
    return UnknownModel(
        f"the fleet knows no model {model[:80]!r}; known: {', '.join(known) or 'none'}", "model"
    )


async def _ended(scope: Scope, receive: Receive, task_id: str, seconds: float) -> TaskStatus:
    """Return the ended task. Raises WaitTimeout, NotReady, ClientDisconnect; the task is cancelled then."""
    ours, left = shared(scope), False

    async def watched() -> Mapping[str, Any]:
        nonlocal left
        message = await receive()
        left = left or message["type"] == "http.disconnect"
        return cast(Mapping[str, Any], message)

    status = await until_ended(scope, watched, task_id, seconds, raw=True)  # type: ignore[arg-type]
    if status.final:
        return status
    await ours.client.cancel(task_id)
    if left:
        raise ClientDisconnect
    if ours.stopping.is_set():
        raise NotReady("this server is stopping; send the request again")
    raise WaitTimeout(f"the request did not end within {seconds:g} s and was cancelled")


def _options(asked: InferRequest, model: str, longest_s: float) -> tuple[Options, float]:
    """Return a task's options, and the seconds to wait for its end."""
    parameters = asked.parameters
    if parameters.get("sequence_id"):
        raise InputError("sequences are not supported: requests are independent", "parameters.sequence_id")
    seconds = longest_s
    if (timeout := parameters.get("timeout")) is not None and timeout != 0:
        if type(timeout) is not int or timeout < 0:
            raise InputError("must be a number of microseconds, 1 or more", "parameters.timeout")
        seconds = min(timeout / 1e6, longest_s)
    queue = parameters.get("queue", QUEUES[0])
    if queue not in QUEUES:
        raise InputError(f"must be one of {', '.join(QUEUES)}", "parameters.queue")
    options: Options = {
        "model": model,
        "queue": queue,
        "priority": _priority(parameters.get("priority", 0)),
        "expires_s": max(seconds, 0.001),
        "encoding": cast(Encoding, BINARY),
    }
    if classes := _classes(asked.outputs or ()):
        options |= {"encoding": "b64", "top_k": classes}
    return options, seconds


def _priority(asked: object) -> int:
    """Convert the protocol's priority to ours; its most urgent is 1, and 0 is the default."""
    if type(asked) is not int or asked < 0:
        raise InputError("must be a whole number: 1 is the most urgent, 0 the default", "parameters.priority")
    return max(_LAST, _FIRST + 1 - asked) if asked else 0


def _classes(wanted: tuple[Wanted, ...]) -> int:
    """Return the maximum number of classes requested. Raises InputError unless requested for all outputs."""
    counts = [one.classes for one in wanted]
    if any(counts) and not all(counts):
        raise InputError("request classification for all outputs or for none", "outputs")
    return max(counts, default=0)


__all__ = ["infer", "signature_of", "unknown_model"]
