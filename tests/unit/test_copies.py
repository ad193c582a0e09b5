# SPDX-License-Identifier: Apache-2.0
"""Copies beside the device's work, on the fake: the contract, the order of calls, a model that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuinfer.errors import DeviceError, DeviceOutOfMemory
from gpuinfer.models.copies import Copies
from gpuinfer.models.repository import Repository
from gpuinfer.models.staged import Coming, Staged
from gpuinfer.models.tensor_model import TensorModel
from tests.copies import CopiesContract
from tests.fake_cuda import Event, FakeCuda
from tests.models_for_tests import write_manifest

pytestmark = pytest.mark.unit

TABLES = """
max_batch_size = 8
{more}
[[inputs]]
name = "x"
shape = [{shape}]
dtype = "{dtype}"
[[outputs]]
name = "y"
"""


@pytest.fixture
def surface() -> FakeCuda:
    return FakeCuda()


class TestFake(CopiesContract):
    """The contract on the fake."""

    def compute(self, surface: Any, x: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = surface.compute(lambda x: x * 2, x)
        return doubled

    def work(self, surface: Any) -> None:
        surface.work()

    def happened(self, surface: Any, event: Event) -> bool:
        return bool(surface.happened(event))


def model_of(
    folder: Path, surface: FakeCuda, shape: str = "3", dtype: str = "float32", more: str = ""
) -> TensorModel:
    """Return a model that doubles its input on the fake device."""
    (folder / "double").mkdir()
    (folder / "double" / "model.pt").touch()
    write_manifest(folder / "double", "model.pt", TABLES.format(shape=shape, dtype=dtype, more=more))

    def double(x: torch.Tensor) -> torch.Tensor:
        return surface.compute(lambda x: x * 2, x)

    return TensorModel(Repository([folder]).get("double"), "cpu", double, copies=Copies(surface))


def items(model: TensorModel, *values: Any) -> list[Any]:
    return list(model.prepare(values))


def values_of(outputs: Any) -> list[Any]:
    return [array.tolist() for (array,) in outputs]


def test_the_order_of_calls(tmp_path: Path, surface: FakeCuda) -> None:
    """The host waits for the computing alone before the next batch may run; behind it, for the copy out."""
    model = model_of(tmp_path, surface)
    first = model.stage(items(model, [1, 2, 3], [4, 5, 6]))
    assert isinstance(first, Staged)
    assert surface.calls == ["lock", "copy on in", "record in"]
    surface.calls.clear()
    outputs = model.launch(first)
    assert surface.calls == [
        "compute waits for in",
        "keep for compute",
        "compute",
        "record compute",
        "host waits for compute",
        "out waits for compute",
        "lock",
        "copy on out",
        "keep for out",
        "record out",
    ]
    surface.calls.clear()
    model.land(outputs)
    assert surface.calls == ["host waits for out"]
    assert values_of(outputs) == [[2, 4, 6], [8, 10, 12]]


def test_results_are_read_while_the_next_batch_runs(tmp_path: Path, surface: FakeCuda) -> None:
    """The second is staged before the first runs, and has run before the first's results are read."""
    model = model_of(tmp_path, surface)
    first, second = model.stage(items(model, [1, 1, 1])), model.stage(items(model, [2, 2, 2]))
    early = model.launch(first)
    late = model.launch(second)
    assert values_of(early) != [[2, 2, 2]], "the fake copies as late as it may"
    model.land(early)
    model.land(late)
    assert [values_of(early), values_of(late)] == [[[2, 2, 2]], [[4, 4, 4]]]


def test_forward_returns_what_may_be_read(tmp_path: Path, surface: FakeCuda) -> None:
    """As on a CPU; a model that gives what is with the host already is copied nowhere."""
    model = model_of(tmp_path, surface)
    assert values_of(model.forward(items(model, [1, 2, 3]))) == [[2, 4, 6]]
    model._module = lambda x: torch.ones(1, 2)
    assert values_of(model.forward(items(model, [1, 2, 3]))) == [[1, 1]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "bfloat16"])
