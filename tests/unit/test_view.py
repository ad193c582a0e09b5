# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer status``: what is shown of recorded facts, on wide and narrow screens."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpuinfer.doctor.host import error, warning
from gpuinfer.doctor.registry import CHECKS
from gpuinfer.queue.depth import Depth, Lane
from gpuinfer.settings import ApiSettings, load
from gpuinfer.view import access, words
from gpuinfer.view.build import build
from gpuinfer.view.columns import Column, fit
from gpuinfer.view.facts import Facts
from gpuinfer.view.gather import OF_ADMIN, OF_HOST, OF_REDIS
from gpuinfer.view.model import Curve, Status
from gpuinfer.view.screen import lines, show

pytestmark = pytest.mark.unit

NOW = 1_000_000.0
GPU = {"index": 0, "name": "NVIDIA H100", "memory_used": 9 * 2**30, "memory_total": 80 * 2**30}


def beat(number: int, host: str, **more: Any) -> dict[str, Any]:
    """Return a fresh heartbeat."""
    body = {"models": ["resnet"], "queues": ["realtime", "batch"], "done": 7, "rate": 2.5, "state": "busy"}
    return {"at": NOW - 2, "device": "cpu", **body, **more}


def instance(number: int, **more: Any) -> dict[str, Any]:
    """Return an instance as its watcher tells of it."""
    plain = {"masked": False, "excluded": "", "log_only": False, "tiers": ["realtime"], "models": ["resnet"]}
    return {"number": number, "state": "active", **plain, **more}


def told(*instances: Mapping[str, Any], at: float = NOW - 1, **more: Any) -> dict[str, Any]:
    """Return what a watcher tells."""
    return {"at": at, "interval_s": 1.0, "instances": list(instances), **more}


def facts(**more: Any) -> Facts:
    """Return the facts of a host with one worker and some tasks."""
    depth = Depth(
        lanes={Lane("realtime", "resnet"): {0: 3}, Lane("batch", "ocr"): {0: 4}},
        claimed={},
        inflight={"gpu0@here": 2},
        dead_letters=1,
        default_model="resnet",
        catalogue={"resnet": NOW},
    )
    usual: dict[str, Any] = {
        "now": NOW,
        "host": "here",
        "version": "1.2.3",
        "place": "/run/redis.sock",
        "depth": depth,
        "beats": {"gpu0@here": beat(0, "here")},
        "told": {"here": told(instance(0))},
        "ended": {"completed realtime resnet": 40, "failed batch ocr": 2, "bytes realtime resnet": 999},
        "info": {"redis_version": "7.0.15", "used_memory": 2**20, "maxmemory": 2**28},
        "access": ("API http://127.0.0.1:8080: this host",),
    }
    return Facts(**{**usual, **more})


def screen(status: Status, width: int) -> str:
    """Return what is printed at a width."""
    out = io.StringIO()
    show(status, Console(file=out, width=width, force_terminal=True, color_system=None, height=60))
    return out.getvalue()


def test_what_is_counted_is_shown_as_it_is() -> None:
    """Ends by outcome are Redis's own counters, and bytes are no end."""
    found = build(facts())
    assert found.ended == {"completed": 40, "failed": 2}
    assert found.ended_by_queue == {"realtime.resnet": {"completed": 40}, "batch.ocr": {"failed": 2}}
    assert (found.waiting, found.in_flight, found.rate) == (7, 2, 2.5)
    assert found.to_dict()["ended"] == found.ended


@pytest.mark.parametrize(
    ("one", "beats", "state"),
    [
        (instance(0), {"gpu0@here": beat(0, "here", state="idle")}, "idle"),
        (instance(0, state="inactive"), {}, "stopped"),
        (instance(0, state="activating"), {}, "starting"),
        (instance(0, state="failed"), {}, "failed"),
        (instance(0, masked=True, state="inactive"), {}, "masked"),
        (instance(0), {"gpu0@here": beat(0, "here", at=NOW - 60)}, "silent"),
    ],
)
def test_the_state_of_a_worker(one: Mapping[str, Any], beats: Mapping[str, Any], state: str) -> None:
    """A fresh heartbeat says it; without one the unit does, and one that only claims to run is silent."""
    (worker,) = build(facts(told={"here": told(one)}, beats=beats)).workers
    assert worker.state == state
    assert worker.alive == (state == "idle")


def test_every_host_is_shown_and_a_silent_watcher_is_trouble() -> None:
    """What a watcher told long ago holds no more: of its workers, only heartbeats do."""
    found = build(
        facts(
            told={"here": told(instance(0)), "there": told(instance(0), instance(1), at=NOW - 90)},
            beats={"gpu0@here": beat(0, "here"), "gpu1@there": beat(1, "there")},
        )
    )
    assert [(one.name, one.watcher, one.running, one.instances) for one in found.hosts] == [
        ("here", "acts", 1, 1),
        ("there", "silent", 1, 2),
    ]
    assert [worker.state for worker in found.workers] == ["busy", "silent", "busy"]
    assert found.exit_code == 1
    assert found.troubles[0].remedy == "systemctl restart gpuinfer-watcher  # on there"


def test_a_quarantine_is_trouble_and_what_an_administrator_stopped_is_not() -> None:
    """The reason is the watcher's own."""
    ill, stopped = instance(1, state="inactive", excluded="its GPU is not well: Xid 79"), instance(2)
    stopped |= {"state": "inactive", "excluded": "stopped by hand"}
    (trouble,) = build(facts(told={"here": told(instance(0), ill, stopped)})).troubles
    assert trouble.what == "gpu1@here not started: its GPU is not well: Xid 79"
    assert trouble.severity == "warning" and "gpuinfer-worker@1" in trouble.remedy


