# SPDX-License-Identifier: Apache-2.0
"""The thread that looks at GPUs and hears of Xid errors; and that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuinfer.gpus import PROGRAM_XIDS
from gpuinfer.settings import Settings
from gpuinfer.watcher import gpu_watch, health
from gpuinfer.watcher.gpu_watch import GpuWatch
from gpuinfer.watcher.xids import AGAIN_S, Xids
from tests.fake_nvml import GIB, FakeNvml

pytestmark = pytest.mark.unit


class Clock:
    """Stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def watching(nvml: FakeNvml, numbers: tuple[int, ...] = (0, 1), **worker: object) -> Iterator[GpuWatch]:
    watch = GpuWatch(Settings.model_validate({"worker": worker}), numbers, nvml)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
    assert (nvml.sets, nvml.opened) == (0, nvml.closed)


def until(told: Callable[[], object]) -> object:
    """Ask until there is an answer."""
    for _ in range(3000):
        if answer := told():
            return answer
        time.sleep(0.02)
    raise AssertionError("nothing was told")


# -- the events -------------------------------------------------------------------------------


def test_what_happened_is_told_by_gpu() -> None:
    """All that waits comes at once, in order; then nothing, until there is more."""
    nvml = FakeNvml(count=2)
    xids = Xids(nvml)
    nvml.events.put((1, 48))
    nvml.events.put((0, 13))
    assert xids.wait(0) == [(1, 48), (0, 13)]
    assert xids.wait(0) == []
    xids.close()
    assert (nvml.sets, nvml.opened, nvml.closed) == (0, 1, 1)


def test_a_lost_gpu_is_known_by_its_handle() -> None:
    """Xid 79 comes from a GPU that answers nothing any more; the others are not blamed."""
    nvml = FakeNvml(count=2)
    xids = Xids(nvml)
    assert xids.wait(0) == []
    nvml.lost = frozenset({1})
    nvml.events.put((1, 79))
    assert xids.wait(0) == [(1, 79)]


def test_an_error_nobody_owns_is_everybodys() -> None:
    """A handle that is not known and tells nothing: better none than a sick one."""
    nvml = FakeNvml(count=2, lost=frozenset({7}))
    xids = Xids(nvml)
    nvml.events.put((7, 79))
    assert xids.wait(0) == [(0, 79), (1, 79)]


def test_after_an_error_the_set_is_opened_again_later() -> None:
    """As when the driver is loaded anew. What came before the error counts."""
    nvml, clock = FakeNvml(count=1), Clock()
    xids = Xids(nvml, clock)
    nvml.events.put((0, 62))
    nvml.events.put(nvml.NVML_ERROR_GPU_IS_LOST)
    nvml.events.put((0, 64))
    assert xids.wait(0) == [(0, 62)]
    assert (nvml.sets, nvml.opened) == (0, nvml.closed)
    clock.now += AGAIN_S - 1
    assert xids.wait(0) == []
    clock.now += 1
    assert xids.wait(0) == [(0, 64)]


@pytest.mark.parametrize(
    "nvml", [FakeNvml(init=12), FakeNvml(count=0), FakeNvml(count=1, deaf=frozenset({0}))]
)
def test_where_nothing_tells_events_nothing_is_waited_for(nvml: FakeNvml) -> None:
    """No driver, no GPU, or only old ones: at once, and nothing stays open."""
    begun = time.monotonic()
    assert Xids(nvml).wait(200) == []
    assert time.monotonic() - begun < 200
    assert (nvml.sets, nvml.opened) == (0, nvml.closed)


def test_each_xid_is_counted() -> None:
    """Also those that are told together, and those that are a program's own fault."""
    nvml, heard = FakeNvml(count=2, used_bytes=0), []
    for event in ((1, 48), (1, 48), (0, 31)):
        nvml.events.put(event)
    watch = GpuWatch(Settings(), (0, 1), nvml, on_xid=lambda gpu, xid: heard.append((gpu, xid)))
    watch.start()
    try:
        assert until(lambda: len(heard) == 3)
    finally:
        watch.stop()
    assert heard == [(1, 48), (1, 48), (0, 31)]


# -- the thread -------------------------------------------------------------------------------


def test_an_xid_is_told_once_with_its_number() -> None:
    """Of the instance whose GPU it is; several of one moment together, each once."""
    nvml = FakeNvml(count=2, used_bytes=0)
    for event in ((1, 48), (1, 63), (1, 48)):
        nvml.events.put(event)
    with watching(nvml) as watch:
        assert until(watch.take_xids) == {1: "Xid 48, Xid 63"}
        assert watch.take_xids() == {}


@pytest.mark.parametrize("xid", sorted(PROGRAM_XIDS))
def test_a_programs_own_fault_is_not_the_gpus(xid: int) -> None:
    """NVIDIA's catalogue: restart the application. The one that comes after it is told."""
    nvml = FakeNvml(count=1, used_bytes=0)
    nvml.events.put((0, xid))
    nvml.events.put((0, 95))
    with watching(nvml) as watch:
        assert until(watch.take_xids) == {0: "Xid 95"}


