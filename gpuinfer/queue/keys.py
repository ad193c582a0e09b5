# SPDX-License-Identifier: Apache-2.0
"""The names of everything gpuinfer keeps in Redis.

A queue is ten lists, one for each priority, named as kombu's Redis transport names them, so that
a plain Celery producer fills the same lists. Tasks are pushed on the left and taken from the right.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuinfer.settings import QUEUES

#: kombu's separator between a queue's name and a priority.
SEP = "\x06\x16"
PRIORITIES = range(10)
#: Celery's result key prefix; also the channel a result is published on.
RESULT_PREFIX = "celery-task-meta-"
BELL_PREFIX = "gpuinfer:bell:"
INFLIGHT_PREFIX = "gpuinfer:inflight:"
LIFE_PREFIX = "gpuinfer:life:"
IDEMPOTENCY_PREFIX = "gpuinfer:key:"
HEARTBEAT_PREFIX = "gpuinfer:heartbeat:"
DEAD = "gpuinfer:dead"
WAITING = "gpuinfer:waiting"
#: List -> how many tasks were ever claimed from it, less those that were put back.
CLAIMED = "gpuinfer:claimed"


def list_key(queue: str, priority: int) -> str:
    """Return the list of one priority (0 to 9) of a queue."""
    return f"{queue}{SEP}{priority}" if priority else queue


def split_list_key(key: str) -> tuple[str, int]:
    """Return the queue and the priority a list belongs to."""
    queue, _, priority = key.partition(SEP)
    return queue, int(priority or 0)


def serving_order(queues: Sequence[str]) -> tuple[str, ...]:
    """Return the lists of ``queues`` in the order they are served.

    Queues in the order realtime, default, batch; within each, priority 9 first.
    """
    known = [queue for queue in QUEUES if queue in queues]
    return tuple(list_key(queue, priority) for queue in known for priority in reversed(PRIORITIES))


def bell(queue: str) -> str:
    """Return the list that producers ring when they add to ``queue``."""
    return BELL_PREFIX + queue


def inflight(worker: str) -> str:
    """Return the hash of what ``worker`` (``gpu0@host``) has claimed and not settled."""
    return INFLIGHT_PREFIX + worker


def life(worker: str) -> str:
    """Return the counter of ``worker``'s lives: each process, restore, and doubt about a claim counts one."""
    return LIFE_PREFIX + worker


def heartbeat(worker: str) -> str:
    """Return the key of ``worker``'s last sign of life (see ``gpuinfer.queue.beats``)."""
    return HEARTBEAT_PREFIX + worker


def result(task_id: str) -> str:
    """Return Celery's result key of a task, which is also its channel."""
    return RESULT_PREFIX + task_id
