# SPDX-License-Identifier: Apache-2.0
"""The demo's pure parts: what it computes from answers, and what it gives its workers to run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from gpuinfer.demo.figures import Figures, figures, percentile
from gpuinfer.demo.load import Answer, Tier
from gpuinfer.demo.stack import plan
from gpuinfer.errors import DeviceError
from gpuinfer.gpus import Gpu, Inventory

pytestmark = pytest.mark.unit

LABELS = [3, 7]
#: The model itself takes the 7 for a 1.
DIRECT = [{"class": 3, "confidence": 0.9}, {"class": 1, "confidence": 0.6}]


def answer(
    tier: Tier, images: Sequence[int], classes: Sequence[int], *, begun: float, ended: float
) -> Answer:
    results = [
        {"class": c, "confidence": DIRECT[i]["confidence"]} for i, c in zip(images, classes, strict=True)
    ]
    return Answer(tier=tier, images=images, begun=begun, ended=ended, results=results)


def good() -> list[Answer]:
    return [
        answer("realtime", [0], [3], begun=0.0, ended=0.010),
        answer("realtime", [1], [1], begun=0.0, ended=0.020),
        answer("batch", [0, 1], [3, 1], begun=0.0, ended=0.5),
    ]


def of(answers: list[Answer]) -> Figures:
    batches: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 3}]
    return figures(answers, LABELS, DIRECT, batches, workers=2)


def test_accuracy_is_against_labels_and_equality_against_the_model() -> None:
    """A model that errs is measured as it is; HTTP must only not change what it says."""
    found = of(good())
    assert found.ok and found.differences == ()
    assert [tier.accuracy for tier in found.tiers] == [0.5, 0.5]
    assert found.direct_accuracy == 0.5
    assert found.mean_batch_size == 2.0
    realtime, batch = found.tiers
    assert (realtime.p50_ms, realtime.p99_ms, batch.p50_ms) == (10.0, 20.0, 500.0)
    assert batch.images_per_s == 4.0


def test_another_class_than_the_models_own_is_a_failure_even_when_it_is_right() -> None:
    """Equal accuracy is not enough: it is compared image by image."""
    found = of([*good(), answer("realtime", [1], [7], begun=0.0, ended=0.01)])
    assert not found.ok
    assert found.differences == ("image 1 (a 7): 7 through realtime, 1 directly",)


def test_an_unanswered_request_is_a_failure() -> None:
    """Each request counts, and each kind of error is told once."""
    lost = Answer(tier="realtime", images=[0], begun=0.0, ended=1.0, error="Refused: 503")
    found = of([*good(), lost, lost])
    assert not found.ok
    assert found.tiers[0].failed == 2
    assert found.differences == ("realtime: Refused: 503",)
    assert found.as_dict()["tiers"]["realtime"]["equals_direct"] is False


def test_a_tier_that_was_not_asked_is_a_failure() -> None:
    assert not of([a for a in good() if a.tier == "realtime"]).ok


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_percentiles_are_nearest_rank(share: float, expected: int) -> None:
    assert percentile(range(1, 101), share) == expected


def test_a_percentile_of_nothing_is_zero() -> None:
    assert percentile([], 0.5) == 0.0


def host(count: int, failed: bool = False) -> Any:
    gpus = tuple(Gpu(index=number, uuid=f"GPU-{number}", name="H200") for number in range(count))

    def listing(names: Sequence[str]) -> Inventory:
        if names:
            return Inventory(tuple(gpu for gpu in gpus if str(gpu.index) in names), "settings")
        return Inventory(gpus, "nvml" if gpus else "none", "broken" if failed else "", failed=failed)

    return listing


@pytest.mark.parametrize(
    ("gpus", "workers", "visible", "expected"),
    [
        (0, 2, None, ["CPU", "CPU"]),
        (1, 2, None, ["GPU 0 (H200)", "CPU"]),
        (2, 2, None, ["GPU 0 (H200)", "GPU 1 (H200)"]),
        (8, 2, None, ["GPU 0 (H200)", "GPU 1 (H200)"]),
        (8, 2, "", ["CPU", "CPU"]),
        (8, 2, "-1", ["CPU", "CPU"]),
        (8, 2, "6,3", ["GPU 3 (H200)", "GPU 6 (H200)"]),
        (0, 1, "0", ["CPU"]),
    ],
)
def test_workers_take_the_gpus_first(
    gpus: int, workers: int, visible: str | None, expected: list[str]
) -> None:
    """Two GPUs where there are two; the CPU where there are none, or none that one may use."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = plan(workers, environ, host(gpus))
    assert list(found.devices.values()) == expected
    assert list(found.devices) == list(range(workers))


def test_a_gpu_that_is_not_there_is_no_reason_for_the_cpu() -> None:
    """A mistake in the variable is named, before anything is started."""
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=0,two: 'two' names no device"):
        plan(2, {"CUDA_VISIBLE_DEVICES": "0,two"}, host(8))


def test_a_gpu_that_fails_is_told() -> None:
    """The demo goes on with the CPU, and says why."""
    assert plan(2, {}, host(0, failed=True)).note == "the GPU cannot be used: broken"
