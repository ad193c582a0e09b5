# SPDX-License-Identifier: Apache-2.0
"""What passes between a worker and its store: what it wants, what it has claimed, and how tasks end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpuinfer.queue.direct import Argument

#: A bound that every rank is better than.
ANY_RANK = 1000

#: What runs at the claimer: nothing, and it waits for work; nothing just now; a batch.
State = Literal["idle", "free", "busy"]


@dataclass(slots=True)
class Claimed:
    """A task this worker owns until it settles or releases it."""

    #: Its field in the in-flight hash; ``seq:list`` names the list it came from.
    seq: int
    list_key: str
    #: Its list's place in the order of serving, 0 the most urgent.
    rank: int
    #: Its message; empty once the worker has read it: Redis keeps it in flight.
    payload: bytes
    #: True when its list was passed over for too long: its first batch goes before all.
    aged: bool = False
    #: The id under which the claim has noted that it runs; None where it has not.
    noted_id: str | None = None
    #: The model whose list it was in: a message that names none is for that.
    model: str = ""


@dataclass(frozen=True, slots=True)
class Want:
    """How many tasks of a model to claim."""

    count: int
    #: Only from lists before this rank.
    better_than: int = ANY_RANK
    #: A share that is smaller is not worth a batch.
    least: int = 1


NOTHING = Want(0)
#: Model -> what to claim of it.
Wants = Mapping[str, Want]


def flat_wants(models: Sequence[str], wants: Wants) -> list[Argument]:
    """Return the wants of a worker of these models as ``claim.lua`` reads them.

    The want that most models share comes last, without their names: those cost a claim nothing more.
    """
    sharing: dict[Want, list[str]] = {}
    for model in models:
        sharing.setdefault(wants.get(model, NOTHING), []).append(model)
    args: list[Argument] = []
    usual = max(sharing, key=lambda want: len(sharing[want]))
    for want, names in sharing.items():
        if want is not usual:
            args += (want.count, want.better_than, want.least, len(names), *names)
    named = models if len(models) == 1 else ()
    return [*args, usual.count, usual.better_than, usual.least, len(named), *named]


@dataclass(frozen=True, slots=True)
class Order:
    """A claim as it is sent to Redis. One at a time: the next one's sequence ids depend on its answer."""

    keys: Sequence[str]
    args: Sequence[Argument]
    #: The epoch it belongs to. Redis refuses it in a later one.
    epoch: int
    sha: str

    @property
    def command(self) -> tuple[Argument, ...]:
        """The whole command. Redis may have forgotten the script; ``Store.claim`` loads it."""
        return ("EVALSHA", self.sha, len(self.keys), *self.keys, *self.args)


@dataclass(frozen=True, slots=True)
class Follow:
    """What follows the end of a task: a message that is sent on, or ends of tasks that will never begin."""

    #: Whether it follows a success, or anything else.
    success: bool
    #: The list it goes to; empty: nothing is sent.
    list_key: str = ""
    message: bytes = b""
    #: The id of the task that is sent.
    id: str = ""
    #: True for a list of ours: it is waited for, and wakes a worker.
    ours: bool = False
    #: The model of a task of ours; empty: the default one.
    model: str = ""
    #: What its state tells of it while it waits, besides its place.
    told: bytes = b"}}"
    #: (id, final meta) of what ends when nothing is sent, or that is refused.
    ends: tuple[tuple[str, bytes], ...] = ()

    def flat(self) -> Iterator[Argument]:
        """Yield it as ``chain.lua`` reads it."""
        yield from (
            int(self.success),
            self.list_key,
            self.message,
            int(self.ours),
            self.id,
            self.model,
            self.told,
        )
        yield len(self.ends)
        for task_id, meta in self.ends:
            yield from (task_id, meta)


class Final(NamedTuple):
    """The end of one task: its place in flight, its id (empty: no state is written), and its final meta."""

    seq: int | None
    task_id: str
    meta: bytes
    #: False: the callers who wait are told, and nothing is kept.
    keep: bool = True
    #: The channel on which its client hears of ends; empty: none.
    reply: str = ""
    #: ``outcome tier model``: what it is counted under.
    label: str = "unknown"
    #: What follows it, and the id of the task where ``task_id`` is empty. It is done by the call that takes
    #: the task out of flight; without that, the end itself is not written either.
    follows: tuple[Follow, ...] = ()
    parent: str = ""

    @property
    def fields(self) -> tuple[Argument, ...]:
        """What the scripts write: id, meta, whether to keep it, reply channel, label."""
        return self.task_id, self.meta, int(self.keep), self.reply, self.label


class Stray(NamedTuple):
    """A task that waits in the default model's list, and is for another model."""

    #: How many of those that were read with it are served before it.
    place: int
    payload: bytes
    model: str
    #: Its end, where nobody knows its model.
    final: Final | None = None


def size_of(final: Final) -> int:
    """Return how many bytes an end has, with what follows it."""
    return len(final.meta) + sum(len(follow.message) for follow in final.follows)


def following(finals: Sequence[Final]) -> Iterator[Argument]:
    """Yield what follows some ends, as scripts take it behind them (``chain.lua``)."""
    for number, final in enumerate(finals, start=1):
        if final.follows:
            _, _, place = final.label.partition(" ")
            yield from (
                number,
                final.task_id or final.parent,
                f"not_run {place}".rstrip(),
                len(final.follows),
            )
            for follow in final.follows:
                yield from follow.flat()


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did."""

    returned: int
    dead: tuple[str, ...]
    #: Of those put back; the first thousand of them that can be read.
    ids: tuple[str, ...] = ()


def label(outcome: str, tier: str, model: str) -> str:
    """Return what an end is counted under."""
    return f"{outcome} {tier} {model}".rstrip()
