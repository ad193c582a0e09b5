# SPDX-License-Identifier: Apache-2.0
"""What the check on a GPU decides without one: what is packed, what its figures say, and that a hang ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.gpu import kit, packing
from tests.gpu.figures import Worked, row
from tests.gpu.packing import THERE, locked, needed
from tests.gpu.parts import BUDGET_S, PARTS
from tests.gpu.report import Outcome, Report, lines

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
HERE = "{}.{}".format(*sys.version_info)


# -- the kit ------------------------------------------------------------------------------


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_what_is_packed_is_locked(python: str) -> None:
    """All that gpuinfer and the suite need has a pin; torch, numpy and what only they need stay out."""
    names = needed(python)
    assert names <= locked().keys()
    assert {"celery", "hiredis", "pytest", "sdnotify"} <= names
    assert not names & {*THERE, "sympy", "networkx", "mypy", "gpuinfer"}


@pytest.mark.parametrize(("limit", "code"), [(1000, 0), (10, 1)])
def test_a_kit_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, code: int
) -> None:
    """The sizes are printed in any case, to see what to leave out."""

    def pack(kit: Path, python: str) -> None:
        for name in ("wheels/some.whl", "redis/redis-server"):
            (kit / name).parent.mkdir(parents=True)
            (kit / name).write_bytes(bytes(100))

    monkeypatch.setattr(packing, "pack", pack)
    monkeypatch.setattr(packing, "LIMIT_BYTES", limit)
    done = CliRunner().invoke(packing.main, ["--into", str(tmp_path / "kit")])
    assert done.exit_code == code
    assert "some.whl" in done.output and "in all" in done.output
    assert ("too large" in done.output) == bool(code)


def facts(**changes: str) -> kit.Facts:
    """Return the facts of a kit that fits."""
    fitting = {"python": HERE, "sources": kit.digest_of(), "wheels": "", "redis": "7"}
    return kit.Facts(**(fitting | changes))


def test_a_kit_that_fits_is_taken(tmp_path: Path) -> None:
    """It was packed from these sources, for this Python."""
    facts().write(tmp_path)
    assert kit.check(tmp_path) == facts()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": "3.9"}, f"the kit is for Python 3.9 .* --python {HERE}"),
        ({"sources": "others"}, "gpuinfer has changed"),
    ],
)
def test_a_kit_for_something_else_is_refused(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    """Before any time of the GPU machine is spent on it."""
    facts(**changes).write(tmp_path)
    with pytest.raises(kit.KitError, match=words):
        kit.check(tmp_path)


def test_without_a_kit_it_says_how_to_make_one(tmp_path: Path) -> None:
    """Whatever else lies in the folder."""
    (tmp_path / "kit.json").write_text("[]")
    with pytest.raises(kit.KitError, match="tests/gpu/pack"):
        kit.check(tmp_path)


# -- running ------------------------------------------------------------------------------


def test_the_whole_check_is_under_seven_minutes() -> None:
    """Its budget leaves time for the table; no part may take half of it."""
    assert BUDGET_S < 7 * 60 - 15
    assert all(part.limit_s < BUDGET_S / 2 for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_every_file_of_tests_is_a_part() -> None:
    """Or it would never run."""
    files = {file.name for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {Path(part.arguments[-1]).name for part in PARTS if part.arguments[0] == "pytest"}


#: Runs a shell's command under a limit, and prints what is wrong with how it ended.
UNDER_A_LIMIT = """
import sys
from pathlib import Path
from tests.gpu.limited import become_reaper, run
become_reaper()
with open(sys.argv[1], "wb") as log:
    command = ["/bin/sh", "-c", sys.argv[3]]
    print(run(command, log, limit_s=float(sys.argv[2]), env={}, cwd=Path("/")).reason)
"""
#: Leaves a child in a session of its own that ignores SIGTERM.
LEAVE_A_CHILD = "setsid sh -c 'trap \"\" TERM; sleep 600' & echo $!; "


@pytest.mark.parametrize(
    ("limit_s", "ending", "words"), [(5, "wait", "stopped at its limit"), (60, "true", "left running: ")]
)
def test_a_command_leaves_nothing_running(tmp_path: Path, limit_s: int, ending: str, words: str) -> None:
    """One that hangs is stopped at its limit; what either leaves, in whatever session, is ended and told."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(log), str(limit_s), LEAVE_A_CHILD + ending]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=90)
    assert words in done.stdout
    pid = int(log.read_text().split()[0])
    assert not Path(f"/proc/{pid}").exists()


# -- figures ------------------------------------------------------------------------------

#: Milliseconds of a batch of 8, each step by itself: 10 in all, 6 of them the device's.
STEPS = {"decode": 3.0, "copy": 1.0, "run": 4.0, "back": 1.0, "render": 1.0}


def figures(wall_ms: float, thread_ms: float) -> dict[str, Any]:
    """Return the row of a worker that took so long for each of ten batches."""
    worked = Worked(items=80, batches=10, seconds=wall_ms / 100, thread_ms=thread_ms)
    return row("net", 8, 1000.0, STEPS, worked)


def test_a_worker_that_does_one_thing_after_another() -> None:
    """Nothing is hidden, and what comes between two batches is the gap."""
    found = figures(12.0, 10.0)
    assert (found["hidden_ms"], found["gap_ms"], found["overlaps"]) == (0.0, 2.0, "nothing")
    assert found["worker_per_s"] == pytest.approx(666.7, abs=0.1)
    assert found["ratio"] == pytest.approx(0.6667, abs=0.001)
    assert found["device_busy_pct"] == pytest.approx(50.0)


def test_a_worker_whose_queue_works_meanwhile() -> None:
    """There is hardly a gap: claims and ends are written while the next batch runs."""
    assert figures(10.2, 10.0)["overlaps"] == "queue"


def test_a_worker_that_prepares_meanwhile() -> None:
    """A batch takes less than its steps do: the device never waits for decode and render."""
    found = figures(6.0, 6.0)
    assert (found["hidden_ms"], found["device_busy_pct"]) == (4.0, 100.0)
    assert found["overlaps"] == "decode, render + queue"


# -- the report ---------------------------------------------------------------------------


def test_a_part_that_was_stopped_fails_the_check() -> None:
    """What it had checked by then is shown, and the other parts are as they are."""
    check = {"what": "it starts", "ok": True, "seconds": 1.0, "detail": ""}
    report = Report(dry_run=False)
    report.parts = [
        Outcome(name="one", limit_s=60, checks=[check]),
        Outcome(name="two", limit_s=60, reason="stopped at its limit, after 60 s", checks=[check]),
    ]
    text = "\n".join(lines(report))
    assert (report.parts[0].ok, report.parts[1].ok, report.ok) == (True, False, False)
    assert text.count("it starts") == 2
    assert "FAILED: stopped at its limit, after 60 s" in text
    assert text.endswith("FAILED: two (0 s)")


def test_a_check_that_fails_fails_its_part() -> None:
    """Its words stand in the table."""
    check = {"what": "it starts", "ok": False, "seconds": 1.0, "detail": "exit status 69"}
    report = Report(dry_run=False, parts=[Outcome(name="one", limit_s=60, checks=[check])])
    assert not report.ok
    assert "FAILED: exit status 69" in "\n".join(lines(report))
    assert not Report(dry_run=False).ok, "a run of nothing has shown nothing"