def test_all_dtypes_are_sent(tmp_path: Path, surface: FakeCuda, dtype: str) -> None:
    """Also the one that numpy has not."""
    model = model_of(tmp_path, surface, dtype=dtype)
    value: Any = [True, False, True] if dtype == "bool" else [1, 2, 3]
    model._module = lambda x: surface.compute(lambda x: x, x, torch.float64)
    (output,) = model.forward(items(model, value))
    np.testing.assert_array_equal(output[0].astype(float), np.array(value, float))


def test_shapes_that_differ_run_apart_or_padded(tmp_path: Path, surface: FakeCuda) -> None:
    """Groups are staged as they run; what is padded is padded with zeros, not with what was there before."""
    for way in ("group", "pad"):
        folder = tmp_path / way
        folder.mkdir()
        model = model_of(folder, FakeCuda(), shape="-1", more=f'variable = "{way}"')
        staged = model.stage(items(model, [1, 2, 3], [4], [5, 6, 7]))
        outputs = model.launch(staged)
        model.land(outputs)
        padding = [0, 0] if way == "pad" else []
        assert values_of(outputs) == [[2, 4, 6], [8, *padding], [10, 12, 14]]


def test_without_a_batch(tmp_path: Path, surface: FakeCuda) -> None:
    """Each item is a call of its own, without the dimension."""
    model = model_of(tmp_path, surface, more="batchable = false")
    outputs = model.launch(model.stage(items(model, [1, 2, 3], [4, 5, 6])))
    model.land(outputs)
    assert values_of(outputs) == [[2, 4, 6], [8, 10, 12]]
    assert all(isinstance(output, Coming) for output in outputs)


def test_what_was_staged_is_let_go_when_it_does_not_fit(tmp_path: Path, surface: FakeCuda) -> None:
    """Half of it is staged anew; where not even staging fits, launching says so."""
    model = model_of(tmp_path, surface)
    works, full = model._module, RuntimeError("CUDA error: out of memory")

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise full

    staged = model.stage(items(model, [1, 2, 3], [4, 5, 6]))
    model._module = refuse
    with pytest.raises(DeviceOutOfMemory):
        model.launch(staged)
    assert isinstance(staged, Staged)
    assert not staged.groups
    model._module = works
    assert values_of(model.forward(staged[:1])) == [[2, 4, 6]]

    def empty_like(source: torch.Tensor) -> torch.Tensor:
        raise full

    surface.empty_like = empty_like  # type: ignore[method-assign]
    given = items(model, [1, 2, 3])
    assert model.stage(given) is given
    with pytest.raises(DeviceOutOfMemory):
        model.launch(given)


def test_a_gpu_that_fails_says_so_wherever_it_is_waited_for(tmp_path: Path, surface: FakeCuda) -> None:
    """In the pass, and in the copy of its results."""
    model = model_of(tmp_path, surface)
    surface.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceError, match="illegal memory access"):
        model.launch(items(model, [1, 2, 3]))
    outputs = model.launch(items(model, [1, 2, 3]))
    surface.failure = RuntimeError("unspecified launch failure")
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        model.land(outputs)


def test_a_system_that_locks_no_memory(tmp_path: Path, surface: FakeCuda) -> None:
    """Copies go without it; it is asked once."""

    def refuse(count: int) -> torch.Tensor:
        surface.calls.append("refused")
        raise RuntimeError("CUDA error: out of memory")

    surface.page_locked = refuse  # type: ignore[method-assign]
    model = model_of(tmp_path, surface)
    assert values_of(model.forward(items(model, [1, 2, 3]))) == [[2, 4, 6]]
    assert surface.calls.count("refused") == 1


def test_a_warm_up_leaves_room_for_the_batch_behind(tmp_path: Path, surface: FakeCuda) -> None:
    """The largest batch is one that fits beside the inputs of the next."""
    model = model_of(tmp_path, surface)
    behind: list[Staged] = []
    stage, works = model.stage, model._module

    def watched(items: Any) -> Any:
        staged = stage(items)
        assert isinstance(staged, Staged)
        behind.append(staged)
        return staged

    def double(x: torch.Tensor) -> Any:
        if len(x) > 1:
            assert [len(staged) for staged in behind if staged.groups][-1] == len(x)
        return works(x)

    model.stage, model._module = watched, double  # type: ignore[method-assign]
    assert model.warm_up() == 8
    assert len(behind[-1]) == 8
