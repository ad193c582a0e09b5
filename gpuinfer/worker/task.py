# SPDX-License-Identifier: Apache-2.0
"""A claimed task in a worker: read from its message and checked; inputs are not yet decoded to tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuinfer.errors import (
    GpuinferError,
    InputError,
    PayloadTooLarge,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    UnknownModel,
)
from gpuinfer.models.manifest import Manifest
from gpuinfer.names import MODEL_NAME
from gpuinfer.queue.claims import Claimed
from gpuinfer.queue.message import MAX_MESSAGE_BYTES, Envelope, moment_of
from gpuinfer.queue.options import ARGUMENTS, ENCODINGS, Encoding, check


class Elsewhere(Exception):
    """Raised for a task whose model this worker does not serve; the task is passed on."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model


@dataclass(slots=True, eq=False, weakref_slot=True)
class Task:
    """One task from claim to settle. Mutable: it collects outcomes and retries."""

    claimed: Claimed
    envelope: Envelope
    model: str
    #: One element for ``predict``, all elements for ``batch_predict``.
    inputs: list[Any]
    top_k: int | None
    encoding: Encoding
    #: Limits of one forward pass: the request's, or the model's. The hard limit ends the process.
    soft_limit_s: float
    hard_limit_s: float
    expires_at: float | None
    #: Whether it is for ``batch_predict``, so that its result is a list.
    many: bool = False
    #: Wall clock before which it must not begin.
    eta: float | None = None
    #: The request's limits of all its forward passes together; a model's limits are per pass.
    soft_total_s: float = math.inf
    hard_total_s: float = math.inf
    #: Its position in the order of serving: its rank, then its arrival in this process.
    place: tuple[int, int] = (0, 0)
    #: Seconds that its next pass may take: its soft limit, or the rest of its total time. Set by the buffer.
    soft_left_s: float = 0.0
    #: Tasks of the same kind may share a batch. Set by the buffer.
    kind: tuple[str, int, int] = ("", 0, 0)
    #: Most of its inputs in one batch, after larger batches exceeded their soft limit.
    slice_limit: int | None = None
    #: True once its state in Redis says that it has started.
    marked: bool = False
    #: True once it was found to have a final state while it ran: cancelled, most likely.
    ended: bool = False
    #: Must not share a batch: it was in flight when a worker died, or its batch exceeded its soft limit.
    alone: bool = False
    retries: int = 0
    #: Monotonic time before which it must not run again.
    not_before: float = 0.0
    #: One entry for each input that has run.
    outcomes: list[Any] = field(default_factory=list)
    #: Seconds that it has run so far, in all batches.
    ran_s: float = 0.0
    #: The number of inputs in the largest of its batches.
    batch_size: int = 0
    #: Wall clock of its first batch, for ``inspect active``.
    time_start: float | None = None
    #: Index of an input -> its slot in the pipeline, if inputs are prepared separately.
    prepared: dict[int, Any] | None = None
    #: How much of it is done, 0 to 1, if its model reports that.
    progress: float | None = None
    #: The progress that its state in Redis says.
    progress_told: float | None = None

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def seq(self) -> int:
        return self.claimed.seq

    @property
    def size(self) -> int:
        """Bytes of its arguments as text."""
        return self.envelope.size

    @property
    def begun(self) -> bool:
        """Whether a batch with it has begun: its outcomes so far are known to this process only."""
        return self.time_start is not None

    @property
    def redelivered(self) -> bool:
        return self.envelope.deliveries > 0

    @property
    def total_s(self) -> float:
        """Seconds that all its forward passes together may take."""
        return min(self.soft_total_s, self.hard_total_s)

    def out_of_time(self) -> GpuinferError:
        """Return the error of a task that has run longer than its request allows."""
        if self.ran_s >= self.hard_total_s:
            return TimeLimitExceeded(f"ran longer than its hard limit of {self.hard_total_s:g} s")
        return SoftTimeLimitExceeded(f"ran longer than its soft limit of {self.soft_total_s:g} s")

    @property
    def left(self) -> int:
        """How many of its inputs have not run."""
        return len(self.inputs) - len(self.outcomes)


def _bind(args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind a message's arguments to the signature ``(inputs, model=None, top_k=None, encoding="list")``."""
    if len(args) > len(ARGUMENTS):
        raise InputError(f"takes at most {len(ARGUMENTS)} positional arguments, got {len(args)}", "args")
    bound = {"inputs": args[0]} if len(args) == 1 else dict(zip(ARGUMENTS, args, strict=False))
    for name, value in kwargs.items():
        if name not in ARGUMENTS:
            raise InputError(f"unknown argument; known: {', '.join(ARGUMENTS)}", name)
        if name in bound:
            raise InputError("given twice, by position and by name", name)
        bound[name] = value
    if "inputs" not in bound:
        raise InputError("is missing", "inputs")
    return bound


def _said(value: object) -> str:
    """Return a value for an error's text. That is logged, so of what may be payload only the type is told."""
    return f"{value!r:.60}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _limit(asked: object, most: float, name: str) -> float:
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < math.inf:
        raise InputError(f"must be a number of seconds above 0, got {_said(asked)}", name)
    return min(float(asked), most)


def _asked_limits(value: object) -> tuple[object, object]:
    """Return (hard, soft) of the message's ``timelimit``."""
    if value is None:
        return None, None
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"must be [hard, soft], got {_said(value)}", "timelimit")
    return value[0], value[1]


