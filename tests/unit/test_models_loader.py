# SPDX-License-Identifier: Apache-2.0
"""Loading checks the digest first; a batch gives each item its own outputs or an error of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpuinfer.errors import (
    DeviceError,
    DeviceOutOfMemory,
    DigestMismatch,
    InferenceError,
    ModelError,
    ModelLoadError,
)
from gpuinfer.models.device import pick_device, translate, try_device
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder, Repository
from gpuinfer.models.tensor_model import TensorModel
from gpuinfer.models.tensors import Item, decode_batch
from tests import models_for_tests as build

pytestmark = pytest.mark.unit

ONE_TO_ONE = '[[inputs]]\nname = "x"\nshape = [2]\n[[outputs]]\nname = "y"\n'


def _folder(path: Path) -> ModelFolder:
    return ModelFolder(path=path, manifest=load_manifest(path))


def _load(path: Path) -> LoadedModel:
    return load(_folder(path), "cpu")


def _items(model: LoadedModel, *inputs: object) -> list[Item]:
    items = decode_batch(model.manifest, inputs)
    return [item for item in items if isinstance(item, tuple)]


class _WritesOnLoad(nn.Module):
    """What a poisoned artefact can do: torch.jit.load runs ``__setstate__``."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.count = 0

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        # Used, or the compiler would drop it.
        self.count = torch.from_file(self.path, shared=True, size=1).numel()

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_wrong_digest_is_never_opened(tmp_path: Path) -> None:
    """The artefact runs code when loaded; with a wrong digest it does not."""
    trace = tmp_path / "trace"
    path = build.write_model(tmp_path / "m", _WritesOnLoad(str(trace)), ONE_TO_ONE)
    beside = path / "beside.txt"
    beside.write_text("not there when it was added")
    folder = Repository([tmp_path]).get("m")
    with pytest.raises(DigestMismatch, match=r"beside.txt is new; it was not loaded"):
        load(folder, "cpu")
    assert not trace.exists()
    beside.unlink()
    load(folder, "cpu")
    assert trace.exists(), "the poison works, or this test shows nothing"


@pytest.mark.parametrize("artefact", ["model.pt", "model.pt2"])
def test_garbage_is_a_load_error(tmp_path: Path, artefact: str) -> None:
    """A file with the right digest that is no model names the model and the cause."""
    (tmp_path / artefact).write_bytes(b"garbage")
    build.write_manifest(tmp_path, artefact, ONE_TO_ONE)
    with pytest.raises(ModelLoadError) as caught:
        _load(tmp_path)
    assert caught.value.field == tmp_path.name
    assert artefact in caught.value.message


def test_a_missing_artefact(tmp_path: Path) -> None:
    """A manifest without its artefact is a ModelError."""
    path = build.perceptron(tmp_path / "m")
    (path / "model.pt").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        _load(path)


def test_no_silent_fallback_to_the_cpu(tmp_path: Path) -> None:
    """Asked for a GPU that is not there, loading fails."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="no usable GPU"):
        load(_folder(build.perceptron(tmp_path / "m")), "cuda")
    assert pick_device("auto") == "cpu"
    assert pick_device("cuda") == "cuda"


def test_perceptron_in_order(tmp_path: Path) -> None:
    """Each item's output is what the model gives for it alone."""
    model = _load(build.perceptron(tmp_path / "m"))
    assert model.warm_up() == 256
    items = _items(model, *np.random.default_rng(1).normal(size=(20, 64)).tolist())
    for item, (together,) in zip(items, model.forward(items), strict=True):
        ((alone,),) = model.forward([item])
        assert together.shape == (10,)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert model.forward([]) == []


def test_a_tensor_and_a_scalar(tmp_path: Path) -> None:
    """Several inputs are stacked each for itself."""
    model = _load(build.add_scalar(tmp_path / "m"))
    model.warm_up()
    items = _items(model, {"x": [1, 2, 3, 4], "k": 10}, {"x": [0, 0, 0, 0], "k": -1})
    assert [row[0].tolist() for row in model.forward(items)] == [[11, 12, 13, 14], [-1] * 4]