def test_the_exit_code_is_that_of_the_worst_trouble() -> None:
    """0, 1 and 2, as monitoring plug-ins have it; errors come first."""
    assert build(facts()).exit_code == 0
    ill = build(facts(findings=[warning("w", "do w"), error("e", "do e")]))
    assert ill.exit_code == 2
    assert [trouble.what for trouble in ill.troubles] == ["e", "w"]
    away = build(
        facts(reachable=False, depth=None, beats={}, told={}, ended=None, findings=[error("no", "")])
    )
    assert away.exit_code == 2 and away.ended is None
    assert "QUEUES" not in screen(away, 80)


@pytest.mark.parametrize("width", [80, 160])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    """But for remedies, which are there to be pasted."""
    many = told(*(instance(n, excluded="other programs hold 20,000 MiB of its GPU") for n in range(1, 9)))
    many["gpus"] = [{**GPU, "workers": [0, 1], "temperature_c": 91, "busy": 0.5}]
    curve = Curve(name="done", unit="/s", values=[float(n % 7) for n in range(60)], step_s=60, now=9)
    status = build(
        facts(
            told={"a-host-with-a-long-name.example.com": many, "here": told(instance(0))},
            findings=[error("a message that goes on and on " * 8, "a remedy " * 30)],
            curves=[curve],
        )
    )
    text = screen(status, width)
    found = [line for line in text.splitlines() if len(line) > width]
    assert all(line.startswith("  → ") for line in found)
    assert "GPUS AND WORKERS" in text and "91°C" in text
    assert width == 80 or "H100" in text
    assert "now 9, most 9" in text


def test_a_host_without_gpus_hears_nothing_of_gpus() -> None:
    """Neither a column nor a word of it."""
    assert "GPU" not in screen(build(facts()), 160)
    assert "°" not in screen(build(facts()), 160)


def test_many_workers_leave_room_for_the_rest() -> None:
    """On a terminal those that are well are summed up; in a pipe all are there."""
    fleet = told(*(instance(n) for n in range(64)))
    beats = {f"gpu{n}@here": beat(n, "here") for n in range(64)}
    status = build(facts(told={"here": fleet}, beats=beats))
    assert len(list(lines(status, 120, 40))) <= 41
    assert "more, all well" in screen(status, 120)
    assert len(list(lines(status, 120, None))) > 64


def test_what_matters_least_goes_first() -> None:
    """Columns of rank 0 stay, and one that says nothing is left out at any width."""
    columns = [
        Column[str]("name", lambda row: row),
        Column[str]("more", lambda row: "x" * 10, rank=2),
        Column[str]("most", lambda row: "y" * 10, rank=1),
        Column[str]("none", lambda row: words.NONE, rank=3),
    ]
    heads = {width: [cell.text.strip() for cell in fit(columns, ["a"], width)[0]] for width in (80, 20, 5)}
    assert heads == {80: ["name", "more", "most"], 20: ["name", "most"], 5: ["name"]}


def test_numbers_as_people_read_them() -> None:
    """Short, with a unit, and a dash for what is not known."""
    assert [words.rate(n) for n in (None, 0, 0.25, 12.6)] == ["-", "0/s", "0.2/s", "13/s"]
    assert words.of(9 * 2**30, 80 * 2**30) == "9.0G/80G"
    assert [words.span(s) for s in (0.34, 45, 600, 9000, 10 * 86400)] == [
        "0.3 s",
        "45 s",
        "10 min",
        "2 h",
        "10 d",
    ]
    assert words.spark([0, 1, None, 7], 4) == "▁▂ █"
    assert words.spark([1.0] * 120, 60) == "█" * 60
    assert words.spark([], 10) == ""


def test_status_runs_the_doctors_own_checks() -> None:
    """Under the doctor's names, so that it can be asked for more."""
    known = {check.name: check.run for check in CHECKS}
    assert all(known[check.name] is check.run for check in (*OF_REDIS, *OF_ADMIN, *OF_HOST))


def test_who_may_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback needs no key until there is one; a network is nobody's without one."""
    settings = load(None, {"GPUINFER_API_KEYS_DIR": str(tmp_path)}).settings
    assert access.who(settings, ("127.0.0.1", 8080))[0].endswith("this host without a key")
    assert "no access from the network" in access.who(settings, ("0.0.0.0", 8080))[0]
    (tmp_path / "alice.toml").touch()
    assert access.who(settings, ("::", 8080))[0] == "API http://[::]:8080: the network, with the one key"
    monkeypatch.setattr(access, "FLOWER", tmp_path / "runs")
    assert not any("Flower" in line for line in access.who(settings, ("::", 8080)))
    (tmp_path / "runs").symlink_to("5d41402abc4b2a76b9719d911017c592")  # as systemd's: to nothing
    assert "as admin with its password" in access.who(settings, ("::", 8080))[2]
    assert isinstance(settings.api, ApiSettings)


def test_what_is_slow_to_import_is_not_imported() -> None:
    """Status answers in less than 0.4 s: numpy alone, or Celery, would take a third of that."""
    script = (
        "import sys; import gpuinfer.cli, gpuinfer.view.cli, gpuinfer.view.build, gpuinfer.view.gather, "
        "gpuinfer.view.screen; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    slow = {
        "torch",
        "celery",
        "kombu",
        "numpy",
        "PIL",
        "textual",
        "fastapi",
        "structlog",
        "dbus_fast",
        "pynvml",
    }
    assert loaded & slow == set()
