# SPDX-License-Identifier: Apache-2.0
"""What both drivers share: calls of the scripts from a caller's arguments, and what a publication says.

No input, no output.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Unpack, cast

import orjson

from gpuinfer.errors import (
    BrokerError,
    GpuinferError,
    InputError,
    PayloadTooLarge,
    ResultGone,
    TaskNotFound,
    TaskRevoked,
    UnreadableResult,
    WrongState,
)
from gpuinfer.queue import keys, results
from gpuinfer.queue.bodies import check_items
from gpuinfer.queue.direct import Argument
from gpuinfer.queue.message import BATCH_PREDICT, PREDICT, ROUTES
from gpuinfer.queue.options import MAX_NAME, Options, check
from gpuinfer.queue.quota import Quota, Rate
from gpuinfer.queue.results import TaskStatus
from gpuinfer.queue.submission import Json, Packed, Submission, keyed
from gpuinfer.settings import QueueSettings

log = logging.getLogger(__name__)

#: One call of the script carries at most this many tasks, or about this many bytes.
CHUNK_TASKS, CHUNK_BYTES = 500, 1024 * 1024
#: Calls of the script that go in one round trip, and states that one MGET reads.
CALLS_A_TRIP, LOOK = 8, 1000


class Call(NamedTuple):
    """One call of the submit script, and the large bodies that are set before it."""

    ids: tuple[str, ...]
    args: list[bytes | str | int]
    #: Key -> body. The keys are the script's.
    bodies: Mapping[str, bytes] = MappingProxyType({})

    def commands(self) -> Iterator[tuple[Argument, ...]]:
        """Yield the commands to send before the script, in the same packet.

        Repeated because an answer was lost, they do no harm: a body that is there stays as it is.
        """
        for key, body in self.bodies.items():
            yield ("SET", key, body, "EX", keys.BODY_VOID_S, "NX")

    @property
    def least(self) -> int:
        """The bytes of its smallest task."""
        payloads = self.args[_HEAD + 1 :: 3]
        return min(
            len(str(payload) if isinstance(payload, int) else payload)
            + len(self.bodies.get(keys.body(one), b""))
            for one, payload in zip(self.ids, payloads, strict=True)
        )

    def halves(self) -> tuple[Call, Call]:
        """Return two calls that together submit the same tasks, in their order."""
        middle = len(self.ids) // 2
        return self._part(0, middle), self._part(middle, len(self.ids))

    def first(self, count: int) -> Call:
        """Return a call that submits the first tasks alone."""
        return self._part(0, count)

    def without(self, count: int) -> Call:
        """Return a call that submits the tasks behind the first ones."""
        return self._part(count, len(self.ids))

    def _part(self, first: int, last: int) -> Call:
        ids = self.ids[first:last]
        tasks = self.args[_HEAD + 3 * first : _HEAD + 3 * last]
        for at in range(2, len(tasks), 3):
            number, end, rest = cast("bytes", tasks[at]).partition(b"]")
            tasks[at] = b"%d%b%b" % (int(number) and at // 3 + 1, end, rest)
        args = self.args[:_HEAD] + tasks
        bodies = {key: self.bodies[key] for key in map(keys.body, ids) if key in self.bodies}
        return Call(ids, args, bodies)


#: Seconds after which a process that submits says again whose ids it makes.
TELL_EVERY_S = 3600
#: The arguments of a call before those of its tasks.
_HEAD = 11


def fitting(exc: BaseException) -> int | None:
    """Return how many tasks of a call, the first ones, its caller's quota has room for; None: that is not why
    the call was refused, or it depends on their sizes.
    """
    found = _FITTING.search(str(exc))
    return int(found[1]) if found else None


_FITTING = re.compile(r"(?:RATE_LIMITED|KEY_FULL tasks) (\d+) ")


def full(exc: BaseException) -> Literal["", "any", "size"]:
    """Tell whether a call was refused because there is no room: for any task, or for this many bytes."""
    text = str(exc)
    if "QUEUE_FULL bytes" in text or "KEY_FULL bytes" in text:
        return "size"
    return "any" if "QUEUE_FULL " in text or "LATER_FULL " in text else ""


def answer_of(*answers: Any) -> Any:
    """Return the answer to a call: the last, or why a body was not taken that the script did not find."""
    if isinstance(answers[-1], Exception) and "BODY_GONE" in str(answers[-1]):
        return next((answer for answer in answers if isinstance(answer, Exception)), answers[-1])
    return answers[-1]


class Origin:
    """What one client process puts into its messages: where it hears of their ends, and ids of its own.

    Ids are UUIDs whose first 48 bits are the process's, so that it knows its own without keeping them. The
    other 74 are random.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self.pid = os.getpid()
        prefix = random(6).hex()
        self.prefix = prefix
        self._start = f"{prefix[:8]}-{prefix[8:]}-4"
        self.channel = keys.REPLY_PREFIX + prefix
        self._told_at = -math.inf

    def new_id(self) -> str:
        """Return the id of a new task."""
        digits = self._random(10).hex()  # uuid.UUID takes three times as long
        return f"{self._start}{digits[:3]}-{_VARIANT[digits[3]]}{digits[4:7]}-{digits[7:19]}"

    def made(self, task_id: str) -> bool:
        """Tell whether a task came from this process: its end is told on the reply channel."""
        return self.prefix == prefix_of(task_id)

    def to_tell(self) -> bool:
        """Tell whether Redis is to be told of this process now, before a submission: at first, and each hour.

        With that any other process knows a task of this one's that has expired. It is taken for told then.
        """
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY_S:
            return False
        self._told_at = now
        return True

    def tell_again(self) -> None:
        """It could not be told."""
        self._told_at = -math.inf