def test_a_model_without_a_batch_dimension(tmp_path: Path) -> None:
    """batchable = false: one call an item, the full shape, a plain float for a scalar, two outputs."""
    model = _load(build.unbatched(tmp_path / "m"))
    assert model.warm_up() == 1
    items = _items(model, {"x": [[1], [2]], "k": 3}, {"x": [[1, 1], [1, 1]], "k": 0.5})
    (product, total), (half, four) = model.forward(items)
    assert product.tolist() == [[3], [6]]
    assert total.shape == ()
    assert total == 3
    assert half.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert four == 4


@pytest.mark.parametrize("how", ["group", "pad"])
def test_variable_shapes(tmp_path: Path, how: str) -> None:
    """Items of different lengths run in groups of one length, or padded to the longest and cut back."""
    model = _load(build.variable(tmp_path / "m", how))
    model.warm_up()
    outputs = model.forward(_items(model, [1, 2], [3], [4, 5], [6, 7, 8]))
    assert [float(total) for total, _ in outputs] == [3, 3, 9, 21]
    assert all(total.shape == () for total, _ in outputs)
    assert [twice.tolist() for _, twice in outputs] == [[2, 4], [6], [8, 10], [12, 14, 16]]
    assert model.warnings == []


def test_a_failing_model_is_an_inference_error(tmp_path: Path) -> None:
    """Its own words reach the caller, and the next batch runs."""
    model = _load(build.picky(tmp_path / "m"))
    with pytest.raises(InferenceError, match="negative numbers make me fail"):
        model.forward(_items(model, [4], [-1]))
    assert model.forward(_items(model, [4]))[0][0].tolist() == [2]


class _Mapping(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"b": x * 2, "a": x, "c": x}


def test_a_dictionary_is_read_by_name(tmp_path: Path) -> None:
    """Outputs by name come in the manifest's order; a name that is missing is told at warm-up."""
    outputs = '[[outputs]]\nname = "a"\n[[outputs]]\nname = "b"\n'
    tables = '[[inputs]]\nname = "x"\nshape = [1]\n' + outputs
    model = _load(build.write_model(tmp_path / "m", _Mapping(), tables))
    model.warm_up()
    assert [a.tolist() for a in model.forward(_items(model, [3]))[0]] == [[3], [6]]
    model = _load(build.write_model(tmp_path / "n", _Mapping(), tables.replace('"b"', '"z"')))
    with pytest.raises(ModelLoadError, match="did not return output 'z'"):
        model.warm_up()


class _Bfloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.bfloat16 else torch.zeros(0)


def test_bfloat16_in_and_out(tmp_path: Path) -> None:
    """The model gets bfloat16; its bfloat16 output comes as float32."""
    tables = '[[inputs]]\nname = "x"\ndtype = "bfloat16"\nshape = [2]\n[[outputs]]\nname = "y"\n'
    model = _load(build.write_model(tmp_path / "m", _Bfloat16(), tables))
    model.warm_up()
    ((array,),) = model.forward(_items(model, [1.0, -0.15625]))
    assert array.dtype == np.float32
    assert array.tolist() == [1.0, -0.15625]


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.mark.parametrize(
    ("output", "model", "said"),
    [
        ('name = "y"', _Sum(), "its first dimension must be the batch"),
        ('name = "y"\nshape = [3]', nn.Identity(), "has shape [2], but its manifest says [3]"),
        ('name = "y"\ndtype = "int64"', nn.Identity(), "is float32, but its manifest says int64"),
        ('name = "y"\n[[outputs]]\nname = "z"', nn.Identity(), "returned 1 outputs, but its manifest has 2"),
        ('name = "y"\nkind = "classification"\nlabels = ["a"]', nn.Identity(), "has 2 classes, 1 labels"),
        ('name = "y"\nkind = "classification"', nn.Unflatten(1, (2, 1)), "needs one vector of scores"),
    ],
)
def test_warm_up_holds_outputs_against_the_manifest(
    tmp_path: Path, output: str, model: nn.Module, said: str
) -> None:
    """A model that does not give what its manifest says is found before it serves."""
    tables = f'[[inputs]]\nname = "x"\nshape = [2]\n[[outputs]]\n{output}\n'
    loaded = _load(build.write_model(tmp_path / "m", model, tables))
    with pytest.raises(ModelLoadError) as caught:
        loaded.warm_up()
    assert said in caught.value.message
    assert caught.value.field == "m"


