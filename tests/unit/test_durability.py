# SPDX-License-Identifier: Apache-2.0
"""How Redis writes is chosen by what its disk can do, kept, and told; a full disk is waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpuinfer.broker import durability, room
from gpuinfer.broker.durability import FAST_MS, FileSystem
from gpuinfer.errors import DiskFull
from gpuinfer.queue.connection import explain
from gpuinfer.settings import RedisSettings
from tests.unit.test_broker import call, credentials, folder  # noqa: F401  fixtures

pytestmark = pytest.mark.unit

DISK = FileSystem("ext4", "ext4 /dev/vda1 1234")


class Disk:
    """A disk whose fsync takes a time of our choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.where, self.p99_ms, self.measured = DISK, 0.05, 0
        monkeypatch.setattr(durability, "file_system", lambda _: self.where)

    def measure(self, _: Path) -> float:
        self.measured += 1
        return self.p99_ms

    def decide(self, tmp_path: Path, *, again: bool = False, conf: str = "", **settings: Any) -> Any:
        (tmp_path / "redis.conf").write_text(conf, encoding="utf-8")
        chosen = RedisSettings.model_validate(settings)
        return durability.decide(chosen, tmp_path, tmp_path / "redis.conf", again=again, measure=self.measure)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize(
    ("p99_ms", "mode"), [(0.03, "always"), (FAST_MS, "always"), (0.11, "everysec"), (8.0, "everysec")]
)
def test_the_disk_decides(disk: Disk, tmp_path: Path, p99_ms: float, mode: str) -> None:
    """Once: the next start takes what was kept. What it means is in the sentence."""
    disk.p99_ms = p99_ms
    for _ in range(3):
        choice, before = disk.decide(tmp_path)
        assert (choice.mode, before) == (mode, "")
        assert durability.MEANING[choice.mode] in str(choice)
    assert disk.measured == 1
    kept = durability.recorded(tmp_path)
    assert (kept["device"], kept["p99_ms"], kept["mode"]) == (DISK.device, p99_ms, mode)
    assert durability.planned(RedisSettings(), tmp_path).mode == mode


