# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the queue: claim, begin, settle, release, restore, each one atomic script.

Between claim and settle a task stands in the worker's in-flight hash, never only in a process's
memory. Scripts run with allow-oom and without MULTI, so a full Redis does not stop them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import redis

from gpuinfer.errors import DeadLettered, GpuinferError, WorkerRunning
from gpuinfer.log import get_logger
from gpuinfer.queue import keys, results
from gpuinfer.queue.direct import Argument, Direct
from gpuinfer.queue.message import Undecodable, decode
from gpuinfer.queue.scripts import bind
from gpuinfer.settings import QueueSettings

log = get_logger(__name__)

#: Payload bytes that one claim takes at most, unless told otherwise.
MAX_BYTES = 64 * 1024 * 1024
#: How many sequence ids a life has: numbers stay exact in Lua, and a life lasts for days.
SEQS_OF_A_LIFE = 2**32


@dataclass(frozen=True, slots=True)
class Claimed:
    """A task this worker owns until it settles or releases it."""

    #: Its field in the in-flight hash; ``seq:list`` names the list it came from.
    seq: int
    list_key: str
    #: Its list's place in the order of serving, 0 the most urgent.
    rank: int
    payload: bytes
    #: True when its list was passed over for too long: its first batch goes before all.
    aged: bool = False
    #: The id under which the claim has noted that it runs; None where it has not.
    noted_id: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A claim as it is sent to Redis. One at a time: the next one's sequence ids depend on its answer."""

    keys: Sequence[str]
    args: Sequence[Argument]
    #: The lists it claims from, the most urgent first.
    lists: Sequence[str]
    #: The life it belongs to. Redis refuses it in a later one.
    life: int
    sha: str

    @property
    def command(self) -> tuple[Argument, ...]:
        """The whole command. Redis may have forgotten the script; ``Store.claim`` loads it."""
        return ("EVALSHA", self.sha, len(self.keys), *self.keys, *self.args)


