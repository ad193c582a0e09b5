# SPDX-License-Identifier: Apache-2.0
"""The names of everything gpuinfer keeps in Redis.

Tasks wait in lists. A list's coordinates are tier, model, priority and caller. The default model's lists
are the ones that kombu's Redis transport names, so that a plain Celery producer fills them, too:

    realtime                 tier realtime, the default model, priority 0
    realtime\\x06\\x169        the same, priority 9
    realtime.resnet          tier realtime, model resnet
    realtime.resnet@alice    the same, for the tasks of one caller

Tasks are pushed on the left and taken from the right.
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
#: How what lies in Redis is laid out. A program that meets another number ends before it touches anything.
FORMAT = 2
FORMAT_KEY = "gpuinfer:format"
#: Celery's result key prefix; also the channel a result is published on.
RESULT_PREFIX = "celery-task-meta-"
#: A large result, until its task's end is written: then it is renamed, and has not passed through Lua.
BESIDE_PREFIX = "gpuinfer:beside:"
#: The channel on which one client process hears of its tasks' ends.
REPLY_PREFIX = "gpuinfer:reply:"
#: A worker waits on its own wake-up list while it is idle.
WAKE_PREFIX = "gpuinfer:wake:"
#: Model -> its lists that hold work, scored by rank. The empty model: the default model's lists.
INDEX_PREFIX = "gpuinfer:index:"
#: The models that have an index.
INDEXED = "gpuinfer:indexed"
#: Idle workers of all groups, scored by when they last began to wait.
IDLE = "gpuinfer:idle"
#: Idle workers that serve the same, scored by when they were last seen; negative: woken, and about to claim.
IDLE_PREFIX = "gpuinfer:idle:"
#: ``tier.model`` -> the groups of workers that serve it, scored by when one of them was last seen.
GROUPS_PREFIX = "gpuinfer:groups:"
#: List with tasks that wait for their ETA -> when the first of them is due; when the first of all is.
LATER = "gpuinfer:later"
DUE = "gpuinfer:due"
#: A list's tasks that wait for their ETA, scored by when they are due, by Redis's clock.
LATER_PREFIX = "gpuinfer:later:"
INFLIGHT_PREFIX = "gpuinfer:inflight:"
EPOCH_PREFIX = "gpuinfer:epoch:"
#: Idempotency keys of the current period, and of the one before.
KEYED = "gpuinfer:keyed"
KEYED_BEFORE = "gpuinfer:keyed:before"
#: How much may come before what waits is counted again: in all, and of each caller with a quota.
ROOM = "gpuinfer:room"
#: Caller with a quota -> when its next task would be due if all came at its rate, by Redis's clock.
RATES = "gpuinfer:rates"
#: Caller -> its weight among the callers that take turns, where that is not 1.
WEIGHTS = "gpuinfer:weights"
#: Large bodies, each beside the list that holds its task's id. Without a TTL from its submission to its end.
BODY_PREFIX = "gpuinfer:body:"
#: Id -> ``tier bytes caller`` of the body beside the list, of tasks that have not ended.
BODIES = "gpuinfer:bodies"
#: Tier, and ``@caller`` -> bytes of all of these.
BODY_BYTES = "gpuinfer:body-bytes"
HEARTBEAT_PREFIX = "gpuinfer:heartbeat:"
#: Workers, scored by when they were last seen, by Redis's clock.
WORKERS = "gpuinfer:workers"
#: Workers that have left, scored by when: their epochs are forgotten later.
LEFT = "gpuinfer:left"
#: Models the fleet knows, scored by when somebody who could serve them was last seen.
CATALOGUE = "gpuinfer:catalogue"
DEFAULT_MODEL = "gpuinfer:default-model"
#: Model -> what it takes, as JSON: ``texts``, digest -> ``models.signature.Signature`` in JSON, one for each
#: version that hosts have; ``said``, who says so -> when and its digest.
SIGNATURES = "gpuinfer:signatures"
#: Seconds after which what one worker or watcher has said a model takes, and has not repeated, is dropped.
SIGNATURE_VOID_S = 100
#: The queues from which nothing is claimed, as one text: ``batch realtime.resnet``; a tier stands for all its
#: models.
PAUSED = "gpuinfer:paused"
#: The workers that claim nothing until they are resumed, as one text: ``gpu0@a gpu3@b``.
DRAINED = "gpuinfer:drained"
DEAD = "gpuinfer:dead"
#: Dead letters, scored by when they came; and how many bytes they have together.
DEAD_AGES = "gpuinfer:dead:ages"
DEAD_BYTES = "gpuinfer:dead:bytes"
#: Tasks that failed -> their list and message, so that they can be sent again; with their ages and bytes.
FAILED = "gpuinfer:failed"
FAILED_AGES = "gpuinfer:failed:ages"
FAILED_BYTES = "gpuinfer:failed:bytes"
#: A group of several models -> their indices that hold work, in the order of serving.
ORDER_PREFIX = "gpuinfer:order:"
#: Group -> for each of its lists since when it has been passed over (ms), and what was claimed from it until
#: then; the empty field: claims since the last aged one.
AGEING_PREFIX = "gpuinfer:ageing:"
#: Group -> its lists that the last look has found to be passed over for too long; gone when the next is due.
AGED_PREFIX = "gpuinfer:aged:"
#: List -> how much it has been served, among the callers that take turns.
TURNS = "gpuinfer:turns"
#: List -> how many tasks were ever claimed from it, less those that were put back. The default model's
#: lists have its name behind a space.
CLAIMED = "gpuinfer:claimed"
#: ``outcome tier model`` -> how many tasks ended so; ``bytes tier model`` -> bytes of their results.
ENDED = "gpuinfer:ended"
#: By UTC hour: ``requests|errors|refused|bytes_in|bytes_out key model`` and ``device_us caller model``, sums.
#: "-" stands for no key, and for no model.
USAGE_PREFIX = "gpuinfer:usage:"
#: ``kind name name`` -> how much of it there has been since this Redis began (see ``tally``).
COUNTS = "gpuinfer:counts"
#: Key -> when it was used last, in seconds by Redis's clock.
KEY_USED = "gpuinfer:key-used"
#: A process -> the number of the last flush of its counts: one that is repeated adds nothing.
FLUSHED_PREFIX = "gpuinfer:flushed:"
#: Series of numbers -> when each was written last; and the chunks they lie in (see ``series``).
SERIES = "gpuinfer:series"
SERIES_PREFIX = "gpuinfer:series:"
#: What the rates among them were counted from when last (see ``metrics.steps``).
SERIES_STATE = "gpuinfer:watcher:series"
#: The tasks that ended last, the newest first; and those that failed (see ``history``).
HISTORY = "gpuinfer:history"
FAILURES = "gpuinfer:history:failed"

#: Prefixes of the ids that client processes make, scored by when each has said so, by Redis's clock: the
#: newest ``ORIGINS_MOST``. A task of one of these that nothing is kept of has expired.
ORIGINS, ORIGINS_MOST = "gpuinfer:origins", 10_000

#: What the name of a group begins with that serves one model: it needs no order.
ONE_MODEL = "one-"
#: How many tasks that ended are remembered, and how many that failed; as many as this more at times.
HISTORY_MOST, FAILURES_MOST, HISTORY_SLACK = 10_000, 100_000, 1000
#: Separates a caller from the rest of a queue's name; no model's name has it.
CALLER = "@"
#: Bytes that an idempotency key takes in Redis, about.
KEYED_BYTES = 200
#: Bytes of a task that count as one, when what waits is bounded: more than a message with its body in it has.
GRANT_BYTES = 68 * 1024
#: Seconds that a body may lie beside a list before its task is submitted.
BODY_VOID_S = 60
#: Seconds that a large result may lie beside before its task's end is written.
BESIDE_VOID_S = 60
#: Seconds after which an idle worker that has not renewed its entry is taken for gone: two waits and a bit.
IDLE_VOID_S = 2.5
#: Seconds that a woken worker is expected to take until it claims.
WOKEN_VOID_S = 0.5
#: Seconds until a task that is due, and cannot be put into its list, is tried again.
LATER_RETRY_S = 10
#: Seconds after which a group that no worker has renewed is forgotten.
GROUP_VOID_S = 60
#: Seconds after which a worker that holds nothing is forgotten, and its epoch: its name may never come back.
WORKER_VOID_S = 86400
#: Seconds that an hour of usage is kept; and for which a process may try a flush again.
USAGE_KEPT_S = 35 * 86400
FLUSHED_VOID_S = 3600
#: Fields that an hour of usage, and all counts, have at most. What is beyond them counts for "other".
MOST_COUNTS = 20_000
#: Seconds after which a model that nobody could serve is forgotten.
MODEL_VOID_S = 7 * 86400

#: What a caller is called: the name of a key.
CALLER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
CALLER_WORDS = "a key's name, of at most 32 characters a to z, 0 to 9, '_' and '-'"

_LIST = re.compile(
    rf"(?:{'|'.join(QUEUES)})(?:\.{MODEL_NAME.pattern})?(?:{CALLER}[^{CALLER}\x06\x16]+)?(?:{SEP}[0-9])?"
)


class Place(NamedTuple):
    """A list's coordinates."""

    tier: str
    #: Empty: the default model.
    model: str
    caller: str
    priority: int