#: A random hex digit -> one with the variant of a UUID in its two highest bits.
_VARIANT = {f"{digit:x}": "89ab"[digit & 3] for digit in range(16)}


def prefix_of(task_id: str) -> str:
    """Return the prefix of the client process that made an id; for another's it is nobody's."""
    return task_id[:8] + task_id[9:13]


def reply_channel(task_id: str) -> str:
    """Return the reply channel of the client process that made an id; nobody listens there for another's."""
    return keys.REPLY_PREFIX + prefix_of(task_id)


def build(
    inputs: Any,
    *,
    many: bool,
    origin: Origin | None = None,
    default_model: str | None = None,
    clock: Callable[[], float] = time.time,
    task_id: str | None = None,
    caller: str = "",
    quota: Quota | None = None,
    **options: Unpack[Options],
) -> Submission:
    """Check a caller's arguments. Raises InputError naming the field.

    ``default_model`` is the model of a caller that names none; without it, the fleet's default then.
    ``task_id`` is an id of the caller's own, under which there is one request. ``caller`` is whose task it
    is, ``quota`` what that one may submit.
    """
    if caller and not keys.CALLER_NAME.fullmatch(caller):
        raise InputError(f"must be {keys.CALLER_WORDS}, got {caller!r:.80}", "caller")
    if not options and task_id is None:  # most requests
        return Submission(
            task=BATCH_PREDICT if many else PREDICT,
            inputs=inputs,
            queue=ROUTES[BATCH_PREDICT if many else PREDICT],
            model=default_model,
            reply_to="" if origin is None else origin.channel,
            caller=caller,
            quota=quota,
            id=str(uuid.uuid4()) if origin is None else origin.new_id(),
        )
    check(options)
    key = options.get("idempotency_key") or ""
    if task_id is not None:
        if key:
            raise InputError("the task's id stands for the request; leave the key out", "idempotency_key")
        if not _OWN_ID.fullmatch(task_id):
            raise InputError(
                f"must be 1 to {MAX_NAME} of A to Z, a to z, 0 to 9, '_', '.', ':' and '-'", "task_id"
            )
        key = _own_key(task_id)
    task = BATCH_PREDICT if many else PREDICT
    expires_s, countdown_s = options.get("expires_s"), options.get("countdown_s")
    if expires_s is not None and countdown_s is not None and expires_s <= countdown_s:
        raise InputError(f"must be less than expires_s ({expires_s:g}), got {countdown_s:g}", "countdown_s")
    extra: dict[str, Any] = {}
    if (top_k := options.get("top_k")) is not None:
        extra["top_k"] = top_k
    if (encoding := options.get("encoding")) is not None:
        extra["encoding"] = encoding
    return Submission(
        task=task,
        inputs=inputs,
        queue=options.get("queue") or ROUTES[task],
        priority=options.get("priority", 0),
        model=options.get("model") or default_model,
        options=extra,
        expires_at=None if expires_s is None else clock() + expires_s,
        countdown_s=countdown_s,
        soft_time_limit_s=options.get("soft_time_limit_s"),
        time_limit_s=options.get("time_limit_s"),
        ignore_result=options.get("ignore_result", False),
        reply_to="" if origin is None or not (task_id is None or origin.made(task_id)) else origin.channel,
        metadata=options.get("metadata"),
        traceparent=options.get("traceparent") or "",
        asked=_asked(task, options) if key else b"",
        key=key,
        caller=caller,
        quota=quota,
        id=task_id or (str(uuid.uuid4()) if origin is None else origin.new_id()),
    )


def _own_key(task_id: str) -> str:
    return f"PUT {task_id}"


