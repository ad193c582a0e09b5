# SPDX-License-Identifier: Apache-2.0
"""What a worker does with the queue: claim, begin, settle, release, restore; each is one atomic script.

From claim to settle a task is stored in the worker's in-flight hash, never only in a process's memory.
Scripts run with allow-oom and without MULTI, so a full Redis does not stop them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import redis

from gpuinfer.errors import DeadLettered, GpuinferError
from gpuinfer.log import get_logger
from gpuinfer.queue import drained, keys, returns
from gpuinfer.queue.burial import Burial
from gpuinfer.queue.chains import Chains
from gpuinfer.queue.claims import ANY_RANK, Claimed, Final, Order, Restored, State, Want, Wants, flat_wants
from gpuinfer.queue.direct import Argument, Direct
from gpuinfer.queue.epoch import SEQS_OF_AN_EPOCH, Epoch
from gpuinfer.queue.later import Later, Postponed
from gpuinfer.queue.membership import Membership
from gpuinfer.queue.plain_lists import PlainLists
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.settling import Settling
from gpuinfer.settings import QUEUES, QueueSettings

log = get_logger(__name__)

#: Default maximum payload bytes of one claim.
MAX_BYTES = 64 * 1024 * 1024
#: Seconds after which tasks that could not be put back are tried again.
STUCK_S = 10.0


class Store:
    """Claims and settles tasks for one worker over one Redis client.

    ``worker`` is the node name (``gpu0@host``), which names the in-flight hash; ``by`` identifies this
    process among those that use that name.
    """

    def __init__(
        self,
        client: redis.Redis,
        worker: str,
        queues: Sequence[str],
        settings: QueueSettings,
        clock: Callable[[], float] = time.time,
        *,
        models: Sequence[str] = (),
        by: str = "",
    ) -> None:
        self.client = client
        self.worker = worker
        #: Plans what follows the ends of tasks.
        self.chains = Chains(settings, worker)
        #: The models that this worker claims tasks for, in the given order.
        self.models = tuple(models)
        #: Model -> the shortened digest of the version that runs here.
        self.versions: Mapping[str, str] = {}
        #: The default model at the last claim; empty: not known.
        self.default = ""
        self.queues: tuple[str, ...] = ()
        self._settings = settings
        self.max_result_bytes = settings.max_result_bytes
        self._clock = clock
        self._epoch = Epoch(client, worker, by or f"process {secrets.token_hex(8)}")
        self._seq = 0
        #: True after a claim whose answer was lost: it may have taken tasks unknown to this process.
        self._uncertain = False
        #: When tasks could not be put back; 0: not since the last retry.
        self._stuck_at = 0.0
        self.inflight = keys.inflight(worker)
        self._direct = direct = Direct(client)
        self.membership = Membership(client, worker, self.models, clock)
        #: The lists that plain producers may fill.
        self.plain = PlainLists(client, direct, self.models, clock)
        self.serve(queues)
        self._claim = direct.bind("claim")
        self._claim_sha: str = bind(client, "claim").sha
        self._begin = direct.bind("begin")
        self._settling = Settling(client, direct, self.inflight, settings)
        self._release = bind(client, "release")
        self._restore = bind(client, "restore")
        self._later = Later(client, direct, self.inflight, settings)
        self.burial = Burial(client, worker, self.inflight, self.chains, settings, clock)
        self._account = bind(client, "account")

    def serve(self, queues: Sequence[str]) -> None:
        """Claim from these tiers from now on."""
        if tuple(queues) != self.queues:  # called before every claim, but rarely different
            self.queues = tuple(queue for queue in QUEUES if queue in queues)
            self.group = keys.group_of(self.queues, self.models)
            self._tiers = " ".join(self.queues)
            self.plain.choose(self.queues, self.default)

    def register(self, heartbeat: bytes = b"", default: str = "") -> int:
        """Report that this worker is alive and what it serves; return how many tasks wait for it.

        ``default`` becomes the default model if there is none yet. Raises redis-py's errors.
        """
        return self.membership.register(self.group, self._tiers, heartbeat, default)

    def leave(self) -> None:
        """Leave the fleet: this worker is no longer woken, and no longer counts as alive."""
        self.membership.leave(self.group)

    def waits(self) -> bool:
        """Tell whether a claim may find tasks for which no worker was woken; costs a third of an empty claim.

        Due tasks are moved into their lists first, which wakes a worker that serves them.
        """
        plain = self.plain
        exist = ("EXISTS", *plain.names) if plain.names else ("PING",)
        found, (due, paused) = self._direct.call_all(exist, ("MGET", keys.DUE, keys.PAUSED))
        if due is not None:
            self._later.move_due(due)
        if self._stuck_at and self._clock() - self._stuck_at > STUCK_S:
            self._stuck_at, self._uncertain = 0.0, True
        if plain.update(paused or b""):
            return self.waits()
        return self._uncertain or bool(plain.names and found)

    def postpone(self, tasks: Sequence[tuple[int, float]]) -> Postponed:
        """Move tasks, given as (seq, due), from flight to those that wait. Raises redis-py's errors."""
        return self._later.postpone(tasks)

    @property
    def uncertain(self) -> bool:
        """True if ``reconcile`` must run before the next claim."""
        return self._uncertain

    def is_drained(self) -> bool:
        """Tell whether this worker is drained and claims nothing. Raises redis-py's errors."""
        return self.worker in drained.parse(self._direct.call("GET", keys.DRAINED))

    def wants(self, room: int, *, better_than: int = ANY_RANK) -> Wants:
        """Return the same want for each model."""
        return dict.fromkeys(self.models, Want(room, better_than))

    def claim(
        self,
        wants: Wants | int,
        *,
        max_bytes: int = MAX_BYTES,
        state: State = "free",
        begin: bool = False,
        search: bool = False,
    ) -> list[Claimed]:
        """Take tasks of one model, the most urgent first, with about ``max_bytes`` of payloads.

        ``wants`` as a number is the count for each model. Other idle workers of this group are left their
        share. With ``begin``, a single task is noted as running, which saves the call of ``begin``. With
        ``search``, the lists that plain producers may have filled are checked first. Raises redis-py's
        errors, WorkerRunning, TakenBack, FormatMismatch.
        """
        wants = self.wants(wants) if isinstance(wants, int) else wants
        if not self._can_claim(wants):
            return []
        if self._uncertain or self._out_of_seqs(wants):
            self._begin_epoch()
        if self.membership.group != self.group:
            self.register()
        order = self._order(wants, max_bytes, state, begin=begin, search=search)
        try:
            answer = self._claim(keys=order.keys, args=order.args)
        except (redis.ConnectionError, redis.TimeoutError):
            self._uncertain = True
            raise
        except redis.ResponseError as exc:
            answer = exc
        return self.take(order, answer)

    def order(self, wants: Wants, *, state: State = "idle", begin: bool = False) -> Order | None:
        """Return a claim for the caller to send. Its answer must be passed to ``take`` before the next claim,
        while the claim is ``current``.

        None if nothing can be claimed, or if ``claim`` has to begin an epoch or to register first.
        """
        if not self._can_claim(wants) or self._uncertain or self._out_of_seqs(wants):
            return None
        if self.membership.group != self.group:
            return None
        return self._order(wants, MAX_BYTES, state, begin=begin, search=False)

    def _can_claim(self, wants: Wants) -> bool:
        return bool(self.queues) and any(want.count > 0 for want in wants.values())

    def _order(self, wants: Wants, max_bytes: int, state: State, *, begin: bool, search: bool) -> Order:
        args: list[Argument] = [
            self._epoch.number,
            self._seq,
            max_bytes,
            int(self._settings.ageing_s * 1000),
            int(begin),
            state,
            self.worker,
            self.group,
            self._tiers,
        ]
        lists = self.plain.names if search else []
        args += (self.default if self.default in self.models else "", len(lists), *lists)
        args += flat_wants(self.models, wants)
        return Order((self.inflight, keys.epoch(self.worker)), args, self._epoch.number, self._claim_sha)

    def take(self, order: Order, answer: Any) -> list[Claimed]:
        """Return the tasks in the answer to a claim. Raises an error answer, as read by ``Epoch.explain``."""
        if isinstance(answer, redis.ResponseError):
            raise self._epoch.explain(answer) from answer
        noted_id = answer[0].decode(errors="replace") or None
        default = answer[1].decode()
        if default != self.default:
            self.default = default
            self.plain.choose(self.queues, default)
        tasks: list[Claimed] = []
        at, seq = 2, self._seq
        while at < len(answer):
            list_key, place, count = answer[at].decode(), answer[at + 1], answer[at + 2]
            rank, aged = (place, False) if place >= 0 else (-1 - place, True)
            model = keys.place_of(list_key).model or default
            for payload in answer[at + 3 : at + 3 + count]:
                tasks.append(Claimed(seq, list_key, rank, payload, aged, noted_id, model))
                seq += 1
            at += 3 + count
        self._seq = seq
        return tasks

    def current(self, order: Order) -> bool:
        """Tell whether the tasks that a sent claim took belong to this worker: its epoch is the current one.

        Otherwise, or while that is uncertain, the tasks are put back into their lists.
        """
        return order.epoch == self._epoch.number and not self._uncertain

    @property
    def begun(self) -> bool:
        """True once this process has begun an epoch: the data under the worker's name is then its own."""
        return self._epoch.number > 0

    def rejoin(self) -> None:
        """Begin a new epoch after a reaper has put this worker's tasks back.

        If the reaper was interrupted before it put them back, ``reconcile`` does so before the next claim.
        Raises WorkerRunning if another process has taken over since.
        """
        self._uncertain = True
        self._epoch.follow_reaper()
        self._begin_epoch()

    def end_wait(self, client_id: int) -> bool:
        """End the blocking wait of the connection with this id, as if it timed out. False: Redis refused."""
        try:
            self._direct.call("CLIENT", "UNBLOCK", client_id)
        except redis.ResponseError:
            return False
        return True

    def account(self, counts: Sequence[Argument]) -> None:
        """Add this worker's counts (``tally.Tally.args``) to those in Redis. Raises redis-py's errors."""
        self._account(keys=[], args=counts)

    def wake(self) -> None:
        """Wake this worker from its blocking wait."""
        self._direct.call("LPUSH", keys.wake(self.worker), 1)

    def _out_of_seqs(self, wants: Wants) -> bool:
        most = max(want.count for want in wants.values())
        return not self._epoch.number or self._seq % SEQS_OF_AN_EPOCH + most >= SEQS_OF_AN_EPOCH

    def _begin_epoch(self) -> None:
        """Begin an epoch. The next claim registers again, as Redis may have restarted empty."""
        self.membership.group = ""
        self._epoch.begin()
        self._seq = self._epoch.number * SEQS_OF_AN_EPOCH

    def body(self, task_id: str) -> bytes | None:
        """Return a task's body that is stored under a key of its own; None if it is gone."""
        found: bytes | None = self._direct.call("GET", keys.body(task_id))
        return found

    def mark_uncertain(self) -> None:
        """Make the caller ``reconcile`` before the next claim: after a reconnection, or a lost answer."""
        self._uncertain = True

    def reconcile(self, known: Iterable[int]) -> int:
        """Put back the tasks of a claim whose answer was lost; return how many. ``known``: seqs held here."""
        if not self._uncertain:
            return 0
        self._begin_epoch()  # from now on Redis refuses a claim that has not arrived yet
        held = set(known)
        lost = [seq for seq in self._seqs_in_flight() if seq not in held]
        self.release(lost)
        self._uncertain = False
        return len(lost)

    def _seqs_in_flight(self) -> list[int]:
        fields: list[bytes] = self.client.hkeys(self.inflight)  # type: ignore[assignment]  # not decoded
        return [int(field) for field in fields if field.isdigit()]

    def begin(self, tasks: Sequence[tuple[int, str, bytes]], beside: Sequence[int] = ()) -> set[int]:
        """Note that each task, given as (seq, id, started meta), runs; an empty meta leaves its state.

        ``beside``: seqs that run already; a crash is charged to all. Returns the positions of tasks that
        already have a final state: they must not run.
        """
        seqs = dict.fromkeys((*beside, *(seq for seq, _, _ in tasks)))
        args: list[Argument] = [" ".join(map(str, seqs))]
        for _, task_id, meta in tasks:
            args += (task_id, meta)
        return {int(position) - 1 for position in self._begin(keys=[self.inflight], args=args)}

    def note(self, seqs: Sequence[int]) -> None:
        """Note which tasks run or are being read: a crash after this point is charged to them."""
        if seqs:
            self._direct.call("HSET", self.inflight, "running", " ".join(map(str, seqs)))
        else:
            self._direct.call("HDEL", self.inflight, "running")

    def ended(self, task_ids: Sequence[str]) -> set[int]:
        """Return the positions of tasks that have a final state, by cancellation or from another worker."""
        args: list[Argument] = [""]
        for task_id in task_ids:
            args += (task_id, "")
        return {int(position) - 1 for position in self._begin(keys=[self.inflight], args=args)}

    def settle(self, finals: Sequence[Final], *, idle: bool = False) -> dict[str, str]:
        """Write final states, remove the tasks from flight, and send what follows them. Safe to repeat.

        ``idle``: nothing runs any more, so a crash is charged to no task. Returns id -> Redis's error for
        ends that were announced and counted but not stored, because the result key has another type.
        """
        return self._settling.settle(finals, idle=idle)

    def release(
        self, seqs: Iterable[int], ran: Collection[int] = (), models: Mapping[int, str] | None = None
    ) -> int:
        """Put claimed tasks back at the head of their lists. Safe to repeat.

        A task stays in flight while its list's key has another type; that is tried again after ``STUCK_S``.
        Tasks in ``ran`` have run at least in part: their next run counts as a redelivery. Tasks in ``models``
        go to the end of that model's list instead.
        """
        back, stay = returns.release(self._release, self.inflight, seqs, ran, models or {})
        if stay:
            self._stuck_at = self._clock()
        return back

    def restore(self) -> Restored:
        """Put everything in flight back, as ``take_back`` does, and log it."""
        restored = self.take_back()
        if restored.returned or restored.dead:
            log.warning(
                "restored",
                worker=self.worker,
                returned=restored.returned,
                dead=len(restored.dead),
                task_ids=restored.ids,
            )
        return restored

    def take_back(self, *, after: int = 0) -> Restored:
        """Put everything in flight back; bury the tasks that killed too many workers.

        For a worker that does not run: Redis then refuses any claim of it that has not arrived yet. If the
        worker does run, it drops the tasks it held, and continues if ``by`` begins with ``REAPER``. Safe to
        repeat after an interruption at any point.

        ``after``: the number of the last known epoch; if another one has begun since, raises TakenBack (if a
        reaper began it) or WorkerRunning (if a worker did).
        """
        self._epoch.number = after  # 0: take over, even if others have begun epochs since
        self._begin_epoch()
        args = (self._epoch.number, self._settings.max_deaths)
        try:
            back, names, given_up = returns.restore(
                self._restore, (self.inflight, keys.epoch(self.worker)), self._seqs_in_flight(), args
            )
        except redis.ResponseError as exc:
            raise self._epoch.explain(exc) from exc
        dead = []
        for seq, list_key, payload, deaths in given_up:
            error = DeadLettered(
                f"its worker died {int(deaths)} times while it ran or was read; see gpuinfer dead list", None
            )
            dead.append(self.bury(int(seq), list_key.decode(), payload, error, deaths=int(deaths)))
        ids = tuple(task_id.decode("utf-8", "backslashreplace") for task_id in names)
        return Restored(back, tuple(dead), ids)

    def bury(self, seq: int, list_key: str, payload: bytes, error: GpuinferError, *, deaths: int = 0) -> str:
        """Move a task to the dead letters; return its id there. See ``Burial``."""
        return self.burial.bury(seq, list_key, payload, error, deaths=deaths, default_model=self.default)
