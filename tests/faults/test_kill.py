# SPDX-License-Identifier: Apache-2.0
"""Kill workers at random moments while producers go on; then account for every id.

A short form of what is run by hand: ``python -m tests.faults.kill``, 26 kills and poison (or
``--minutes 10``, ``--signal TERM``, ``--stock``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RedisFactory
from tests.faults.kill import Plan, run

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(("name", "kills"), [("KILL", 6), ("TERM", 4)])
def test_nothing_is_lost(redis_factory: RedisFactory, tmp_path: Path, name: str, kills: int) -> None:
    """Kills at random moments, of workers that come back and of names that do not: each accepted task ends
    once as asked for, none is lost, repeats are flagged; who is only stopped leaves nothing in flight."""
    account = run(Plan(signal=name, kills=kills), redis_factory(), tmp_path)
    assert account.kills >= kills
    assert account.accepted >= 500
    assert account.lost == ()
    assert account.unexpected == (), account.reasons
    assert account.stray == ()
    assert account.unflagged == ()
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