class _Hungry(nn.Module):
    """Asks for far more memory than there is as soon as the batch is larger than 8."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 8:
            return torch.zeros(1 << 60)
        return x


def test_out_of_memory_is_its_own_error_and_warm_up_finds_what_fits(tmp_path: Path) -> None:
    """The largest batch is halved until it fits; the size that did is returned."""
    model = _load(build.write_model(tmp_path / "m", _Hungry(), ONE_TO_ONE))
    with pytest.raises(DeviceOutOfMemory):
        model.forward(_items(model, *[[0, 0]] * 9))
    assert model.warm_up() == 8
    assert model.warm_up(3) == 3


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), DeviceOutOfMemory),
        (
            RuntimeError("The following operation failed\nRuntimeError: CUDA out of memory."),
            DeviceOutOfMemory,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), DeviceError),
        (ValueError("else"), InferenceError),
    ],
)
def test_torch_errors_become_ours(tmp_path: Path, raised: Exception, error: type[Exception]) -> None:
    """The class says whether to halve the batch, to give up the GPU, or to blame the model."""

    def failing(*_: Any) -> Any:
        raise raised

    model = TensorModel(_folder(build.perceptron(tmp_path / "m")), "cpu", failing)
    with pytest.raises(error) as caught:
        model.forward([(np.zeros(64, np.float32),)])
    assert type(caught.value) is error


def test_the_telling_line_of_an_error() -> None:
    """TorchScript's trace-back stands before the driver's words, and advice on debugging behind them."""
    told = "\n".join(
        [
            "The following operation failed in the TorchScript interpreter.",
            "Traceback of TorchScript (most recent call last):",
            "RuntimeError: CUDA error: an illegal memory access was encountered",
            "CUDA kernel errors might be asynchronously reported at some other API call.",
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        ]
    )
    error = translate(RuntimeError(told), InferenceError, "m")
    assert error.message == "m: RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_device_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that works says nothing; of one that does not, each failure is the device's, in its own words."""
    model = _load(build.perceptron(tmp_path / "m"))
    model.probe()
    with pytest.raises(DeviceError, match="cuda:99 cannot be used: "):
        try_device("cuda:99")

    def failing(raised: Exception) -> Callable[..., Any]:
        def zeros(*_: Any, **__: Any) -> Any:
            raise raised

        return zeros

    monkeypatch.setattr(torch, "zeros", failing(RuntimeError("CUDA error: device lost\nCompile with")))
    with pytest.raises(DeviceError, match=r"^cpu cannot be used: CUDA error: device lost$") as caught:
        model.probe()
    assert caught.value.exit_code == 69
    monkeypatch.setattr(torch, "zeros", failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(DeviceOutOfMemory):
        model.probe()


def test_the_sleeper_takes_its_time(tmp_path: Path) -> None:
    """And none in a warm-up."""
    begin = time.monotonic()
    _load(build.sleeper(tmp_path / "long", 200)).warm_up()
    assert time.monotonic() - begin < 200
    model = _load(build.sleeper(tmp_path / "m", 0.3))
    begin = time.monotonic()
    model.forward(_items(model, [0], [1]))
    assert time.monotonic() - begin >= 0.3


def test_native_code_holds_no_lock(tmp_path: Path) -> None:
    """While it runs, Python's other threads run on."""
    latch = build.latched(tmp_path / "models" / "m")
    model = _load(tmp_path / "models" / "m")
    thread = threading.Thread(target=model.forward, args=(_items(model, [0], [1]),))
    thread.start()
    for _ in range(30):
        time.sleep(0.001)
        assert thread.is_alive()
    latch.open()
    thread.join(60)
    assert not thread.is_alive()
