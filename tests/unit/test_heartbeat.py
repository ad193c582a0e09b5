# SPDX-License-Identifier: Apache-2.0
"""A worker's signs of life to systemd, with a clock and a notifier of our own; the API's, too."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import redis
from structlog.testing import capture_logs

from gpuinfer.api.front import Front
from gpuinfer.api.server import Server
from gpuinfer.queue.store import Store
from gpuinfer.settings import QueueSettings, Settings
from gpuinfer.worker import heartbeat
from gpuinfer.worker.ceiling import Ceiling
from gpuinfer.worker.heartbeat import (
    DRAIN_ALLOWANCE_S,
    MOST_REASON,
    REPORT_S,
    STUCK_GRACE_S,
    Pulse,
    keep_asking,
)
from gpuinfer.worker.process import DRAIN_TIMEOUT_S, Process
from gpuinfer.worker.vitals import Vitals

pytestmark = pytest.mark.unit

NOBODY = "/nonexistent/redis.sock"


class Notes:
    """Stands for systemd: keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def notify(self, state: str) -> None:
        self.all += state.split("\n")

    def take(self, start: str = "") -> list[str]:
        """Return and forget what has come; what begins with ``start``."""
        found, self.all = self.all, []
        return [note for note in found if note.startswith(start)]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Setup:
    """A pulse over a batcher that does nothing, and a Redis that never answers."""

    def __init__(self, **environ: str) -> None:
        self.notes, self.clock = Notes(), Clock()
        store = Store(redis.Redis(unix_socket_path=NOBODY), "gpu0@test", ["realtime"], QueueSettings())
        self.engine: Any = SimpleNamespace(current=None, batches=[], probing=False, moved_at=self.clock.now)
        batcher: Any = SimpleNamespace(
            store=store, engine=self.engine, models={"b": 1, "a": 2}, device="gpu0", done=0, closed=False
        )
        self.batcher = batcher
        self.pulse = Pulse(batcher, "gpu0@test", 0, notifier=self.notes, clock=self.clock, environ=environ)
        self.waiting: int | None = 0
        self.written: list[str] = []
        self.pulse._write = self._write  # type: ignore[method-assign]  # Redis is the integration test's

    def _write(self, state: str, rate: float) -> int | None:
        self.written.append(state)
        return self.waiting

    def run(self, hard_limit_s: float, size: int = 3) -> None:
        """Begin a batch now."""
        self.engine.current = SimpleNamespace(
            model="a",
            hard_limit_s=hard_limit_s,
            size=size,
            tasks=[
                SimpleNamespace(id=f"t{number}", hard_limit_s=hard_limit_s + number) for number in range(size)
            ],
        )
        self.engine.batches = [self.engine.current]
        self.engine.moved_at = self.clock.now

    def beat_for(self, seconds: float) -> list[str]:
        """Let time pass, one beat a second; return what systemd was told."""
        for _ in range(int(seconds)):
            self.clock.now += 1
            self.pulse.beat()
        return self.notes.take()


def test_a_heartbeat_that_is_refused_is_said_once() -> None:
    """Its worker works on and is taken for dead; where Redis is away, its connection says so."""
    made = Setup()
    del made.pulse._write
    store = made.batcher.store = SimpleNamespace(
        begun=True, models=("a",), queues=("realtime",), versions={}, is_drained=lambda: False
    )
    answers: list[Any] = [
        *[redis.exceptions.NoPermissionError("no set")] * 2,
        redis.ConnectionError("gone"),
        3,
        redis.ResponseError("WRONGTYPE"),
    ]

    def register(heartbeat: bytes, default: str) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    store.register = register
    with capture_logs() as logs:
        found = [made.pulse._write("idle", 0.0) for _ in range(5)]
    assert found == [None, None, None, 3, None]
    assert [(one["event"], one["reason"]) for one in logs] == [
        ("heartbeat_refused", "no set"),
        ("heartbeat_refused", "WRONGTYPE"),
    ]


