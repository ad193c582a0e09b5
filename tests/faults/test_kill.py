# SPDX-License-Identifier: Apache-2.0
"""Kill workers at random moments while producers go on; then account for every id.

A short form of what is run by hand: ``python -m tests.faults.kill``, 26 kills and six bombs (or
``--minutes 10``, ``--signal TERM``, ``--stock``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RedisFactory
from tests.faults.fleet import LIVES
from tests.faults.kill import Plan, run

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(("name", "kills", "bombs"), [("KILL", 4, ("gzip", "run")), ("TERM", 4, ())])
def test_nothing_is_lost(
    redis_factory: RedisFactory, tmp_path: Path, name: str, kills: int, bombs: tuple[str, ...]
) -> None:
    """Kills at random moments, of workers that come back and of names that do not: each accepted task ends
    once as asked for, none is lost or given up, repeats are flagged; a bomb takes two workers along; who is
    only stopped leaves nothing in flight."""
    account = run(Plan(signal=name, kills=kills, bombs=bombs), redis_factory(), tmp_path)
    assert account.kills >= kills
    assert account.bombed <= sum(LIVES[kind] for kind in bombs)
    assert account.bombs == len(bombs)
    assert account.accepted >= 500
    assert account.lost == ()
    assert account.unexpected == (), account.reasons
    assert account.stray == ()
    assert account.unflagged == ()
    assert account.early == ()
    assert account.not_followed == account.followed_twice == ()
    if name == "TERM":
        assert account.put_back == 0
        # A job that is stopped between two slices is run again as a whole.
        assert [row for row in account.rows if row.repeated and "job" not in row.by] == []


def test_the_checker_finds_losses(redis_factory: RedisFactory, tmp_path: Path) -> None:
    """The same checker, on stock Celery in the usual set-up, finds that killed workers lose tasks.

    About one kill in nine loses one; the run ends at the first.
    """
    account = run(Plan(signal="KILL", kills=200, stock=True), redis_factory(), tmp_path)
    assert account.lost
