# SPDX-License-Identifier: Apache-2.0
"""The names of everything gpuinfer keeps in Redis.

Tasks wait in lists, one for each tier, model, priority and caller. The default model's lists have the names
that kombu's Redis transport uses, so that plain Celery producers can fill them, too:

    realtime                 tier realtime, the default model, priority 0
    realtime\\x06\\x169        the same, priority 9
    realtime.resnet          tier realtime, model resnet
    realtime.resnet@alice    the same, for the tasks of one caller

Tasks are pushed on the left and popped from the right.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from gpuinfer.names import MODEL_NAME, QUEUES

#: kombu's separator between a queue's name and a priority.
SEP = "\x06\x16"
PRIORITIES = range(10)
#: Version of the data format in Redis. A program that finds another number ends before it touches any data.
FORMAT = 2
FORMAT_KEY = "gpuinfer:format"
#: Celery's result key prefix; also the channel a result is published on.
RESULT_PREFIX = "celery-task-meta-"
#: A large result, until its task's end is written: then the key is renamed, so the value never passes through
#: Lua.
BESIDE_PREFIX = "gpuinfer:beside:"
#: The channel on which one client process receives its tasks' ends.
REPLY_PREFIX = "gpuinfer:reply:"
#: A worker waits on its own wake-up list while it is idle.
WAKE_PREFIX = "gpuinfer:wake:"
#: Model -> its lists that have tasks, scored by rank. The empty model: the default model's lists.
INDEX_PREFIX = "gpuinfer:index:"
#: The models that have an index.
INDEXED = "gpuinfer:indexed"
#: Idle workers of all groups, scored by when they last began to wait.
IDLE = "gpuinfer:idle"
#: Idle workers of a group, scored by when they were last seen; negative: woken, and about to claim.
IDLE_PREFIX = "gpuinfer:idle:"
#: ``tier.model`` -> the groups of workers that serve it, scored by when one of them was last seen.
GROUPS_PREFIX = "gpuinfer:groups:"
#: List -> when the first of its tasks with an ETA is due. ``DUE``: when the first of all is due.
LATER = "gpuinfer:later"
DUE = "gpuinfer:due"
#: A list's tasks that wait for their ETA, scored by when they are due, by Redis's clock.
LATER_PREFIX = "gpuinfer:later:"
INFLIGHT_PREFIX = "gpuinfer:inflight:"
EPOCH_PREFIX = "gpuinfer:epoch:"
#: Idempotency keys of the current period, and of the one before.
KEYED = "gpuinfer:keyed"
KEYED_BEFORE = "gpuinfer:keyed:before"
#: Tasks that may be submitted before the waiting ones are counted again: in all, and per caller with a quota.
ROOM = "gpuinfer:room"
#: Caller with a quota -> when its next task would be due at exactly its rate, by Redis's clock.
RATES = "gpuinfer:rates"
#: Caller -> its weight among the callers that take turns, if it is not 1.
WEIGHTS = "gpuinfer:weights"
#: A task's large body, stored beside its list. It has no TTL from the task's submission to its end.
BODY_PREFIX = "gpuinfer:body:"
#: Id of a task that has not ended -> ``tier bytes caller`` of its large body.
BODIES = "gpuinfer:bodies"
#: Tier, or ``@caller`` -> total bytes of their large bodies.
BODY_BYTES = "gpuinfer:body-bytes"
HEARTBEAT_PREFIX = "gpuinfer:heartbeat:"
#: Workers, scored by when they were last seen, by Redis's clock.
WORKERS = "gpuinfer:workers"
#: Workers that have left, scored by when they left. Their epochs are removed later.
LEFT = "gpuinfer:left"
#: Models the fleet knows, scored by when a worker or host that can serve them was last seen.
CATALOGUE = "gpuinfer:catalogue"
DEFAULT_MODEL = "gpuinfer:default-model"
#: Model -> what it takes, as JSON: ``texts``, digest -> ``models.signature.Signature`` as JSON, one for each
#: version that hosts have; ``said``, reporting worker or watcher -> time and digest.
SIGNATURES = "gpuinfer:signatures"
#: Seconds after which a worker's or watcher's report of a signature is dropped unless it was repeated.
SIGNATURE_VOID_S = 100
#: The paused queues, as one text: ``batch realtime.resnet``; a tier means all its models.
PAUSED = "gpuinfer:paused"
#: The workers that claim nothing until they are resumed, as one text: ``gpu0@a gpu3@b``.
DRAINED = "gpuinfer:drained"
DEAD = "gpuinfer:dead"
#: Dead letters, scored by when they were added; and their total bytes.
DEAD_AGES = "gpuinfer:dead:ages"
DEAD_BYTES = "gpuinfer:dead:bytes"
#: Failed task -> its list and message, so that it can be retried; with ages and bytes, as for dead letters.
FAILED = "gpuinfer:failed"
FAILED_AGES = "gpuinfer:failed:ages"
FAILED_BYTES = "gpuinfer:failed:bytes"
#: A group of several models -> their indices that have tasks, in the order of serving.
ORDER_PREFIX = "gpuinfer:order:"
#: Group -> for each of its lists, since when it was passed over (ms), and its count of claimed tasks at that
#: time; the empty field: claims since the last one that began with an aged list.
AGEING_PREFIX = "gpuinfer:ageing:"
#: Group -> its lists that were passed over for too long, by the last check; expires when the next is due.
AGED_PREFIX = "gpuinfer:aged:"
#: List -> how much it was served, among the callers that take turns.
TURNS = "gpuinfer:turns"
#: List -> tasks ever claimed from it, less those that were put back. For the default model's lists, a space
#: and the model's name follow.
CLAIMED = "gpuinfer:claimed"
#: ``outcome tier model`` -> number of tasks; ``bytes tier model`` -> bytes of their results.
ENDED = "gpuinfer:ended"
#: UTC hour -> sums: ``requests|errors|refused|bytes_in|bytes_out key model`` and ``device_us caller model``.
#: "-" means no key, or no model.
USAGE_PREFIX = "gpuinfer:usage:"
#: ``kind name name`` -> count since this Redis began (see ``tally``).
COUNTS = "gpuinfer:counts"
#: Key -> when it was last used, in seconds by Redis's clock.
KEY_USED = "gpuinfer:key-used"
#: Process -> the number of the last flush of its counts, so that a repeated flush adds nothing.
FLUSHED_PREFIX = "gpuinfer:flushed:"
#: Series of numbers -> when it was last written; the prefix of the series' chunks (see ``series``).
SERIES = "gpuinfer:series"
SERIES_PREFIX = "gpuinfer:series:"
#: The last values of the counters from which the rates among the series are computed (see ``metrics.steps``).
SERIES_STATE = "gpuinfer:watcher:series"
#: The tasks that ended last, the newest first; and those that failed (see ``history``).
HISTORY = "gpuinfer:history"
FAILURES = "gpuinfer:history:failed"

#: Prefixes of the ids that known client processes create, scored by when each registered, by Redis's clock;
#: the newest ``ORIGINS_MOST``. A task with such an id but without a state has expired.
ORIGINS, ORIGINS_MOST = "gpuinfer:origins", 10_000

#: Prefix of the name of a group that serves one model: it needs no order.
ONE_MODEL = "one-"
#: Maximum ended tasks, and failed tasks, in the history; there may be up to ``HISTORY_SLACK`` more.
HISTORY_MOST, FAILURES_MOST, HISTORY_SLACK = 10_000, 100_000, 1000
#: Separates the caller from the rest of a queue's name; not allowed in a model's name.
CALLER = "@"
#: Approximate bytes of an idempotency key in Redis.
KEYED_BYTES = 200
#: In the limit of waiting tasks, each full block of this many bytes counts as one more task. It is more than
#: a message with its body takes.
GRANT_BYTES = 68 * 1024
#: Seconds that a large body is kept before its task is submitted.
BODY_VOID_S = 60
#: Seconds that a large result is kept before its task's end is written.
BESIDE_VOID_S = 60
#: Seconds after which an idle worker that has not renewed its entry is taken for gone: a bit over two waits.
IDLE_VOID_S = 2.5
#: Seconds within which a woken worker is expected to claim.
WOKEN_VOID_S = 0.5
#: Seconds until Redis tries again to move a due task that could not be put into its list.
LATER_RETRY_S = 10
#: Seconds after which a group that no worker has renewed is removed.
GROUP_VOID_S = 60
#: Seconds after which a worker that holds no tasks is removed, with its epoch: its name may never come back.
WORKER_VOID_S = 86400
#: Seconds that an hour of usage is kept; seconds for which a process may retry a flush.
USAGE_KEPT_S = 35 * 86400
FLUSHED_VOID_S = 3600
#: Maximum fields of an hour of usage, and of all counts. Further names are counted as "other".
MOST_COUNTS = 20_000
#: Seconds after which a model that no worker or host can serve is removed.
MODEL_VOID_S = 7 * 86400

#: A caller is the name of a key.
CALLER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
CALLER_WORDS = "a key's name, of at most 32 characters a to z, 0 to 9, '_' and '-'"

_LIST = re.compile(
    rf"(?:{'|'.join(QUEUES)})(?:\.{MODEL_NAME.pattern})?(?:{CALLER}[^{CALLER}\x06\x16]+)?(?:{SEP}[0-9])?"
)


class Place(NamedTuple):
    """The parts of a list's name."""

    tier: str
    #: Empty: the default model.
    model: str
    caller: str
    priority: int