@pytest.fixture
def setup() -> Setup:
    """Watched by systemd, which allows 60 s."""
    return Setup(WATCHDOG_USEC="60000000")


def test_ready_once(setup: Setup) -> None:
    """READY is said when the models are warm, and never again, whatever comes and goes."""
    assert setup.notes.take() == []
    for call in (
        setup.pulse.ready,
        setup.pulse.ready,
        setup.pulse.lost,
        setup.pulse.found,
        setup.pulse.ready,
    ):
        call()
    assert setup.notes.take("READY") == ["READY=1"]


def test_status(setup: Setup) -> None:
    """``systemctl status`` shows models, device, what is done, how fast, what waits; only news is told."""
    setup.pulse.ready()
    assert setup.notes.take("STATUS") == ["STATUS=a, b on gpu0: 0 done, 0/s, 0 waiting"]
    setup.batcher.done, setup.waiting = 12_345, 1_000
    told = setup.beat_for(REPORT_S)
    assert told == ["STATUS=a, b on gpu0: 12,345 done, 2,469/s, 1,000 waiting"]
    setup.beat_for(REPORT_S)
    assert [note for note in setup.beat_for(3 * REPORT_S) if note.startswith("STATUS")] == []


def test_a_model_that_is_missing(setup: Setup) -> None:
    """``systemctl status`` names it, the heartbeat says why; no other becomes the default instead."""
    made = Pulse(
        setup.batcher, "gpu0@test", 0, notifier=setup.notes, missing={"c": "x" * 1000}, default="", environ={}
    )
    asked: list[tuple[Any, str]] = []

    def register(heartbeat: bytes, default: str) -> int:
        asked.append((orjson.loads(heartbeat), default))
        return 0

    setup.batcher.store = SimpleNamespace(
        versions={"a": "1"},
        is_drained=lambda: False,
        begun=True,
        models=("a", "b"),
        queues=("realtime",),
        register=register,
    )
    made.ready()
    assert setup.notes.take("STATUS") == ["STATUS=a, b on gpu0, without c: 0 done, 0/s, 0 waiting"]
    ((body, default),) = asked
    assert (body["models"], body["missing"], default) == (["a", "b"], {"c": "x" * MOST_REASON}, "")


def test_states(setup: Setup) -> None:
    """The heartbeat says idle, busy, draining."""
    setup.pulse.ready()
    setup.run(60)
    setup.beat_for(REPORT_S)
    setup.pulse.stopping()
    assert setup.written == ["idle", "busy", "draining"]


def test_a_drained_worker_says_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """To systemd and in its heartbeat, while it finishes and then; a Redis that is away tells nothing."""
    store, batcher = setup.batcher.store, setup.batcher
    monkeypatch.setattr(type(store), "begun", True)
    drained: list[bool | Exception] = [True, True, False, redis.ConnectionError("away")]

    def is_drained() -> bool:
        answer = drained.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(store, "is_drained", is_drained)
    batcher.state = "free"
    setup.pulse.ready()
    batcher.state = "idle"
    found = [note for note in setup.beat_for(15) if note.startswith("STATUS")]
    assert setup.written == ["draining", "drained", "idle", "idle"]
    assert found == [
        "STATUS=a, b on gpu0: draining, takes nothing until gpuinfer worker resume 0; 0 done",
        "STATUS=a, b on gpu0: drained, takes nothing until gpuinfer worker resume 0; 0 done",
        "STATUS=a, b on gpu0: 0 done, 0/s, 0 waiting",
    ]


def test_watchdog_rhythm(setup: Setup) -> None:
    """Fed four times in the time that systemd allows, while idle."""
    setup.pulse.ready()
    setup.notes.take()
    assert setup.beat_for(60).count("WATCHDOG=1") == 4


def test_not_watched() -> None:
    """Without a watchdog nobody is fed, and no time is asked for."""
    setup = Setup()
    setup.pulse.ready()
    assert [note for note in setup.beat_for(600) if note.startswith("WATCHDOG")] == []