@dataclass(frozen=True, slots=True)
class Final:
    """The end of one task: its place in flight, its id (empty: no state is written), and its final meta."""

    seq: int | None
    task_id: str
    meta: bytes
    #: False: whoever waits is told, and nothing is kept.
    keep: bool = True


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did."""

    returned: int
    dead: tuple[str, ...]
    #: Of those put back; the first thousand of them that can be read.
    ids: tuple[str, ...] = ()


class Store:
    """Claims and settles tasks for one worker over one Redis client.

    ``worker`` is the node name (``gpu0@host``), which names the in-flight hash.
    """

    def __init__(
        self,
        client: redis.Redis,
        worker: str,
        queues: Sequence[str],
        settings: QueueSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.client = client
        self.worker = worker
        self.queues: tuple[str, ...] = ()
        self.serve(queues)
        self.inflight = keys.inflight(worker)
        self._settings = settings
        self._clock = clock
        self._life = 0
        self._seq = 0
        #: True after a claim whose answer was lost: what it took is not known here.
        self._unsure = False
        self._direct = direct = Direct(client)
        self._claim = direct.bind("claim")
        self._claim_sha: str = bind(client, "claim").sha
        self._begin = direct.bind("begin")
        self._settle = direct.bind("settle")
        self._release = bind(client, "release")
        self._restore = bind(client, "restore")
        self._bury = bind(client, "bury")
        self._count_life = bind(client, "life")

    def serve(self, queues: Sequence[str]) -> None:
        """Claim from these queues from now on."""
        if tuple(queues) != self.queues:  # asked before every claim, and it hardly ever changes
            self.queues = tuple(queues)
            self.lists = keys.serving_order(queues)

    def waits(self) -> bool:
        """Tell whether a claim may find something; a third of an empty claim's price."""
        return self._unsure or bool(self._direct.call("EXISTS", *self.lists))

    @property
    def unsure(self) -> bool:
        """True when what is held must be reconciled with what is in flight before the next claim."""
        return self._unsure

    def claim(
        self, room: int, *, max_bytes: int = MAX_BYTES, better_than: int | None = None, begin: bool = False
    ) -> list[Claimed]:
        """Take up to ``room`` tasks, the most urgent first, whose payloads have about ``max_bytes``.

        With ``better_than``, only from lists before that rank, and without ageing. With ``begin``, a task
        that comes alone is noted as running, which saves the call of ``begin``.
        """
        lists = self.lists if better_than is None else self.lists[:better_than]
        if room <= 0 or not lists:
            return []
        if self._unsure or self._out_of_seqs(room):
            self._begin_life()
        order = self._order(lists, room, max_bytes, ageing=better_than is None, begin=begin)
        try:
            answer = self._claim(keys=order.keys, args=order.args)
        except (redis.ConnectionError, redis.TimeoutError):
            self._unsure = True
            raise
        except redis.ResponseError as exc:
            answer = exc
        return self.take(order, answer)

    def order(self, room: int, *, begin: bool = False) -> Order | None:
        """Return a claim to send by another way; its answer goes to ``take`` before there is another one,
        unless it is not ``current`` any more.

        None when only ``claim`` can tell what to take: nothing may be, or a life has to begin first.
        """
        if room <= 0 or not self.lists or self._unsure or self._out_of_seqs(room):
            return None
        return self._order(self.lists, room, MAX_BYTES, ageing=True, begin=begin)

    def _order(self, lists: Sequence[str], room: int, max_bytes: int, *, ageing: bool, begin: bool) -> Order:
        bell = keys.bell(keys.split_list_key(lists[0])[0])
        names = (self.inflight, keys.WAITING, bell, keys.life(self.worker), *lists)
        ageing_ms = int(self._settings.ageing_s * 1000) if ageing else 0
        prefix = keys.RESULT_PREFIX if begin else ""
        args = (room, ageing_ms, self._seq, self._life, prefix, keys.CLAIMED, max_bytes)
        return Order(names, args, lists, self._life, self._claim_sha)

    def take(self, order: Order, answer: Any) -> list[Claimed]:
        """Return the tasks that the answer to a claim brings. Raises the error that it is."""
        if isinstance(answer, redis.ResponseError):
            raise self._explain(answer) from answer
        noted_id = answer.pop().decode(errors="replace") if len(answer) % 3 else None
        self._seq += len(answer) // 3
        lists = order.lists
        return [
            Claimed(int(answer[i]), lists[abs(place) - 1], abs(place) - 1, answer[i + 2], place < 0, noted_id)
            for i in range(0, len(answer), 3)
            for place in (answer[i + 1],)
        ]

    def current(self, order: Order) -> bool:
        """Tell whether what an ordered claim takes is this worker's: no life has begun since, nor has to.

        Else it is back in its list, or will be.
        """
        return order.life == self._life and not self._unsure

    def _explain(self, error: redis.ResponseError) -> Exception:
        if "STALE" not in str(error):
            return error
        return WorkerRunning(
            f"another worker called {self.worker} has taken over; names must differ between hosts"
        )

    def end_wait(self, client_id: int) -> bool:
        """End the wait of the connection of that id, as if its time were over. False: Redis refuses."""
        try:
            self._direct.call("CLIENT", "UNBLOCK", client_id)
        except redis.ResponseError:
            return False
        return True

    def ring(self) -> None:
        """Wake who waits longest for the most urgent queue's bell: this worker, if it is alone."""
        self._direct.call("LPUSH", keys.bell(self.queues[0]), 1)

    def _out_of_seqs(self, room: int) -> bool:
        return not self._life or self._seq % SEQS_OF_A_LIFE + room >= SEQS_OF_A_LIFE

    def _begin_life(self) -> None:
        """Count a life of this worker. Its number is part of each sequence id, so that none comes twice."""
        try:
            self._life = int(self._count_life(keys=[keys.life(self.worker)], args=[self._life]))
        except (redis.ConnectionError, redis.TimeoutError):
            self._life += bool(self._life)  # counted perhaps; if not, it is refused when it comes late
            raise
        except redis.ResponseError as exc:
            raise self._explain(exc) from exc
        self._seq = self._life * SEQS_OF_A_LIFE

    def doubt(self) -> None:
        """Compare what is held with what is in flight before the next claim, as after a reconnection."""
        self._unsure = True

    def reconcile(self, known: Iterable[int]) -> int:
        """Give back what a claim with a lost answer took. ``known`` are the seqs this worker holds."""
        if not self._unsure:
            return 0
        self._begin_life()  # a claim that is still on its way is refused from now on
        held = set(known)
        fields = self.client.hkeys(self.inflight)
        lost = sorted(int(f) for f in fields if f.isdigit() and int(f) not in held)
        if lost:
            self.release(lost)
        self._unsure = False
        return len(lost)

    def begin(self, tasks: Sequence[tuple[int, str, bytes]]) -> set[int]:
        """Note that (seq, id, started meta) run; an empty meta leaves the state as it is.

        Returns the positions of those whose final state is written already; they must not run.
        """
        args: list[bytes | str | int] = [
            keys.RESULT_PREFIX,
            " ".join(str(seq) for seq, _, _ in tasks),
        ]
        for _, task_id, meta in tasks:
            args += (task_id, meta)
        return {int(position) - 1 for position in self._begin(keys=[self.inflight], args=args)}

    def settle(self, finals: Sequence[Final], *, idle: bool = False) -> int:
        """Write final states and drop the tasks from flight. Safe to repeat.

        ``idle`` says that nothing runs now: a death is on nobody's account.
        """
        unkept = " ".join(str(i) for i, final in enumerate(finals) if not final.keep)
        args: list[bytes | str | int] = [self._settings.result_ttl_s, keys.RESULT_PREFIX, int(idle)]
        args.append(f" {unkept} " if unkept else "")
        for final in finals:
            args += ("" if final.seq is None else final.seq, final.task_id, final.meta)
        return int(self._settle(keys=[self.inflight], args=args))

    def release(self, seqs: Iterable[int], ran: Collection[int] = ()) -> int:
        """Put claimed tasks back at the head of their lists. Safe to repeat.

        Of those among ``ran`` a part has run: what comes of them later is a repeat, and says so.
        """
        pairs = [part for seq in sorted(seqs) for part in (seq, int(seq in ran))]
        if not pairs:
            return 0
        return int(
            self._release(keys=[self.inflight], args=[keys.BELL_PREFIX, keys.SEP, keys.CLAIMED, *pairs])
        )

    def restore(self) -> Restored:
        """Put everything in flight back; bury what has taken its workers down too often.

        Only for a worker that is known not to run: a claim that it has left behind in Redis is refused from
        now on. Safe to repeat after being cut off anywhere.
        """
        self._life = 0  # takes over, whoever has counted since
        self._begin_life()
        limit, pending = self._settings.max_deaths, results.PENDING_META
        args = (keys.BELL_PREFIX, keys.SEP, limit, keys.RESULT_PREFIX, pending, keys.CLAIMED, self._life)
        try:
            flat = self._restore(keys=[self.inflight, keys.life(self.worker)], args=args)
        except redis.ResponseError as exc:
            raise self._explain(exc) from exc
        dead = []
        for i in range(2, len(flat), 4):
            seq, list_key, payload, deaths = flat[i : i + 4]
            error = DeadLettered(
                f"its worker died {int(deaths)} times while it ran; see gpuinfer dead list", None
            )
            dead.append(self.bury(int(seq), list_key.decode(), payload, error, deaths=int(deaths)))
        ids = tuple(task_id.decode("utf-8", "backslashreplace") for task_id in flat[1])
        restored = Restored(int(flat[0]), tuple(dead), ids)
        if restored.returned or dead:
            log.warning(
                "restored", worker=self.worker, returned=restored.returned, dead=len(dead), task_ids=ids
            )
        return restored

    def bury(self, seq: int, list_key: str, payload: bytes, error: GpuinferError, *, deaths: int = 0) -> str:
        """Move a task to the dead letters, with a failure result where its id can be read."""
        try:
            task_id: str | None = decode(payload).id
        except Undecodable as exc:
            task_id = exc.task_id
        letter_id = task_id or f"undecodable-{self.worker}-{int(self._clock() * 1000)}-{seq}"
        letter = orjson.dumps(
            {
                "id": letter_id,
                "list": list_key,
                "reason": error.message,
                "code": error.code,
                "deaths": deaths,
                "worker": self.worker,
                "at": self._clock(),
                "payload": payload.decode("utf-8", "backslashreplace"),
            }
        )
        meta = results.failure(task_id, error, worker=self.worker) if task_id else b""
        self._bury(
            keys=[self.inflight, keys.DEAD],
            args=[seq, letter_id, letter, self._settings.result_ttl_s, keys.result(letter_id), meta],
        )
        queue = keys.split_list_key(list_key)[0]
        log.error("task_dead_lettered", task_id=letter_id, queue=queue, deaths=deaths, reason=error.message)
        return letter_id