def queue_name(tier: str, model: str = "", caller: str = "") -> str:
    """Return the name of a queue, with which the names of its lists begin."""
    name = f"{tier}.{model}" if model else tier
    return f"{name}{CALLER}{caller}" if caller else name


def list_key(queue: str, priority: int) -> str:
    """Return the list of one priority (0 to 9) of a queue."""
    return f"{queue}{SEP}{priority}" if priority else queue


@lru_cache(maxsize=1024)
def place_of(key: str) -> Place:
    """Return the parts of a list's name. Valid only for our lists: see ``ours``."""
    queue, _, priority = key.partition(SEP)
    name, _, caller = queue.partition(CALLER)
    tier, _, model = name.partition(".")
    return Place(tier, model, caller, int(priority) if priority.isdecimal() else 0)


def ours(key: str) -> bool:
    """Tell whether this is the name of a list of ours: tier, valid model and caller, and priority."""
    return _LIST.fullmatch(key) is not None


def tier_of(queue: str) -> str | None:
    """Return the tier of a queue; None for a queue that is not ours."""
    return place_of(queue).tier if ours(queue) and SEP not in queue else None


def lists(tiers: Iterable[str], models: Sequence[str] = ("",)) -> list[str]:
    """Return the lists of these tiers and models that a plain Celery producer may fill."""
    return [
        list_key(queue_name(tier, model), priority)
        for tier in tiers
        for model in models
        for priority in reversed(PRIORITIES)
    ]