def test_long_legal_batch(setup: Setup) -> None:
    """A batch within its hard limit may take as long as that, far beyond systemd's limit."""
    setup.pulse.ready()
    setup.run(hard_limit_s=600)
    assert setup.beat_for(600).count("WATCHDOG=1") == 40


def test_stuck_batch(setup: Setup) -> None:
    """A batch beyond its limit and the grace starves the watchdog; one that goes on after all feeds it."""
    setup.pulse.ready()
    setup.run(hard_limit_s=30)
    fed = setup.beat_for(30 + STUCK_GRACE_S).count("WATCHDOG=1")
    assert fed == 3
    with capture_logs() as logs:
        assert setup.beat_for(600).count("WATCHDOG=1") == 0
    (line,) = logs
    assert line["task_ids"] == ["t0", "t1", "t2"]
    assert "a batch of a (hard limit 30 s) has made no progress" in line["reason"]
    setup.engine.moved_at = setup.clock.now  # its next pass
    assert setup.beat_for(15).count("WATCHDOG=1") == 1


def test_a_gpu_that_hangs(setup: Setup) -> None:
    """A probe that does not return starves the watchdog, and says so once; one that does feeds it again."""
    setup.pulse.ready()
    setup.engine.probing, setup.engine.moved_at = True, setup.clock.now
    with capture_logs() as logs:
        assert setup.beat_for(STUCK_GRACE_S).count("WATCHDOG=1") == 1
        assert setup.beat_for(600).count("WATCHDOG=1") == 0
    (line,) = logs
    assert (line["event"], line["log_level"], line["device"]) == ("worker_stuck", "critical", "gpu0")
    assert "GPU" in line["reason"]
    assert "gpuinfer doctor" in line["hint"]
    setup.engine.probing = False
    assert setup.beat_for(15).count("WATCHDOG=1") == 1


def test_redis_away(setup: Setup) -> None:
    """Without Redis the worker is up, says what it waits for, is fed, and writes nothing."""
    setup.pulse.ready()
    setup.written.clear()
    setup.notes.take()
    setup.pulse.lost()
    setup.pulse.lost()
    assert setup.notes.take() == ["STATUS=a, b on gpu0: waiting for Redis"]
    assert setup.beat_for(60) == ["WATCHDOG=1"] * 4
    setup.pulse.found()
    assert setup.beat_for(1)[-1].startswith("STATUS=a, b on gpu0: 0 done")
    assert setup.written == ["idle"]


def test_start_without_redis(setup: Setup) -> None:
    """A worker that starts without Redis is ready all the same; it does not ask Redis for that."""
    setup.pulse.lost()
    assert setup.notes.take() == ["READY=1", "STATUS=a, b on gpu0: waiting for Redis"]
    assert setup.written == []


@pytest.mark.parametrize(("timeout_s", "asked"), [(5.0, ["WATCHDOG_USEC=50000000"]), (2.0, [])])
def test_deaf_redis_is_no_hang(timeout_s: float, asked: list[str]) -> None:
    """Where the timeouts of a deaf Redis may add up to more than the watchdog's limit, more is asked for."""
    setup = Setup()
    environ = {"WATCHDOG_USEC": "30000000"}
    pulse = Pulse(
        setup.batcher, "gpu0@test", 0, notifier=setup.notes, environ=environ, redis_timeout_s=timeout_s
    )
    pulse.lost()
    assert setup.notes.take("WATCHDOG") == asked


def test_stopping(setup: Setup) -> None:
    """A stop tells what it waits for, and may take the limit of the batch that runs and some more."""
    setup.pulse.stopping()
    idle = ["STOPPING=1", "STATUS=a, b on gpu0: returning tasks"]
    assert setup.notes.take() == [*idle, f"EXTEND_TIMEOUT_USEC={int(DRAIN_ALLOWANCE_S * 1e6)}"]
    setup.run(hard_limit_s=300, size=7)
    setup.pulse.stopping()
    busy = ["STOPPING=1", "STATUS=a, b on gpu0: finishing a batch of 7"]
    assert setup.notes.take() == [*busy, f"EXTEND_TIMEOUT_USEC={int((300 + DRAIN_ALLOWANCE_S) * 1e6)}"]
    setup.engine.batches *= 2
    setup.pulse.stopping()
    assert setup.notes.take() == [*busy, f"EXTEND_TIMEOUT_USEC={int((600 + DRAIN_ALLOWANCE_S) * 1e6)}"]


