# SPDX-License-Identifier: Apache-2.0
"""Where every accepted task of a kill test went, by its model and by who sent it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A task that Redis has accepted."""

    id: str
    #: The model it is for.
    model: str
    #: Who sent it, and into which queue.
    by: str
    #: True: its worker does not survive it.
    bomb: bool = False
    #: The wall clock before which it must not begin.
    eta: float | None = None
    #: The id of the task that its end must send on into the queue of another application.
    follower: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The tasks of one model and sender."""

    model: str
    by: str
    accepted: int
    completed: int
    lost: int
    #: Tasks that ran more than once.
    repeated: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Where every accepted task went."""

    accepted: int
    completed: int
    #: Accepted, and neither ended nor anywhere in Redis.
    lost: tuple[str, ...]
    #: Ended in another way than was asked for; of bombs: not among the dead letters.
    unexpected: tuple[str, ...]
    #: What their errors say, each once, the most frequent first.
    reasons: tuple[str, ...] = ()
    #: Dead letters that are no bombs.
    stray: tuple[str, ...] = ()
    #: Executions beyond the first of an id.
    duplicates: int = 0
    #: Ids that ran more than once and whose result does not say so.
    unflagged: tuple[str, ...] = ()
    #: Ids that began before their ETA.
    early: tuple[str, ...] = ()
    #: What chains have sent on into the queue of another application; and what they should have sent but did
    #: not, or sent twice.
    followers: int = 0
    not_followed: tuple[str, ...] = ()
    followed_twice: tuple[str, ...] = ()
    #: Workers that were killed, and those that died of bombs.
    kills: int = 0
    bombed: int = 0
    #: Worker names that were killed and never came back.
    gone: tuple[str, ...] = ()
    #: Tasks that were in flight under those names, and were put back.
    put_back: int = 0
    bombs: int = 0
    rows: tuple[Row, ...] = ()

    @property
    def good(self) -> bool:
        """True when nothing is lost, nothing ended wrongly, and every repeat says so."""
        wrong = (self.lost, self.unexpected, self.stray, self.unflagged, self.early)
        return not any((*wrong, self.not_followed, self.followed_twice))


def rows(
    sent: Sequence[Sent], completed: set[str], lost: Sequence[str], ran: Counter[str]
) -> tuple[Row, ...]:
    """Count by model and sender."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    missing = set(lost)
    for task in sent:
        count = counts.setdefault((task.model, task.by), Counter())
        count["accepted"] += 1
        count["completed"] += task.id in completed
        count["lost"] += task.id in missing
        count["repeated"] += ran[task.id] > 1
    names = ("accepted", "completed", "lost", "repeated")
    return tuple(
        Row(model=model, by=by, **{name: count[name] for name in names})
        for (model, by), count in sorted(counts.items())
    )


def show(account: Account, console: Console) -> None:
    """Print the table, and the sums below it."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("model", "sent by", "accepted", "completed", "lost", "ran again"):
        table.add_column(name, justify="left" if name in ("model", "sent by") else "right", no_wrap=True)
    for row in account.rows:
        counts = (row.accepted, row.completed, row.lost, row.repeated)
        table.add_row(row.model, row.by, *(f"{count:,}" for count in counts))
    console.print(table)
    sums = {
        "kills": account.kills,
        "workers that died of bombs": account.bombed,
        "names that never came back": len(account.gone),
        "tasks put back for them": account.put_back,
        "accepted": account.accepted,
        "completed": account.completed,
        "bombs in the dead letters": account.bombs,
        "lost": len(account.lost),
        "ended unexpectedly": len(account.unexpected),
        "dead letters that are no bombs": len(account.stray),
        "began before their ETA": len(account.early),
        "sent on by chains": account.followers,
        "not sent on, or twice": len(account.not_followed) + len(account.followed_twice),
        "executions beyond the first": account.duplicates,
        "repeats whose result does not say so": len(account.unflagged),
    }
    for what, count in sums.items():
        console.print(f"{what:37} {count:>9,}", highlight=False)
    for reason in account.reasons[:10]:
        console.print(f"  {reason}", highlight=False)