def test_what_is_not_measured_is_not_decided(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start measures first, and goes by that, also where it fails; a mode that is named is taken."""
    assert not durability.planned(RedisSettings(), tmp_path).decided
    assert durability.planned(RedisSettings(appendfsync="always"), tmp_path).decided

    def fail(_: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "measure", fail)
    choice, _ = disk.decide(tmp_path)
    assert (choice.mode, choice.decided) == ("everysec", True)
    monkeypatch.undo()
    assert not durability.planned(RedisSettings(), tmp_path / "not there").decided


def test_another_device_is_measured_anew(disk: Disk, tmp_path: Path) -> None:
    """As is the same one when that is asked for; that it holds another thing now is told."""
    disk.decide(tmp_path)
    disk.p99_ms = 5.0
    assert disk.decide(tmp_path)[0].mode == "always"
    choice, before = disk.decide(tmp_path, again=True)
    assert (choice.mode, disk.measured) == ("everysec", 2)
    assert before == f"appendfsync always: {durability.MEANING['always']}"
    disk.where, disk.p99_ms = FileSystem("xfs", "xfs /dev/vdb 99"), 0.01
    choice, before = disk.decide(tmp_path)
    assert (choice.mode, disk.measured) == ("always", 3)
    assert before.startswith("appendfsync everysec")


@pytest.mark.parametrize("kind", ["tmpfs", "overlay", "nfs4", "cifs", "fuse.sshfs", "9p"])
def test_what_promises_nothing(disk: Disk, tmp_path: Path, kind: str) -> None:
    """Memory, overlays and networks: everysec, unmeasured, and no claim, even where always is asked for."""
    disk.where = FileSystem(kind, f"{kind} somewhere 0")
    choice, _ = disk.decide(tmp_path)
    assert (choice.mode, disk.measured) == ("everysec", 0)
    assert "nothing is promised about a power cut" in str(choice)
    choice, _ = disk.decide(tmp_path, appendfsync="always")
    assert choice.mode == "always"
    assert "nothing is promised about a power cut" in str(choice)


def test_an_administrator_s_word(disk: Disk, tmp_path: Path) -> None:
    """A setting is taken without a measurement, and redis.conf wins over it."""
    assert disk.decide(tmp_path, appendfsync="everysec")[0].mode == "everysec"
    choice, _ = disk.decide(tmp_path, appendfsync="everysec", conf="dir /x\nappendfsync ALWAYS\n")
    assert choice.mode == "always"
    assert "redis.conf" in choice.why
    assert disk.measured == 0


@pytest.mark.parametrize("line", ["appendonly no", "appendfsync no"])
def test_no_promise_where_redis_conf_takes_it_back(disk: Disk, tmp_path: Path, line: str) -> None:
    """It wins over what we write, so the sentence is about what it does."""
    for asked in ("auto", "always"):
        choice, _ = disk.decide(tmp_path, conf=f"appendonly yes\n{line}\n", appendfsync=asked)
        assert choice.mode == "everysec", "nothing waits for room on the disk, as it would under always"
        assert "nothing is promised about a power cut" in str(choice)
        assert line in str(choice)


def test_a_record_that_somebody_has_changed(disk: Disk, tmp_path: Path) -> None:
    """It keeps no Redis from starting."""
    (tmp_path / durability.RECORD).write_text('{"means": "x"}', encoding="utf-8")
    assert disk.decide(tmp_path)[0].mode == "always"


def test_a_disk_that_cannot_be_measured(disk: Disk, tmp_path: Path) -> None:
    """It gets everysec, is tried again at the next start, and the reason is told."""

    def fails(_: Path) -> float:
        raise OSError(28, "No space left on device")

    for _ in range(2):
        choice, _ = durability.decide(RedisSettings(), tmp_path, measure=fails)
        assert choice.mode == "everysec"
        assert "No space left" in choice.why
    assert disk.decide(tmp_path)[0].mode == "always"


def test_a_measurement(tmp_path: Path) -> None:
    """p99 of 256 appends, by the clock; nothing is left behind."""
    now = iter(range(10**6))
    steps: list[float] = []

    def clock() -> float:
        steps.append(next(now) / 1000)
        return steps[-1]

    assert durability.measure(tmp_path, clock) == pytest.approx(1.0)
    assert len(steps) == 2 * durability.TIMES
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_seconds_is_not_waited_for(tmp_path: Path) -> None:
    """Redis's start would run into its time limit, and begin anew; what a killed try left is no matter."""
    (tmp_path / ".fsync").touch()
    now = [0.0]

    def clock() -> float:
        now[0] += 2.0
        return now[0]

    assert durability.measure(tmp_path, clock) == pytest.approx(2000.0)
    assert now[0] <= 2 * (durability.LIMIT_S + 2.0)
    assert list(tmp_path.iterdir()) == []


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    """By the last and longest mount above it, spaces and all."""
    inside = tmp_path / "a b" / "redis"
    inside.mkdir(parents=True)
    point = str(tmp_path / "a b").replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:44 / {point} rw,relatime shared:9 master:1 - nfs4 host:/x rw\n"
        f"3 1 8:9 / {point}x rw - xfs /dev/sdb rw\n",
        encoding="utf-8",
    )
    assert durability.file_system(inside, mounts).kind == "nfs4"
    assert durability.file_system(inside, mounts).device.startswith("nfs4 host:/x ")
    assert durability.file_system(tmp_path, mounts).kind == "ext4"