def group_of(tiers: Iterable[str], models: Iterable[str]) -> str:
    """Return the name of the group of workers that serve these tiers and models."""
    names = sorted(models)
    text = f"{' '.join(tiers)}|{' '.join(names)}"
    return (ONE_MODEL if len(names) == 1 else "") + hashlib.sha256(text.encode()).hexdigest()[:16]


def index(model: str = "") -> str:
    """Return the key of the index of a model's lists that have tasks; '': of the default model's lists."""
    return INDEX_PREFIX + model


def wake(worker: str) -> str:
    """Return the key of ``worker``'s wake-up list."""
    return WAKE_PREFIX + worker


def inflight(worker: str) -> str:
    """Return the key of the hash of tasks that ``worker`` (``gpu0@host``) has claimed and not settled."""
    return INFLIGHT_PREFIX + worker


def epoch(worker: str) -> str:
    """Return the key of the hash of ``worker``'s epoch: its ``number``, and who began it (``by``).

    Each process begins one, and so does each restore, and each claim with an uncertain outcome.
    """
    return EPOCH_PREFIX + worker


def later(list_key: str) -> str:
    """Return the key of the sorted set of a list's tasks that wait for their ETA."""
    return LATER_PREFIX + list_key


def heartbeat(worker: str) -> str:
    """Return the key of ``worker``'s last heartbeat (see ``gpuinfer.queue.heartbeats``)."""
    return HEARTBEAT_PREFIX + worker


def body(task_id: str) -> str:
    """Return the key of a task's large body, which is stored beside the list."""
    return BODY_PREFIX + task_id


def beside(task_id: str) -> str:
    """Return the key of a task's large result until the task's end is written."""
    return BESIDE_PREFIX + task_id


def result(task_id: str) -> str:
    """Return Celery's result key of a task, which is also its channel."""
    return RESULT_PREFIX + task_id