def queue_name(tier: str, model: str = "", caller: str = "") -> str:
    """Return the name of a queue: what its lists' names begin with."""
    name = f"{tier}.{model}" if model else tier
    return f"{name}{CALLER}{caller}" if caller else name


def list_key(queue: str, priority: int) -> str:
    """Return the list of one priority (0 to 9) of a queue."""
    return f"{queue}{SEP}{priority}" if priority else queue


@lru_cache(maxsize=1024)
def place_of(key: str) -> Place:
    """Return the coordinates of a list, as far as it has any: see ``ours``."""
    queue, _, priority = key.partition(SEP)
    name, _, caller = queue.partition(CALLER)
    tier, _, model = name.partition(".")
    return Place(tier, model, caller, int(priority) if priority.isdecimal() else 0)


def ours(key: str) -> bool:
    """Tell whether this is the name of a list of ours, with a model's and a caller's name as they may be."""
    return _LIST.fullmatch(key) is not None


def rank_of(tier: str, priority: int) -> int:
    """Return the place of a list in the order of serving: 0 the most urgent, 29 the least."""
    return 10 * QUEUES.index(tier) + 9 - priority


def tier_of(queue: str) -> str | None:
    """Return the tier that a queue belongs to, None for a queue that is not ours."""
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
    """Return the index of a model's lists that hold work; without a model, of the default model's."""
    return INDEX_PREFIX + model


