# SPDX-License-Identifier: Apache-2.0
"""The calls of the submit script: makes its arguments from checked tasks, and reads its answers.

Does no I/O: the clients send the calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from gpuinfer.errors import PayloadTooLarge
from gpuinfer.queue import keys
from gpuinfer.queue.bodies import check_items
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.message import BATCH_PREDICT
from gpuinfer.queue.quota import Rate
from gpuinfer.queue.submission import Json, Packed, Submission
from gpuinfer.settings import QueueSettings

#: One call of the script has at most this many tasks, or about this many bytes.
CHUNK_TASKS, CHUNK_BYTES = 500, 1024 * 1024
#: Maximum calls of the script in one round trip.
CALLS_A_TRIP = 8
#: Number of arguments of a call before those of its tasks.
HEAD = 11


class Call(NamedTuple):
    """One call of the submit script, and the large bodies that are set before it."""

    ids: tuple[str, ...]
    args: list[bytes | str | int]
    #: Key -> body. The keys are the script's.
    bodies: Mapping[str, bytes] = MappingProxyType({})

    def commands(self) -> Iterator[tuple[Argument, ...]]:
        """Yield the commands to send before the script, in the same packet.

        They may be repeated after a lost answer: an existing body is not overwritten.
        """
        for key, body in self.bodies.items():
            yield ("SET", key, body, "EX", keys.BODY_VOID_S, "NX")

    @property
    def least(self) -> int:
        """The size of its smallest task in bytes."""
        payloads = self.args[HEAD + 1 :: 3]
        return min(
            len(str(payload) if isinstance(payload, int) else payload)
            + len(self.bodies.get(keys.body(one), b""))
            for one, payload in zip(self.ids, payloads, strict=True)
        )

    def halves(self) -> tuple[Call, Call]:
        """Return two calls that together submit the same tasks, in the same order."""
        middle = len(self.ids) // 2
        return self._part(0, middle), self._part(middle, len(self.ids))

    def first(self, count: int) -> Call:
        """Return a call that submits only the first ``count`` tasks."""
        return self._part(0, count)

    def without(self, count: int) -> Call:
        """Return a call that submits all but the first ``count`` tasks."""
        return self._part(count, len(self.ids))

    def _part(self, first: int, last: int) -> Call:
        ids = self.ids[first:last]
        tasks = self.args[HEAD + 3 * first : HEAD + 3 * last]
        for at in range(2, len(tasks), 3):
            number, end, rest = cast("bytes", tasks[at]).partition(b"]")
            tasks[at] = b"%d%b%b" % (int(number) and at // 3 + 1, end, rest)
        args = self.args[:HEAD] + tasks
        bodies = {key: self.bodies[key] for key in map(keys.body, ids) if key in self.bodies}
        return Call(ids, args, bodies)


def _pack(submission: Submission, settings: QueueSettings) -> Packed:
    if submission.task == BATCH_PREDICT:
        inputs = submission.inputs.value if isinstance(submission.inputs, Json) else submission.inputs
        with suppress(TypeError):  # without a length it is not a list: pack() refuses it
            check_items(len(inputs), settings.max_items)
    packed = submission.pack()
    if packed.size > settings.max_payload_bytes:
        raise PayloadTooLarge(
            f"the message has {packed.size} bytes; queue.max_payload_bytes is {settings.max_payload_bytes}",
            "inputs",
        )
    return packed


def _call(
    submission: Submission, tasks: Sequence[tuple[str, Packed]], settings: QueueSettings, key: str = ""
) -> Call:
    args: list[bytes | str | int] = [
        submission.queue,
        submission.model or "",
        submission.caller,
        submission.priority,
        f"{settings.max_waiting} {settings.max_waiting_bytes}",
        key,
        settings.idempotency_ttl_s,
        settings.max_keys,
        "" if submission.countdown_s is None else repr(float(submission.countdown_s)),
        settings.max_later,
        "" if submission.quota is None else submission.quota.text,
    ]
    waits = submission.countdown_s is None
    for number, (task_id, packed) in enumerate(tasks, 1):
        args += (task_id, packed.payload, b"%d%b" % (number if waits else 0, packed.told))
    bodies = {keys.body(task_id): packed.beside for task_id, packed in tasks if packed.beside is not None}
    return Call(tuple(task_id for task_id, _ in tasks), args, bodies)


def one(submission: Submission, settings: QueueSettings) -> Call:
    """Return the call that submits one task. Raises InputError, PayloadTooLarge."""
    packed = _pack(submission, settings)
    key = submission.keyed + submission.digest(packed) if submission.key else ""
    return _call(submission, [(submission.id, packed)], settings, key)


class Ready(NamedTuple):
    """A checked task, and its message."""

    submission: Submission
    packed: Packed

    @property
    def place(self) -> tuple[str, str | None, str, int, float | None]:
        """Its list, and its delay: tasks with the same list and delay can go in one call."""
        task = self.submission
        return task.queue, task.model, task.caller, task.priority, task.countdown_s


def pack(submission: Submission, settings: QueueSettings) -> Ready:
    """Write a task's message. Raises InputError, PayloadTooLarge."""
    return Ready(submission, _pack(submission, settings))


