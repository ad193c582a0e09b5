# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the queue: claim, begin, settle, release, restore, each one atomic script.

Between claim and settle a task stands in the worker's in-flight hash, never only in a process's
memory. Scripts run with allow-oom and without MULTI, so a full Redis does not stop them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import orjson
import redis

from gpuinfer.errors import DeadLettered, GpuinferError, TakenBack, WorkerRunning
from gpuinfer.log import get_logger
from gpuinfer.queue import drained, keys, results, returns
from gpuinfer.queue.chains import Chains
from gpuinfer.queue.claims import (
    ANY_RANK,
    NOTHING,
    Claimed,
    Final,
    Order,
    Restored,
    State,
    Stray,
    Want,
    Wants,
    following,
    label,
)
from gpuinfer.queue.depth import Lane, is_paused
from gpuinfer.queue.direct import Argument, Direct
from gpuinfer.queue.format import mismatch
from gpuinfer.queue.later import Later, Postponed
from gpuinfer.queue.message import identify
from gpuinfer.queue.scripts import bind
from gpuinfer.queue.settling import Settling
from gpuinfer.settings import QUEUES, QueueSettings

log = get_logger(__name__)

#: Payload bytes that one claim takes at most, unless told otherwise.
MAX_BYTES = 64 * 1024 * 1024
#: How many sequence ids an epoch has: 2^29 epochs of them stay exact in Lua's numbers.
SEQS_OF_AN_EPOCH = 2**24
#: Seconds for which what is no list, though it has the name of one, is not looked into.
FOREIGN_S = 10.0
#: Seconds after which what models take is said again, well within ``keys.SIGNATURE_VOID_S``.
DESCRIBE_EVERY_S = 30.0
#: Who began an epoch: a reaper's restore says so, and the worker it took for dead may go on.
REAPER = "reaper"


