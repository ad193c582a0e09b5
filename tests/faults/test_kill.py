# SPDX-License-Identifier: Apache-2.0
"""Kill workers at random moments while producers go on; then account for every id.

Run it longer by hand: ``python -m tests.faults.kill --minutes 10`` (or ``--signal TERM``, ``--stock``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RedisFactory
from tests.faults.kill import Plan, run

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_nothing_is_lost(redis_factory: RedisFactory, tmp_path: Path, name: str) -> None:
    """26 kills at random moments: each accepted task ends once, none is lost, repeats are flagged."""
    account = run(Plan(signal=name, kills=26), redis_factory(), tmp_path)
    assert account.kills >= 26
    assert account.accepted >= 1000
    assert account.lost == ()
    assert account.unexpected == ()
    assert account.unflagged == ()


def test_the_checker_finds_losses(redis_factory: RedisFactory, tmp_path: Path) -> None:
    """The same checker, on stock Celery in the usual set-up, finds that killed workers lose tasks.

    About one kill in nine loses one; the run ends at the first.
    """
    account = run(Plan(signal="KILL", kills=200, stock=True), redis_factory(), tmp_path)
    assert account.lost