def test_drain_tells_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery may end twice over: systemd is told once."""
    calls: list[float] = []

    def drain(timeout_s: float, *, crashed: bool) -> None:
        assert not crashed
        calls.append(timeout_s)
        setup.batcher.closed = True

    setup.batcher.drain = drain
    monkeypatch.setattr(setup.pulse, "gone", lambda: calls.append(-1))
    lock: Any = None
    process = Process(setup.batcher, setup.pulse, lock, "here", Ceiling(0, "gpu0@here"))
    process.drain(crashed=False)
    process.drain(crashed=False)
    assert calls == [DRAIN_TIMEOUT_S, -1]
    assert setup.notes.take("STOPPING") == ["STOPPING=1"]


@pytest.mark.parametrize(("takes_s", "asked"), [(5, 1), (100, 10), (1e9, 30)])
def test_loading(takes_s: float, asked: int) -> None:
    """While a model loads systemd is asked for more, again and again, up to the limit and no further."""
    notes, clock = Notes(), Clock()
    done_at = clock.now + takes_s

    def wait(seconds: float) -> bool:
        clock.now += seconds
        return clock.now >= done_at

    keep_asking(notes, 300, wait, clock)
    assert notes.take() == ["EXTEND_TIMEOUT_USEC=30000000"] * asked
    assert clock.now - done_at < 10 or clock.now == 1300


def test_loading_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status names the models that load; nobody asks on when they are loaded, or could not be."""
    notes = Notes()
    monkeypatch.setattr(heartbeat, "SystemdNotifier", lambda: notes)
    with pytest.raises(ValueError, match="broken"), heartbeat.starting(300, "digits, ocr"):
        raise ValueError("broken")
    assert notes.take()[0] == "STATUS=loading digits, ocr"
    assert [thread.name for thread in threading.enumerate() if thread.name == "starting"] == []


@pytest.mark.parametrize(("watchdog_us", "fed"), [("4000000", 10), ("", 0), ("100000", 100)])
def test_api_watchdog(monkeypatch: pytest.MonkeyPatch, watchdog_us: str, fed: int) -> None:
    """The API's event loop feeds the watchdog at a quarter of its time: ten ticks a second."""
    monkeypatch.setenv("WATCHDOG_USEC", watchdog_us)
    front = Front(Settings())
    server, notes = Server(front, front.shared), Notes()
    server._notifier = notes

    async def tick() -> None:
        for counter in range(1, 101):
            await server.on_tick(counter)

    asyncio.run(tick())
    assert notes.take() == ["WATCHDOG=1"] * fed


def test_a_heartbeat_tells_how_busy_the_device_was() -> None:
    """Since the last one, with the batch that runs; never more than the whole time."""
    clock = Clock()
    engine: Any = SimpleNamespace(current=None, running_s=9.0)
    batcher: Any = SimpleNamespace(engine=engine, accounts=SimpleNamespace(busy_s=0.0), device="cpu")
    vitals = Vitals(batcher, 2.5, clock)
    clock.now += 5
    batcher.accounts.busy_s = 1.0
    found = vitals.read()
    assert (found["busy"], found["load_s"]) == (0.2, 2.5)
    assert found["memory_bytes"] > 2**20
    clock.now += 5
    engine.current = object()
    engine.running_s = 4.0
    assert vitals.read()["busy"] == 0.8
    clock.now += 5
    batcher.accounts.busy_s, engine.current = 30.0, None
    assert vitals.read()["busy"] == 1.0