def test_prepare_tells_what_holds(
    credentials: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The journal has it at each start; a change is a warning; tuning.conf has the mode."""
    data = tmp_path / "data"
    data.mkdir()
    command = ("redis", "prepare", "--folder", folder, "--data", data)
    monkeypatch.setattr(durability, "file_system", lambda _: DISK)
    monkeypatch.setenv("GPUINFER_REDIS_APPENDFSYNC", "always")
    assert call(*command) == 0
    assert "warning" not in capfd.readouterr().err
    assert "\nappendfsync always\n" in (folder / "tuning.conf").read_text(encoding="utf-8")
    assert (folder / "durability").read_text(encoding="utf-8") == "always\n"  # for the metrics
    monkeypatch.setenv("GPUINFER_REDIS_APPENDFSYNC", "everysec")
    assert call(*command) == 0
    told = capfd.readouterr().err
    assert "gpuinfer: warning: durability has changed: appendfsync everysec" in told
    assert "may cost up to two seconds" in told
    assert call(*command, "--measure") == 0
    assert "warning" not in capfd.readouterr().err
    assert durability.recorded(data)["p99_ms"] > 0


class Running:
    """A Redis that runs, and answers CONFIG GET."""

    def __init__(self, **place: object) -> None:
        self.connection_pool = SimpleNamespace(connection_kwargs=place)

    def config_get(self, *names: str) -> dict[str, str]:
        return {"appendonly": "yes", "appendfsync": "always", "dir": "/data"}


def test_status_promises_no_more_than_the_disk_keeps(disk: Disk) -> None:
    """What runs here, in memory, has no claim; what another host's disk keeps is that host's to say."""
    disk.where = FileSystem("tmpfs", "tmpfs tmpfs 0")
    here: Any = durability.running(cast("Any", Running(path="/run/redis.sock")))
    assert here["means"] == "nothing is promised about a power cut: tmpfs does not outlive a power cut"
    there: Any = durability.running(cast("Any", Running(host="queue.example")))
    assert there["means"] == durability.MEANING["always"]
    disk.where = DISK
    here = durability.running(cast("Any", Running(path="/run/redis.sock")))
    assert here["means"] == durability.MEANING["always"]


# -- a full disk ----------------------------------------------------------------------------


class Filling:
    """A disk that is full for some looks."""

    def __init__(self, looks: int) -> None:
        self.looks, self.now = looks, 0.0

    def lacking(self, _: Path) -> str:
        self.looks -= 1
        return "the disk is full" if self.looks >= 0 else ""

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, notice: Path) -> None:
        room.wait_for_room(
            notice.parent, notice, clock=lambda: self.now, sleep=self.sleep, lacking=self.lacking
        )


def test_a_full_disk_keeps_redis_from_starting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It fails at once, with a notice that the front tells; the next start waits, and goes on by itself."""
    notice = tmp_path / "notice"
    disk = Filling(looks=200)
    with pytest.raises(DiskFull, match="the disk is full"):
        disk.wait(notice)
    assert disk.now == 0
    assert notice.stat().st_mode & 0o777 == 0o640
    gone = ConnectionError(f"Error 2 connecting to unix:{tmp_path}/redis.sock. No such file or directory.")
    assert str(explain(gone)) == "broker.url: Redis does not answer: the disk is full"
    assert explain(gone).http_status == 503
    disk.wait(notice)
    assert 190 < disk.now < 210
    assert not notice.exists()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 4, "one a minute, and one at the end"
    assert "there is room again" in told[-1]
    assert "No such file" in str(explain(gone))


def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    """The wait ends before systemd's patience does."""
    notice = tmp_path / "notice"
    notice.touch()
    disk = Filling(looks=10**6)
    with pytest.raises(DiskFull):
        disk.wait(notice)
    assert disk.now <= room.WAIT_S + room.LOOK_S < 15 * 60


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB, or a twentieth of a small disk; the sentence has the figures."""

    class Found:
        f_frsize, f_blocks, f_bavail = 1024 * 1024, 10_000, 64

    monkeypatch.setattr("gpuinfer.broker.room.os.statvfs", lambda _: Found)
    assert room.lacking(tmp_path) == ""
    Found.f_bavail = 63
    assert "(63 MiB free, 64 wanted)" in room.lacking(tmp_path)
    Found.f_blocks = 200
    assert room.lacking(tmp_path) == ""


def test_prepare_waits_only_under_always(
    credentials: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Under everysec Redis starts on a full disk, and refuses writes by itself."""

    def full(data: Path, notice: Path) -> None:
        raise DiskFull("the disk is full")

    monkeypatch.setattr(room, "wait_for_room", full)
    command = ("redis", "prepare", "--folder", folder, "--data", folder)
    monkeypatch.setenv("GPUINFER_REDIS_APPENDFSYNC", "everysec")
    assert call(*command) == 0
    monkeypatch.setenv("GPUINFER_REDIS_APPENDFSYNC", "always")
    assert call(*command) == 75
    assert "the disk is full" in capfd.readouterr().err
