# SPDX-License-Identifier: Apache-2.0
"""What a worker and its store exchange: the tasks wanted, the tasks claimed, and how tasks end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpuinfer.queue.direct import Argument

#: Larger than every rank: no limit.
ANY_RANK = 1000

#: What the claiming worker does: it waits for work; it runs nothing at the moment; it runs a batch.
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
    #: True if its list was passed over for too long: its first batch goes before all others.
    aged: bool = False
    #: The id, if the claim has noted that the task runs; None if not.
    noted_id: str | None = None
    #: The model whose list it was in; a message that names no model is for this one.
    model: str = ""


@dataclass(frozen=True, slots=True)
class Want:
    """How many tasks of a model to claim."""

    count: int
    #: Only from lists before this rank.
    better_than: int = ANY_RANK
    #: Claim at least this many, even if the fair share of idle workers is smaller.
    least: int = 1


NOTHING = Want(0)
#: Model -> what to claim of it.
Wants = Mapping[str, Want]


def flat_wants(models: Sequence[str], wants: Wants) -> list[Argument]:
    """Return the wants of a worker of these models as ``claim.lua`` reads them.

    The want that most models share comes last, without their names, which keeps the claim short.
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
    """A claim as it is sent to Redis. One at a time: the sequence ids of the next depend on its answer."""

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
    """What follows the end of a task: a message to send, or the ends of tasks that will never begin."""

    #: True: it follows a success; False: it follows any other end.
    success: bool
    #: The list to send the message to; empty: nothing is sent.
    list_key: str = ""
    message: bytes = b""
    #: The id of the task that is sent.
    id: str = ""
    #: True for a list of ours: write the task's waiting state, and wake a worker.
    ours: bool = False
    #: The model of a task of ours; empty: the default model.
    model: str = ""
    #: The end of its waiting state, after its place (``message.end_of_state``).
    told: bytes = b"}}"
    #: (id, final meta) of the tasks to end if nothing is sent, or if Redis refuses the message.
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
    #: False: tell the callers who wait, and store nothing.
    keep: bool = True
    #: The reply channel of its client; empty: none.
    reply: str = ""
    #: ``outcome tier model``: what the end is counted under.
    label: str = "unknown"
    #: What follows the end; ``parent`` is the task's id where ``task_id`` is empty. Both the end and what
    #: follows are written only by the call that takes the task out of flight.
    follows: tuple[Follow, ...] = ()
    parent: str = ""

    @property
    def fields(self) -> tuple[Argument, ...]:
        """Its fields for the scripts: id, meta, whether to keep it, reply channel, label."""
        return self.task_id, self.meta, int(self.keep), self.reply, self.label


class Stray(NamedTuple):
    """A task that waits in the default model's list but is for another model."""

    #: How many of the tasks that were read with it are served before it.
    place: int
    payload: bytes
    model: str
    #: Its end, if its model is unknown.
    final: Final | None = None


def size_of(final: Final) -> int:
    """Return the bytes of an end and of the messages that follow it."""
    return len(final.meta) + sum(len(follow.message) for follow in final.follows)


def following(finals: Sequence[Final]) -> Iterator[Argument]:
    """Yield what follows some ends, as the last arguments of a script (``chain.lua``)."""
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
    #: The ids of tasks that were put back: the first thousand that can be read.
    ids: tuple[str, ...] = ()


def label(outcome: str, tier: str, model: str) -> str:
    """Return what an end is counted under: ``outcome tier model``."""
    return f"{outcome} {tier} {model}".rstrip()
