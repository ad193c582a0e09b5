# SPDX-License-Identifier: Apache-2.0
"""A model's code is tried in a process of its own, with the worker unit's user and sandbox."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuinfer.errors import ModelLoadError
from gpuinfer.models import sandbox
from tests import models_for_tests as build

pytestmark = pytest.mark.unit

UNIT = Path(__file__).parents[2] / "systemd" / "gpuinfer-worker@.service"


def test_the_worker_units_sandbox_is_taken_whole() -> None:
    """Its user, its bounds and its sandbox, and neither its command nor its secrets; drop-ins add to it."""
    lines = sandbox.directives(f"# {UNIT}\n{UNIT.read_text()}\n# drop-in\n[Service]\nIPAddressDeny=any\n")
    for wanted in (
        "User=gpuinfer-worker",
        "ProtectSystem=strict",
        "CapabilityBoundingSet=",
        "SystemCallFilter=~@privileged @resources",
        "DeviceAllow=char-nvidia rw",
        "MemoryMax=80%",
        "IPAddressDeny=any",
    ):
        assert wanted in lines
    keys = {line.partition("=")[0] for line in lines}
    assert not keys & {
        "ExecStart",
        "ExecStopPost",
        "Type",
        "LoadCredential",
        "WatchdogSec",
        "Restart",
        "WantedBy",
    }


def test_a_trial_tells_what_the_model_is(tmp_path: Path) -> None:
    """Signature, example and result; what it prints is no part of the answer."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.py").write_text(
        "import os\nclass Upper:\n    example = 'hello'\n"
        "    def predict(self, batch: list[str]) -> list[str]:\n"
        "        print('{}')\n        os.write(1, b'{}')\n"
        "        return [text.upper() + os.environ.get('GPUINFER_SECRET', '') for text in batch]\n"
    )
    (tmp_path / "m" / "model.toml").write_text('name = "m"\nartefact = "model.py"\n')
    os.environ["GPUINFER_SECRET"] = "secret"
    try:
        told = sandbox.ask("attempt", folder=str(tmp_path / "m"), device="cpu")
    finally:
        del os.environ["GPUINFER_SECRET"]
    assert told["result"] == {"output": "HELLO"}
    assert told["example"] == "hello"
    assert told["signature"]["inputs"][0]["kind"] == "text"
    assert told["differences"] == []
    assert not (tmp_path / "m" / "__pycache__").exists()


def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    """The class with its exit code, the model, file and line; also of one that ends its process."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.toml").write_text('name = "m"\nartefact = "model.py"\n')
    code = "class M:\n    def load(self, ctx):\n        {}\n    def predict(self, batch): ...\n"
    (folder / "model.py").write_text(code.format("raise ValueError('no weights')"))
    with pytest.raises(ModelLoadError, match=r"no weights \(model.py, line 3\)"):
        sandbox.ask("attempt", folder=str(folder), device="cpu")
    (folder / "model.py").write_text(code.format("import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(ModelLoadError, match="was killed by SIGKILL"):
        sandbox.ask("attempt", folder=str(folder), device="cpu")


def test_bench_measures_each_size(tmp_path: Path) -> None:
    """Powers of two up to the largest batch."""
    folder = build.perceptron(tmp_path / "mlp", max_batch_size=6)
    told = sandbox.ask("bench", folder=str(folder), device="cpu", seconds=0.01)
    assert [row["batch"] for row in told["batches"]] == [1, 2, 4, 6]
    assert all(row["items_per_s"] > 0 and row["runs"] >= 3 for row in told["batches"])