def test_instances_on_slices_of_a_gpu_share_its_xids() -> None:
    """The whole GPU has failed, and all of MIG's slices with it."""
    slices = ["MIG-0-0", "MIG-0-1"]
    nvml = FakeNvml(count=1, used_bytes=0, mig={0: ["1g.10gb", "1g.10gb"]})
    nvml.events.put((0, 79))
    with watching(nvml, gpus=slices) as watch:
        assert until(watch.take_xids) == {0: "Xid 79", 1: "Xid 79"}


def test_the_first_look_is_waited_for() -> None:
    """No worker is started on a GPU that nobody has looked at."""
    with watching(FakeNvml(count=2, used_bytes=3 * GIB)) as watch:
        assert {gpu.foreign_bytes for gpu in watch.health((), (0, 1)).values()} == {3 * GIB}


def test_gpus_of_a_driver_that_comes_later_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory is taken at each survey; a driver that fails for a moment takes none away."""
    monkeypatch.setattr(gpu_watch, "EVERY_S", 0.0)
    survey, failed = health.survey, []

    def noted(*arguments: Any) -> health.Survey:
        found = survey(*arguments)
        failed.append(found.failed)
        return found

    monkeypatch.setattr(health, "survey", noted)
    nvml = FakeNvml(init=FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with watching(nvml, ()) as watch:
        assert [*watch.numbers] == [0]
        nvml.count, nvml.used_bytes, nvml.init = 4, 0, None
        until(lambda: watch.numbers == (0, 1, 2, 3))
        nvml.init = FakeNvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
        until(lambda: failed[-2:] == [True, True])  # the first of them has been taken over
        assert watch.numbers == (0, 1, 2, 3)
        nvml.count, nvml.init = 2, None
        until(lambda: watch.numbers == (0, 1))


def test_an_instance_whose_file_names_a_slice_is_there(tmp_path: Path) -> None:
    """MIG instances are bound by the instances' own files; each has the health of its GPU."""
    (tmp_path / "worker@7.env").write_text("CUDA_VISIBLE_DEVICES=MIG-1-1\n")
    (tmp_path / "worker@0.env").write_text("CUDA_VISIBLE_DEVICES=0\nGPUINFER_WORKER_QUEUES=batch\n")
    (tmp_path / "worker@9.env").write_text("GPUINFER_WORKER_QUEUES=batch\n")
    bound = health.bound_by_files(tmp_path)
    assert bound == {7: "MIG-1-1"}
    nvml = FakeNvml(count=2, used_bytes=0, mig={1: ["1g.10gb", "1g.10gb"]}, remapped={1: (1, 0)})
    seen = health.survey(Settings(), (), nvml, bound)
    assert (seen.numbers, sorted(seen.health), seen.indices[7]) == ((0, 1, 7), [1, 7], 1)
    gone = health.survey(Settings(), (), FakeNvml(count=2, used_bytes=0), bound)
    assert (gone.numbers, gone.health, gone.indices[7]) == ((0, 1, 7), {}, health.UNLISTED)


def test_a_host_told_to_use_the_cpu_asks_no_driver() -> None:
    """Not even once."""
    nvml = FakeNvml(count=2)
    with watching(nvml, device="cpu") as watch:
        assert watch.health((), (0, 1)) == {}
    assert nvml.opened == 0


def test_a_driver_that_hangs_is_nobodys_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher goes on, with every GPU out; what was known before counts for half a minute."""
    monkeypatch.setattr(gpu_watch, "EVERY_S", 0.0)
    free, hanging = threading.Event(), threading.Event()

    class Hanging(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            if self.opened > 4:
                hanging.set()
                free.wait(60)
            return super().nvmlDeviceGetCount()

    clock = Clock()
    watch = GpuWatch(Settings(), (0, 1), Hanging(count=2, used_bytes=0), clock)
    watch.start()
    assert hanging.wait(60)
    assert watch.health((), (0, 1)) == {}
    clock.now += gpu_watch.SILENT_S + 1
    assert {number: gpu.fault for number, gpu in watch.health((), (0, 1)).items()} == {
        0: "its driver does not answer NVML",
        1: "its driver does not answer NVML",
    }
    free.set()
    until(lambda: watch.health((), (0, 1)) == {})
    watch.stop()


def test_a_driver_that_hangs_from_the_beginning_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher begins all the same."""
    monkeypatch.setattr(gpu_watch, "FIRST_S", 0.1)
    free = threading.Event()

    class Hanging(FakeNvml):
        def nvmlInit(self) -> None:
            free.wait(60)
            super().nvmlInit()

    with watching(Hanging(count=1, used_bytes=0), (0,)) as watch:
        (one,) = watch.health((), (0,)).values()
        assert (one.fault, one.unknown) == ("", "its GPU's driver has not answered NVML yet")
        free.set()
        until(lambda: watch.health((), (0, 1)) == {})