_OWN_ID = re.compile(rf"[A-Za-z0-9_.:-]{{1,{MAX_NAME}}}")


def _asked(task: str, options: Options) -> bytes:
    """Return what is asked, beside the inputs, for comparison: what is left out is as what is None."""
    given = {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("idempotency_key", "traceparent")
    }
    return orjson.dumps([task, given], option=orjson.OPT_SORT_KEYS)


def _pack(submission: Submission, settings: QueueSettings) -> Packed:
    if submission.task == BATCH_PREDICT:
        inputs = submission.inputs.value if isinstance(submission.inputs, Json) else submission.inputs
        with suppress(TypeError):  # what has no length is no list, as is said below
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
        """Which list it goes to, and when: tasks of one list and time can go in one call."""
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


def joined(tasks: Iterable[Ready], settings: QueueSettings) -> Iterator[Call]:
    """Yield the calls that submit tasks of any lists, in order: one for each list, unless it is too large."""
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


# -- what both drivers wait for ---------------------------------------------------------------


def not_found(task_id: str) -> TaskNotFound:
    """Return the error for an id Redis knows nothing of."""
    return TaskNotFound(
        f"no task {task_id}: it was never submitted here, or its result has expired (what a plain Celery "
        "producer has sent is known once it runs)",
        "task_id",
    )


def of_task(task_id: str, exc: BrokerError) -> GpuinferError:
    """Return the error for a task whose key has another type, any other error as it is."""
    return results.unreadable(task_id, "no text") if "WRONGTYPE" in str(exc) else exc


def gone(task_id: str) -> ResultGone:
    """Return the error for an id that was submitted, and of which Redis knows nothing any more."""
    return ResultGone(f"task {task_id} is known, but its result has expired or was deleted", "task_id")


def known_args(task_ids: Iterable[str], only: str | None = None) -> list[str]:
    """Return the arguments of the script that tells which ids were submitted once. ``only``: who asks."""
    return [
        part
        for task_id in task_ids
        for part in (task_id, prefix_of(task_id), keyed(only or "", _own_key(task_id)))
    ]


def refused_erasure(answer: int, task_id: str) -> WrongState:
    """Return why a task cannot be forgotten of which something is known, by the answer of the script."""
    why = "has not ended; cancel it first" if answer == -1 else "was cancelled, and its message still waits"
    return WrongState(f"task {task_id} {why}", "task_id")


def owned(status: TaskStatus, only: str | None) -> bool:
    """Tell whether a task may be seen by ``only`` (None: by all): it is its own, or nobody's."""
    return only is None or status.caller in ("", only)


class Accepted(NamedTuple):
    """The answer to a call of the submit script."""

    #: The id that holds: that of the first task, or the one that its key stands for.
    id: str
    #: How a caller with a quota stands then.
    rate: Rate | None = None


def accepted(answer: Any) -> Accepted:
    """Read the answer to a call of the submit script."""
    if isinstance(answer, list):
        holder, remaining, reset_s = answer
        return Accepted(holder.decode(), Rate(int(remaining), float(reset_s)))
    return Accepted(answer.decode())


def no_retry(status: TaskStatus) -> WrongState:
    """Return the error for a task whose inputs are not kept."""
    if not status.final:
        return WrongState(f"task {status.id} has not ended: there is nothing to retry", "task_id")
    if status.state == "failed":
        return WrongState(
            f"task {status.id} failed, and its inputs are gone: submit it again. They are kept within "
            "queue.max_failed, max_failed_bytes and failed_ttl_s",
            "task_id",
        )
    state = _SAID.get(status.state, status.state)
    return WrongState(f"task {status.id} is {state}: only one that failed can be sent again", "task_id")


#: What a state is called to people, where that differs.
_SAID = {"revoked": "cancelled"}


def result_key(task_id: object) -> str:
    """Return where a task's state stands. Raises InputError for what is no id."""
    if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_NAME:
        said = f"a text of {len(task_id)} characters" if isinstance(task_id, str) else repr(task_id)[:80]
        raise InputError(f"must be a text of 1 to {MAX_NAME} characters, got {said}", "task_id")
    return keys.result(task_id)


def cancel_call(
    task_id: str, origin: Origin, settings: QueueSettings, only: str | None = None
) -> tuple[list[str], list[bytes | str | int]]:
    """Return keys and arguments of the script that cancels. Raises InputError.

    ``only``: the caller whose task it must be; None: anybody's.

    Of a plain producer's task nothing is known while it waits: its end is written in advance, and the
    worker that claims it skips it. A task of one's own that nothing is known of has ended, and its result is
    gone.
    """
    key, ttl_s = result_key(task_id), settings.result_ttl_s
    known = results.failure(task_id, TaskRevoked("it was cancelled"), worker="")
    words = f"nothing was known of it when it was cancelled; should it come within {ttl_s} s, it does not run"
    unknown = results.failure(task_id, TaskRevoked(words), worker="")
    if only or origin.made(task_id):
        unknown = b""
    channel, prefix = reply_channel(task_id), prefix_of(task_id)
    return [key], [task_id, known, ttl_s, channel, unknown, prefix, *only_args(only)]