class Store:
    """Claims and settles tasks for one worker over one Redis client.

    ``worker`` is the node name (``gpu0@host``), which names the in-flight hash; ``by`` tells this process
    from another one of that name.
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
        self.by = by or f"process {secrets.token_hex(8)}"
        #: What follows the ends of tasks.
        self.chains = Chains(settings, worker)
        #: The models claimed for, in the order they were named.
        self.models = tuple(models)
        #: Model -> what it takes, as JSON, for those who submit.
        self.signatures: Mapping[str, bytes] = {}
        #: Model -> the digest of what runs here, shortened.
        self.versions: Mapping[str, str] = {}
        self._described_at = 0.0
        #: The default model, as the last claim has found it; empty: not known.
        self.default = ""
        self.queues: tuple[str, ...] = ()
        self._settings = settings
        self.max_result_bytes = settings.max_result_bytes
        self._clock = clock
        self._epoch = 0
        self._seq = 0
        #: True after a claim whose answer was lost: what it took is not known here.
        self._uncertain = False
        self._registered = ""
        #: The paused queues, as Redis has them; and what is no list, although it has the name of one.
        self._paused = b""
        self._foreign: set[str] = set()
        self._named: set[str] = set()
        self._foreign_at = 0.0
        #: When tasks could not be put back; 0: not since the last try.
        self._stuck_at = 0.0
        self.serve(queues)
        self.inflight = keys.inflight(worker)
        self._direct = direct = Direct(client)
        self._claim = direct.bind("claim")
        self._claim_sha: str = bind(client, "claim").sha
        self._index = direct.bind("index")
        self._begin = direct.bind("begin")
        self._settling = Settling(client, direct, self.inflight, settings)
        self._release = bind(client, "release")
        self._route = bind(client, "route")
        self._restore = bind(client, "restore")
        self._later = Later(client, direct, self.inflight, settings)
        self._bury = bind(client, "bury")
        self._trim = bind(client, "trim")
        self._begin_script = bind(client, "epoch")
        self._register = bind(client, "register")
        self._describe_script = bind(client, "describe")
        self._leave = bind(client, "leave")
        self._account = bind(client, "account")

    def serve(self, queues: Sequence[str]) -> None:
        """Claim from these tiers from now on."""
        if tuple(queues) != self.queues:  # asked before every claim, and it hardly ever changes
            self.queues = tuple(queue for queue in QUEUES if queue in queues)
            self.group = keys.group_of(self.queues, self.models)
            self._tiers = " ".join(self.queues)
            self._choose_lists()

    def _choose_lists(self) -> None:
        """Choose what plain Celery producers may fill for this worker: its models' lists, and the default
        model's if it serves that, or as long as it does not know which one that is."""
        models = ("", *self.models) if self.default in ("", *self.models) else self.models
        self.lists = [name for name in keys.lists(self.queues, models) if self._open(name)]

    def _open(self, name: str) -> bool:
        """Tell whether a list is to be looked into: nobody has paused it, and it is one."""
        place = keys.place_of(name)
        lane = Lane(place.tier, place.model or self.default)
        return name not in self._foreign and not is_paused(lane, self._paused.decode().split())

    def register(self, heartbeat: bytes = b"", default: str = "") -> int:
        """Say what this worker serves, and that it lives; return how many tasks wait for it.

        ``default`` becomes the default model where there is none yet.
        """
        args = (self.worker, self.group, heartbeat, self._tiers, default, *self.models)
        waiting = int(self._register(keys=[keys.heartbeat(self.worker)], args=args))
        if self._registered != self.group or self._clock() - self._described_at > DESCRIBE_EVERY_S:
            self._describe()
        self._registered = self.group
        return waiting

    def _describe(self) -> None:
        """Say what this worker's models take."""
        if self.signatures:
            said = [part for pair in self.signatures.items() for part in pair]
            self._describe_script(args=[self.worker, *said])
        self._described_at = self._clock()

    def leave(self) -> None:
        """Leave the fleet: nobody wakes this worker any more, or takes it for alive."""
        args = (self.worker, self.group)
        self._leave(keys=[keys.heartbeat(self.worker), self.inflight], args=args)

    def waits(self) -> bool:
        """Tell whether a claim may find what nobody has told of; a third of an empty claim's price.

        What is due by now is put into its list on the way, and wakes a worker that may take it.
        """
        exist = ("EXISTS", *self.lists) if self.lists else ("PING",)
        found, (due, paused) = self._direct.call_all(exist, ("MGET", keys.DUE, keys.PAUSED))
        if due is not None:
            self._later.look(due)
        if self._foreign and self._clock() - self._foreign_at > FOREIGN_S:
            self._foreign = set()
            self._choose_lists()
        if self._stuck_at and self._clock() - self._stuck_at > FOREIGN_S:
            self._stuck_at, self._uncertain = 0.0, True
        if (paused or b"") != self._paused:
            self._paused = paused or b""
            self._choose_lists()
            return self.waits()
        return self._uncertain or bool(self.lists and found)

    def foreign(self) -> dict[str, str]:
        """Return the names of lists under which something else stands, and its type; those that are new.

        For a while they are not looked into. Raises redis-py's errors.
        """
        with self.client.pipeline(transaction=False) as pipe:
            for name in self.lists:
                pipe.type(name)
            kinds = [kind.decode() for kind in pipe.execute()]
        found = {
            name: kind for name, kind in zip(self.lists, kinds, strict=True) if kind not in ("list", "none")
        }
        new = {name: kind for name, kind in found.items() if name not in self._named}
        self._foreign |= found.keys()
        self._named |= found.keys()
        self._foreign_at = self._clock()
        self._choose_lists()
        return new

    def postpone(self, tasks: Sequence[tuple[int, float]]) -> Postponed:
        """Let (seq, due) wait in Redis until then, with nothing delivered. Raises redis-py's errors."""
        return self._later.postpone(tasks)

    def index_lists(self) -> int:
        """Tell the others of lists that plain producers have filled; return how many there are."""
        return int(self._index(keys=self.lists, args=()))

    @property
    def uncertain(self) -> bool:
        """True when what is held must be compared with what is in flight before the next claim."""
        return self._uncertain

    def unknown(self, models: Iterable[str]) -> tuple[str, ...]:
        """Return which of these models nobody in the fleet could serve; none while the catalogue is empty."""
        asked = tuple(models)
        with self.client.pipeline(transaction=False) as pipe:
            pipe.zcard(keys.CATALOGUE)
            for model in asked:
                pipe.zscore(keys.CATALOGUE, model)
            size, *seen = pipe.execute()
        return tuple(model for model, at in zip(asked, seen, strict=True) if size and at is None)

    def is_drained(self) -> bool:
        """Tell whether this worker is drained: it claims nothing. Raises redis-py's errors."""
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
        look: bool = False,
    ) -> list[Claimed]:
        """Take tasks of one model, the most urgent first, whose payloads have about ``max_bytes``.

        A number is a count for each model. Idle workers of this group get their share. With
        ``begin``, a task that comes alone is noted as running, which saves the call of ``begin``. With
        ``look``, lists that plain producers may have filled are looked into first.
        """
        wants = self.wants(wants) if isinstance(wants, int) else wants
        if not self._can_claim(wants):
            return []
        if self._uncertain or self._out_of_seqs(wants):
            self._begin_epoch()
        if self._registered != self.group:
            self.register()
        order = self._order(wants, max_bytes, state, begin=begin, look=look)
        try:
            answer = self._claim(keys=order.keys, args=order.args)
        except (redis.ConnectionError, redis.TimeoutError):
            self._uncertain = True
            raise
        except redis.ResponseError as exc:
            answer = exc
        return self.take(order, answer)

    def order(self, wants: Wants, *, state: State = "idle", begin: bool = False) -> Order | None:
        """Return a claim to send by another way; its answer goes to ``take`` before there is another one,
        unless it is not ``current`` any more.

        None when only ``claim`` can tell what to take: nothing may be, or an epoch has to begin first.
        """
        if not self._can_claim(wants) or self._uncertain or self._out_of_seqs(wants):
            return None
        if self._registered != self.group:
            return None
        return self._order(wants, MAX_BYTES, state, begin=begin, look=False)

    def _can_claim(self, wants: Wants) -> bool:
        return bool(self.queues) and any(want.count > 0 for want in wants.values())

    def _order(self, wants: Wants, max_bytes: int, state: State, *, begin: bool, look: bool) -> Order:
        args: list[Argument] = [
            self._epoch,
            self._seq,
            max_bytes,
            int(self._settings.ageing_s * 1000),
            int(begin),
            state,
            self.worker,
            self.group,
            self._tiers,
        ]
        lists = self.lists if look else []
        args += (self.default if self.default in self.models else "", len(lists), *lists)
        args += self._wanted(wants)
        return Order((self.inflight, keys.epoch(self.worker)), args, self._epoch, self._claim_sha)

    def _wanted(self, wants: Wants) -> list[Argument]:
        """Return what is wanted as the script takes it. Those of several models that want what most want come
        last, without their names: a claim costs no more for them."""
        models: dict[Want, list[str]] = {}
        for model in self.models:
            models.setdefault(wants.get(model, NOTHING), []).append(model)
        args: list[Argument] = []
        usual = max(models, key=lambda want: len(models[want]))
        for want, names in models.items():
            if want is not usual:
                args += (want.count, want.better_than, want.least, len(names), *names)
        named = self.models if len(self.models) == 1 else ()
        return [*args, usual.count, usual.better_than, usual.least, len(named), *named]

    def take(self, order: Order, answer: Any) -> list[Claimed]:
        """Return the tasks that the answer to a claim brings. Raises the error that it is."""
        if isinstance(answer, redis.ResponseError):
            raise self._explain(answer) from answer
        noted_id = answer[0].decode(errors="replace") or None
        default = answer[1].decode()
        if default != self.default:
            self.default = default
            self._choose_lists()
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
        """Tell whether what an ordered claim takes is this worker's: no epoch has begun since, nor has to.

        Else it is back in its list, or will be.
        """
        return order.epoch == self._epoch and not self._uncertain

    def _explain(self, error: redis.ResponseError) -> Exception:
        text = str(error)
        if "FORMAT " in text:
            return mismatch(text.rpartition("FORMAT ")[2])
        if "STALE" not in text:
            return error
        found: bytes | None = self.client.hget(keys.epoch(self.worker), "by")  # type: ignore[assignment]
        by = (found or b"").decode(errors="replace")
        if by.startswith(REAPER):
            return TakenBack(f"{self.worker} was taken for dead, and its tasks were put back by the {by}")
        return self._taken_over()

    def _taken_over(self) -> WorkerRunning:
        return WorkerRunning(
            f"another worker called {self.worker} has taken over; names must differ between hosts"
        )

    @property
    def begun(self) -> bool:
        """True once this process has begun an epoch: what is kept under the worker's name is its own."""
        return self._epoch > 0

    def rejoin(self) -> None:
        """Begin a new epoch after a reaper has put back what was held here.

        The reaper may have been cut off before it put anything back, or be refused from now on: the next
        claim finds that out. Raises WorkerRunning when another process has taken over since.
        """
        self._uncertain = True
        epoch = keys.epoch(self.worker)
        number = int(self.client.hget(epoch, "number") or 0)
        by: bytes = self.client.hget(epoch, "by") or b""  # type: ignore[assignment]
        if not by.startswith((REAPER.encode(), self.by.encode())):
            raise self._taken_over()
        self._epoch = number
        self._begin_epoch()

    def end_wait(self, client_id: int) -> bool:
        """End the wait of the connection of that id, as if its time were over. False: Redis refuses."""
        try:
            self._direct.call("CLIENT", "UNBLOCK", client_id)
        except redis.ResponseError:
            return False
        return True

    def account(self, counts: Sequence[Argument]) -> None:
        """Add what this worker has counted (``tally.Tally.args``). Raises redis-py's errors."""
        self._account(keys=[], args=counts)

    def wake(self) -> None:
        """Wake this worker where it waits."""
        self._direct.call("LPUSH", keys.wake(self.worker), 1)

    def _out_of_seqs(self, wants: Wants) -> bool:
        most = max(want.count for want in wants.values())
        return not self._epoch or self._seq % SEQS_OF_AN_EPOCH + most >= SEQS_OF_AN_EPOCH

    def _begin_epoch(self) -> None:
        """Begin an epoch. Its number is part of each sequence id, so that none comes twice.

        The next claim says again what this worker serves: Redis may have come back empty.
        """
        self._registered = ""
        try:
            self._epoch = int(self._begin_script(keys=[keys.epoch(self.worker)], args=[self._epoch, self.by]))
        except (redis.ConnectionError, redis.TimeoutError):
            self._epoch += bool(self._epoch)  # counted perhaps; if not, it is refused when it comes late
            raise
        except redis.ResponseError as exc:
            raise self._explain(exc) from exc
        self._seq = self._epoch * SEQS_OF_AN_EPOCH

    def body(self, task_id: str) -> bytes | None:
        """Return the body of a task that lies beside the lists; None where it is gone."""
        found: bytes | None = self._direct.call("GET", keys.body(task_id))
        return found

    def mark_uncertain(self) -> None:
        """Compare what is held with what is in flight before the next claim, as after a reconnection."""
        self._uncertain = True

    def reconcile(self, known: Iterable[int]) -> int:
        """Give back what a claim with a lost answer took. ``known`` are the seqs this worker holds."""
        if not self._uncertain:
            return 0
        self._begin_epoch()  # a claim that is still on its way is refused from now on
        held = set(known)
        lost = [seq for seq in self._seqs_in_flight() if seq not in held]
        self.release(lost)
        self._uncertain = False
        return len(lost)

    def _seqs_in_flight(self) -> list[int]:
        fields: list[bytes] = self.client.hkeys(self.inflight)  # type: ignore[assignment]  # not decoded
        return [int(field) for field in fields if field.isdigit()]

    def begin(self, tasks: Sequence[tuple[int, str, bytes]], beside: Sequence[int] = ()) -> set[int]:
        """Note that (seq, id, started meta) run; an empty meta leaves the state as it is.

        ``beside`` are seqs that run already: a death is charged to all of them. Returns the positions of
        those whose final state is written already; they must not run.
        """
        seqs = dict.fromkeys((*beside, *(seq for seq, _, _ in tasks)))
        args: list[Argument] = [" ".join(map(str, seqs))]
        for _, task_id, meta in tasks:
            args += (task_id, meta)
        return {int(position) - 1 for position in self._begin(keys=[self.inflight], args=args)}

    def note(self, seqs: Sequence[int]) -> None:
        """Note what a death from now on is charged to: what runs, and what is being read; empty: nothing."""
        if seqs:
            self._direct.call("HSET", self.inflight, "running", " ".join(map(str, seqs)))
        else:
            self._direct.call("HDEL", self.inflight, "running")

    def ended(self, task_ids: Sequence[str]) -> set[int]:
        """Return the positions of tasks whose final state is written: by a cancellation, or elsewhere."""
        args: list[Argument] = [""]
        for task_id in task_ids:
            args += (task_id, "")
        return {int(position) - 1 for position in self._begin(keys=[self.inflight], args=args)}

    def settle(self, finals: Sequence[Final], *, idle: bool = False) -> dict[str, str]:
        """Write final states, drop the tasks from flight, and send on what follows. Safe to repeat.

        ``idle`` says that nothing runs now: a crash is charged to nobody. Returns the ids under whose result
        key something else stands, and what Redis said of it: their end is told and counted, and not kept.
        """
        not_kept, not_sent = self._settling.settle(finals, idle=idle)
        _tell_of_refused(not_sent)
        return _pairs(not_kept)

    def release(
        self, seqs: Iterable[int], ran: Collection[int] = (), models: Mapping[int, str] | None = None
    ) -> int:
        """Put claimed tasks back at the head of their lists. Safe to repeat.

        Those whose list is none, because something else stands under its name, stay in flight, and are tried
        again after a while.

        Of those among ``ran`` a part has run: what comes of them later is a repeat, and says so. Those in
        ``models`` go to the lists of that model instead, behind what waits there.
        """
        back, stay = returns.release(self._release, self.inflight, seqs, ran, models or {})
        if stay:
            self._stuck_at = self._clock()
        return back

    def route(self, list_key: str, read: int, strays: Sequence[Stray], *, at_once: int = 500) -> int:
        """Pass on, or end, what waits in a list but is for another model; return how many tasks were.

        ``read``: how many tasks are served before those that were read with the strays; ``at_once``: how many
        one call deals with.
        """
        passed = 0
        for first in range(0, len(strays), at_once):
            args: list[Argument] = [self._settings.result_ttl_s, read]
            for place, payload, model, final in strays[first : first + at_once]:
                args += (place - passed, payload, model)
                args += final.fields if final else ("", "", "", "", "")
            passed += int(self._route(keys=[list_key], args=args))
        return passed

    def restore(self) -> Restored:
        """Put everything in flight back, as ``take_back`` does, and log what was done."""
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
        """Put everything in flight back; bury what has taken its workers down too often.

        For a worker that does not run: a claim that it has left behind in Redis is refused from now on. One
        that runs all the same drops what it held, and goes on if ``by`` begins with ``REAPER``. Safe to
        repeat after being cut off anywhere.

        With ``after``, an epoch's number, only if none has begun since. Raises TakenBack when another reaper
        has begun one, WorkerRunning when a worker has.
        """
        self._epoch = after  # 0: takes over, whatever has been counted since
        self._begin_epoch()
        args = (self._epoch, self._settings.max_deaths)
        try:
            back, names, given_up = returns.restore(
                self._restore, (self.inflight, keys.epoch(self.worker)), self._seqs_in_flight(), args
            )
        except redis.ResponseError as exc:
            raise self._explain(exc) from exc
        dead = []
        for seq, list_key, payload, deaths in given_up:
            error = DeadLettered(
                f"its worker died {int(deaths)} times while it ran or was read; see gpuinfer dead list", None
            )
            dead.append(self.bury(int(seq), list_key.decode(), payload, error, deaths=int(deaths)))
        ids = tuple(task_id.decode("utf-8", "backslashreplace") for task_id in names)
        return Restored(back, tuple(dead), ids)

    def _default_model(self) -> str:
        """Return the default model, as the last claim has found it, or as it is now."""
        if self.default:
            return self.default
        found: bytes | None = self.client.get(keys.DEFAULT_MODEL)  # type: ignore[assignment]  # not decoded
        return (found or b"").decode()

    def bury(self, seq: int, list_key: str, payload: bytes, error: GpuinferError, *, deaths: int = 0) -> str:
        """Move a task to the dead letters, with a failure result where its id can be read."""
        task_id, reply = identify(payload)
        follows = self.chains.buried(payload, error, list_key)
        place = keys.place_of(list_key)
        caller = place.caller
        model = place.model or self._default_model()
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
        meta = results.failure(task_id, error, worker=self.worker, caller=caller) if task_id else b""
        end = Final(
            seq, letter_id, meta, reply=reply, label=label("dead", place.tier, model), follows=follows
        )
        not_sent = self._bury(
            keys=[self.inflight],
            args=[
                *(seq, letter_id, letter, self._settings.result_ttl_s, meta, reply, end.label),
                *following([end]),
            ],
        )
        _tell_of_refused(not_sent)
        log.error(
            "task_dead_lettered",
            task_id=letter_id,
            queue=place.tier,
            **({"model": model} if model else {}),
            deaths=deaths,
            reason=error.message,
        )
        self.trim_letters()
        return letter_id

    def trim_letters(self) -> None:
        """Drop the dead letters that are over a bound, and log their ids. Raises redis-py's errors."""
        settings = self._settings
        bounds = settings.max_dead, settings.max_dead_bytes, settings.dead_ttl_s
        while dropped := self._trim(args=bounds):
            log.warning(
                "dead_letters_dropped",
                count=len(dropped),
                reason=f"kept are {bounds[0]} at most, {bounds[1]} bytes of them, for {bounds[2]} s",
                hint="the oldest go first; queue.max_dead, max_dead_bytes and dead_ttl_s are the bounds",
                task_ids=[letter_id.decode("utf-8", "backslashreplace") for letter_id in dropped],
            )


def _tell_of_refused(not_sent: Sequence[bytes]) -> None:
    """Log the tasks that Redis did not let follow, and that have ended so."""
    for task_id, reason in _pairs(not_sent).items():
        hint = (
            "queue.chain_queues names where chains may go on; gpuinfer redis apply-users gives the right to"
        )
        log.error("chain_refused", task_id=task_id, reason=reason, hint=hint)


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode(errors="replace") for text in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