def _limits(asked: object, manifest: Manifest) -> tuple[float, float, float, float]:
    """Return the soft and the hard limit of a forward pass, and of the whole task, in seconds.

    ``asked``: the message's ``timelimit``. Raises InputError.
    """
    hard, soft = _asked_limits(asked)
    hard_s, soft_s = manifest.hard_time_limit_s, manifest.soft_time_limit_s
    if hard is not None:
        hard_s = _limit(hard, manifest.max_time_limit_s, "time_limit")
    if soft is not None:
        soft_s = _limit(soft, manifest.max_time_limit_s, "soft_time_limit")
    soft_s = min(soft_s, hard_s)
    # The hard limit ends the process, with all its models: a request must not do that before the model's
    # own limits. Below those, only the soft limit ends the task.
    pass_s = max(hard_s, min(manifest.soft_time_limit_s, manifest.hard_time_limit_s))
    return soft_s, pass_s, math.inf if soft is None else soft_s, math.inf if hard is None else hard_s


def _served(model: object, manifests: Mapping[str, Manifest]) -> Manifest:
    """Return a model's manifest. Raises Elsewhere if it is not served here, UnknownModel for a bad name."""
    manifest = manifests.get(model) if isinstance(model, str) else None
    if manifest is not None:
        return manifest
    if not isinstance(model, str) or not MODEL_NAME.fullmatch(model):
        raise UnknownModel(f"{_said(model)} is not a model name", "model")
    raise Elsewhere(model)


def read(
    claimed: Claimed,
    envelope: Envelope,
    manifests: Mapping[str, Manifest],
    max_payload_bytes: int,
    *,
    many: bool,
    beside: bytes | None = None,
) -> Task:
    """Turn a message into a task. ``many``: it is for ``batch_predict``; ``beside``: its body, if that is
    stored outside the list.

    Raises Undecodable for a body without arguments, and InputError, PayloadTooLarge or UnknownModel for
    invalid arguments; all of them are final. Raises Elsewhere if this worker does not serve the model.
    """
    _check_size(claimed, max_payload_bytes, beside)
    args, kwargs, embed = envelope.body(min(2 * max_payload_bytes, MAX_MESSAGE_BYTES))
    if embed.get("chord"):
        raise InputError(
            "a gpuinfer task cannot be part of a chord: send a group, and wait for its results",
            "chord",
        )
    if beside is not None:
        kwargs = {**kwargs, "inputs": envelope.unpack(beside, many=many)}
        envelope.size += len(beside)
    bound = _bind(args, kwargs)
    model = bound.get("model") or claimed.model
    manifest = _served(model, manifests)
    inputs = bound["inputs"]
    if many and not isinstance(inputs, list):
        raise InputError(f"batch_predict takes a list of inputs, got {type(inputs).__name__}", "inputs")
    top_k, encoding = bound.get("top_k"), bound.get("encoding")
    if top_k is not None or encoding is not None:
        check({"top_k": top_k, "encoding": encoding}, _said)
    headers = envelope.headers
    soft_s, hard_s, soft_total_s, hard_total_s = _limits(headers.get("timelimit"), manifest)
    return Task(
        claimed=claimed,
        envelope=envelope,
        model=str(model),
        inputs=inputs if many else [inputs],
        top_k=top_k,
        encoding=encoding or ENCODINGS[0],
        soft_limit_s=soft_s,
        hard_limit_s=hard_s,
        expires_at=moment_of(headers, "expires"),
        many=many,
        eta=moment_of(headers, "eta"),
        soft_total_s=soft_total_s,
        hard_total_s=hard_total_s,
        alone=envelope.deaths > 0,
    )


def _check_size(claimed: Claimed, max_payload_bytes: int, beside: bytes | None) -> None:
    if beside is not None and len(beside) > max_payload_bytes:
        reason = f"its body has {len(beside)} bytes; queue.max_payload_bytes is {max_payload_bytes}"
        raise PayloadTooLarge(reason, "inputs")
    # base64 and the envelope are added to the size that was checked at submission
    most = min(2 * max_payload_bytes, MAX_MESSAGE_BYTES)
    if len(claimed.payload) > most:
        reason = f"the message has {len(claimed.payload)} bytes, at most {most} are read"
        raise PayloadTooLarge(f"{reason} (twice queue.max_payload_bytes, or 8 MiB)", "inputs")


def conclude(task: Task, device: str) -> dict[str, Any] | list[Any] | GpuinferError:
    """Return a finished task's result or error: one value, or for ``batch_predict`` one entry per input.

    In a ``batch_predict``, a failed input has ``{"error": {...}}`` as its entry.
    """
    extra = {"model": task.model, "device": device}
    if not task.many:
        outcome = task.outcomes[0]
        return outcome if isinstance(outcome, GpuinferError) else {**outcome, **extra}
    return [
        {"error": outcome.to_dict()} if isinstance(outcome, GpuinferError) else {**outcome, **extra}
        for outcome in task.outcomes
    ]