def wake(worker: str) -> str:
    """Return the wake-up list of ``worker``."""
    return WAKE_PREFIX + worker


def inflight(worker: str) -> str:
    """Return the hash of what ``worker`` (``gpu0@host``) has claimed and not settled."""
    return INFLIGHT_PREFIX + worker


def epoch(worker: str) -> str:
    """Return the hash of ``worker``'s epoch: its ``number``, and ``by`` whom it was begun.

    Each process begins one, and so does each restore, and each claim with an uncertain outcome.
    """
    return EPOCH_PREFIX + worker


def later(list_key: str) -> str:
    """Return the sorted set of a list's tasks that wait for their ETA."""
    return LATER_PREFIX + list_key


def heartbeat(worker: str) -> str:
    """Return the key of ``worker``'s last heartbeat (see ``gpuinfer.queue.heartbeats``)."""
    return HEARTBEAT_PREFIX + worker


def body(task_id: str) -> str:
    """Return the key of a task's body, where that lies beside the list."""
    return BODY_PREFIX + task_id


def beside(task_id: str) -> str:
    """Return the key under which a task's large result stands until its end is written."""
    return BESIDE_PREFIX + task_id


def result(task_id: str) -> str:
    """Return Celery's result key of a task, which is also its channel."""
    return RESULT_PREFIX + task_id