def only_args(only: str | None) -> list[str]:
    """Return whose task it must be as the scripts take it: nothing for anybody's."""
    return [] if only is None else [only]


class Waiting:
    """The tasks that one wait is for, and what is known of them. No input, no output."""

    def __init__(
        self, task_ids: Iterable[str], origin: Origin, only: str | None = None, *, raw: bool = False
    ) -> None:
        """``only``: another caller's tasks are as if they were unknown; ``raw``: as for ``results.parse``."""
        self._origin, self.only, self._raw = origin, only, raw
        #: Id -> whether Redis has known it. Raises InputError for what is no id.
        self._known: dict[str, bool] = {}
        for task_id in task_ids:
            result_key(task_id)
            self._known[task_id] = False
        #: Of which Redis was asked whether they were submitted once.
        self._asked: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def ids(self) -> list[str]:
        """Those that have not ended."""
        return list(self._known)

    def channels(self) -> list[str]:
        """Return where their ends are told: on our reply channel, and others' by their ids."""
        others = [result_key(task_id) for task_id in self._known if not self._origin.made(task_id)]
        return [self._origin.channel, *others] if len(others) < len(self._known) else others

    def told(self, status: TaskStatus) -> bool:
        """Tell whether this ends one of them; it is waited for no more then."""
        ends = status.final and owned(status, self.only)
        return ends and self._known.pop(status.id, None) is not None

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._known

    def missing(self, task_ids: Sequence[str], metas: Sequence[bytes | None]) -> list[str]:
        """Return those of which nothing is there, and of which Redis is to be asked whether it ever was."""
        found = [
            task_id
            for task_id, meta in zip(task_ids, metas, strict=True)
            if meta is None and self._known.get(task_id) is False and task_id not in self._asked
            if not self._origin.made(task_id)
        ]
        self._asked.update(found)
        return found

    def visible(self, task_ids: Sequence[str], metas: Sequence[bytes | None]) -> Sequence[bytes | None]:
        """Return what stands under some keys, without what is another caller's. Raises UnreadableResult."""
        if self.only is None:
            return metas
        return [
            meta if meta is not None and owned(results.parse(task_id, meta, raw=True), self.only) else None
            for task_id, meta in zip(task_ids, metas, strict=True)
        ]

    def expired(self, task_ids: Sequence[str], known: Sequence[int]) -> None:
        """Take the answer to that: those that were have been known. Nothing: nobody could tell."""
        for task_id, is_known in zip(task_ids, known, strict=False):
            self._known[task_id] = bool(is_known)

    def looked(
        self, task_ids: Sequence[str], metas: Sequence[bytes | None], *, patient: bool
    ) -> list[TaskStatus]:
        """Return which of these have ended, by what stands under their keys. Raises TaskNotFound.

        With patience, an id that was never known may be a plain Celery producer's task, which waits.
        """
        ended = []
        for task_id, meta in zip(task_ids, metas, strict=True):
            if task_id not in self._known:
                continue
            if meta is None:
                if self._known[task_id] or self._origin.made(task_id):
                    raise gone(task_id)
                if patient:
                    continue
                raise not_found(task_id)
            self._known[task_id] = True
            status = results.parse(task_id, meta, raw=self._raw)
            if self.told(status):
                ended.append(status)
        return ended


def goes_on(task_id: str, meta: bytes | None) -> bool:
    """Tell by what stands under a task's key whether it has not ended. A failure that was told is old then:
    the task has been sent again.
    """
    try:
        return meta is not None and not results.parse(task_id, meta).final
    except UnreadableResult:
        return False


def heard(channel: str, data: bytes, origin: Origin) -> list[TaskStatus] | None:
    """Read what was published on a channel; None: it cannot be read, so look at what is waited for.

    Anybody may publish there; nobody else's wait ends with what somebody cannot write.
    """
    try:
        if channel == origin.channel:
            return results.parse_many(data)
        return [results.parse(channel.removeprefix(keys.RESULT_PREFIX), data)]
    except (UnreadableResult, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        fields = {"channel": channel, "reason": type(exc).__name__, "bytes": len(data)}
        log.warning(
            "Unreadable publication on %s: %s",
            *(channel, type(exc).__name__),
            extra={"action": "unreadable_publication", "fields": fields},
        )
        return None