def bulk(submissions: Iterable[Submission], settings: QueueSettings) -> Iterator[Call]:
    """Yield the calls that submit tasks of one queue and priority. Raises InputError, PayloadTooLarge."""
    return _chunks((pack(submission, settings) for submission in submissions), settings)


def trip(calls: Iterator[Call]) -> list[Call]:
    """Return the next calls that go in one round trip: several small ones, or one with large bodies.

    A packet of many megabytes takes twice as long to copy as several of one.
    """
    some: list[Call] = []
    for call in calls:
        some.append(call)
        if call.bodies or len(some) >= CALLS_A_TRIP:
            break
    return some


def note(calls: Sequence[Call], answers: Sequence[object], accepted: list[str]) -> None:
    """Add the ids of accepted tasks to ``accepted``; then raise the first error among the answers."""
    for call, answer in zip(calls, answers, strict=True):
        if not isinstance(answer, BaseException):
            accepted += call.ids
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


def joined(tasks: Iterable[Ready], settings: QueueSettings) -> Iterator[Call]:
    """Yield the calls that submit tasks for any lists: one per list, or more if there are too many tasks."""
    places: dict[tuple[str, str | None, str, int, float | None], list[Ready]] = {}
    for task in tasks:
        places.setdefault(task.place, []).append(task)
    for together in places.values():
        yield from _chunks(together, settings)


def _chunks(ready: Iterable[Ready], settings: QueueSettings) -> Iterator[Call]:
    tasks: list[tuple[str, Packed]] = []
    size = 0
    submission: Submission | None = None
    for submission, packed in ready:
        tasks.append((submission.id, packed))
        size += packed.size
        if len(tasks) >= CHUNK_TASKS or size >= CHUNK_BYTES:
            yield _call(submission, tasks, settings)
            tasks, size = [], 0
    if submission is not None and tasks:
        yield _call(submission, tasks, settings)


class Accepted(NamedTuple):
    """The answer to a call of the submit script."""

    #: The id of the first task, or of the earlier one with its idempotency key.
    id: str
    #: The rest of the caller's rate limit.
    rate: Rate | None = None


def accepted(answer: Any) -> Accepted:
    """Read the answer to a call of the submit script."""
    if isinstance(answer, list):
        holder, remaining, reset_s = answer
        return Accepted(holder.decode(), Rate(int(remaining), float(reset_s)))
    return Accepted(answer.decode())


def fitting(exc: BaseException) -> int | None:
    """Return how many of a refused call's first tasks fit the caller's quota.

    None: the call was refused for another reason, or the number depends on the tasks' sizes.
    """
    found = _FITTING.search(str(exc))
    return int(found[1]) if found else None


_FITTING = re.compile(r"(?:RATE_LIMITED|KEY_FULL tasks) (\d+) ")


def full(exc: BaseException) -> Literal["", "any", "size"]:
    """Tell whether a queue is full: for any task (``any``), or for tasks of this size (``size``)."""
    text = str(exc)
    if "QUEUE_FULL bytes" in text or "KEY_FULL bytes" in text:
        return "size"
    return "any" if "QUEUE_FULL " in text or "LATER_FULL " in text else ""


def answer_of(*answers: Any) -> Any:
    """Return the answer to a call: the last one, or the error of setting a body that the script missed."""
    if isinstance(answers[-1], Exception) and "BODY_GONE" in str(answers[-1]):
        return next((answer for answer in answers if isinstance(answer, Exception)), answers[-1])
    return answers[-1]
