# SPDX-License-Identifier: Apache-2.0
"""How the watcher sees GPUs: others' memory, faults, and how many instances a host has."""

from __future__ import annotations

import pytest

from gpuinfer.gpus import list_gpus
from gpuinfer.settings import Settings
from gpuinfer.watcher import health
from gpuinfer.watcher.state import GpuHealth
from tests.fake_nvml import GIB, FakeNvml

pytestmark = pytest.mark.unit


def settings(**sections: dict[str, object]) -> Settings:
    return Settings.model_validate(sections)


def test_memory_in_use_is_foreign_where_no_worker_of_ours_runs() -> None:
    """A GPU that somebody else works on is told; our own worker's memory is nobody else's."""
    seen = health.survey(settings(), {1}, FakeNvml(count=2, used_bytes=3 * GIB)).health
    assert seen == {0: GpuHealth(foreign_bytes=3 * GIB)}


def test_a_gpu_that_is_lost_is_a_fault() -> None:
    """With the driver's words; its instance is there, and out."""
    seen = health.survey(settings(), (), FakeNvml(count=2, used_bytes=0, lost=frozenset({1}))).health
    assert list(seen) == [1]
    assert "lost" in seen[1].fault


def test_memory_errors_are_a_fault() -> None:
    """Rows that could not be remapped, or that wait for a reset."""
    seen = health.survey(
        settings(), (), FakeNvml(count=3, used_bytes=0, remapped={0: (1, 0), 2: (0, 1)})
    ).health
    assert sorted(seen) == [0, 2]
    assert "a reset of the GPU" in seen[0].fault
    assert "could not be remapped" in seen[2].fault


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (FakeNvml(count=1, used_bytes=0, temperature_c=92), "92 degrees C and slows down at 92"),
        (FakeNvml(count=1, used_bytes=0, temperature_c=99), "99 degrees C and shuts down at 97"),
        (FakeNvml(count=1, used_bytes=0, slows_down_c=None, slowed_down=True), "heat slows it down"),
    ],
)
def test_a_gpu_that_is_too_hot_says_so(nvml: FakeNvml, words: str) -> None:
    """By its own limits, or, where it does not tell them, by slowing down. It is hot, and has no fault."""
    seen = health.survey(settings(), (), nvml).health[0]
    assert words in seen.hot
    assert not seen.fault


@pytest.mark.parametrize("limit", [92, None])
def test_a_gpu_below_its_limits_is_well(limit: int | None) -> None:
    """A degree less is fine; clocks that rest for another reason are no heat."""
    nvml = FakeNvml(count=1, used_bytes=0, temperature_c=91, slows_down_c=limit, shuts_down_c=limit)
    assert health.survey(settings(), (), nvml).health == {}


@pytest.mark.parametrize(
    ("sections", "nvml", "numbers"),
    [
        ({}, FakeNvml(count=4), (0, 1, 2, 3)),
        ({}, FakeNvml(init=12), (0,)),
        ({"worker": {"device": "cpu"}}, FakeNvml(count=4), (0,)),
        ({"watcher": {"instances": 3}}, FakeNvml(init=12), (0, 1, 2)),
        ({"worker": {"per_gpu": 2}}, FakeNvml(count=3, lost=frozenset({1})), (0, 1, 2, 3, 4, 5)),
        ({"worker": {"per_gpu": 2}}, FakeNvml(init=12), (0,)),
    ],
)
def test_there_are_as_many_instances_as_gpus(
    sections: dict[str, dict[str, object]], nvml: FakeNvml, numbers: tuple[int, ...]
) -> None:
    """One on a host without any, and as many as the settings say."""
    chosen = settings(**sections)
    per_gpu = chosen.worker.per_gpu
    found = list_gpus((), per_gpu=per_gpu, nvml=nvml, nodes=list, hardware=lambda: False)
    assert health.instance_numbers(chosen, found) == numbers


def test_workers_that_share_a_gpu_share_its_health() -> None:
    """What one of them holds is not foreign to the others; a fault is each one's."""
    shared = settings(worker={"per_gpu": 2})
    seen = health.survey(shared, {1}, FakeNvml(count=3, used_bytes=GIB, lost=frozenset({2})))
    foreign = GpuHealth(foreign_bytes=GIB)
    assert {number: one for number, one in seen.health.items() if not one.fault} == {2: foreign, 3: foreign}
    assert [number for number, one in seen.health.items() if one.fault] == [4, 5]
    assert seen.indices == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
