# SPDX-License-Identifier: Apache-2.0
"""An instance's own file, and what an instance would serve by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer import instances
from gpuinfer.models import record
from gpuinfer.queue.fleet import Serves
from gpuinfer.settings import QUEUES, Settings
from gpuinfer.watcher.served import Served

pytestmark = pytest.mark.unit


def test_files_are_found_by_number(tmp_path: Path) -> None:
    """Others that lie beside them are none; where there is no file, nothing is special."""
    for name in ("worker@0.env", "worker@12.env", "worker@1.env.bak", "worker@x.env"):
        (tmp_path / name).write_text("A=1\n")
    assert instances.with_file(tmp_path) == [0, 12]
    assert instances.read(12, tmp_path) == {"A": "1"}
    assert instances.read(3, tmp_path) == {}


def test_what_an_instance_would_serve_follows_its_files(tmp_path: Path) -> None:
    """The settings of all, its own above them; each is read again when it has changed."""
    common = tmp_path / "gpuinfer.toml"
    common.write_text('[worker]\nmodels = ["ocr", "digits"]\n')
    own = instances.file_of(0, tmp_path)

    def environment(number: int) -> dict[str, str]:
        return {"GPUINFER_CONFIG": str(common), **instances.read(number, tmp_path)}

    served = Served(Settings(), environment)
    assert served.serves(0) == Serves(QUEUES, ("digits", "ocr"))
    own.write_text("GPUINFER_WORKER_QUEUES=batch,realtime\n")
    assert served.serves(0) == Serves(("realtime", "batch"), ("digits", "ocr"))
    assert served.serves(1) == Serves(QUEUES, ("digits", "ocr"))
    common.write_text('[worker]\nmodels = ["a-longer-name"]\n')
    assert served.serves(0) == Serves(("realtime", "batch"), ("a-longer-name",))
    own.write_text("what is this\nGPUINFER_WORKER_QUEUES=batch\n")  # systemd drops the line alone
    assert served.serves(0) == Serves(("batch",), ("a-longer-name",))
    own.write_text("GPUINFER_WORKER_QUEUE=batch\n")
    assert served.serves(0) == Serves(QUEUES, ("digits",))


def test_models_count_where_they_are_installed(tmp_path: Path) -> None:
    """The shipped one is there; another name is nobody's model."""
    served = Served(Settings(), lambda _: {"GPUINFER_WORKER_MODELS": "digits,nowhere"})
    (digits,) = served.installed([0, 1]).items()
    assert digits[0] == "digits"
    assert digits[1] is not None
    assert digits[1].inputs[0].shape == (1, 8, 8)
    assert served.installed([]) == {}


def test_an_annotated_model_is_described_as_it_was_when_added(tmp_path: Path) -> None:
    """Its manifest names no inputs: what it takes is in its record, and no code of it is run for that."""
    folder = tmp_path / "upper"
    folder.mkdir()
    (folder / "model.toml").write_text('name = "upper"\nartefact = "model.py"\n')
    (folder / "model.py").write_text("raise SystemExit('nobody imports this here')\n")
    signature = {"inputs": [{"name": "input", "kind": "text"}], "batchable": True, "source": "annotations"}
    record.write(folder, record.of(folder, signature=signature))
    environ = {"GPUINFER_WORKER_MODELS": "upper", "GPUINFER_MODELS_FOLDERS": str(tmp_path)}
    served = Served(Settings(), lambda _: environ)
    found = served.installed([0])["upper"]
    assert found is not None
    assert [(one.name, one.kind) for one in found.inputs] == [("input", "text")]
    record.write(folder, record.of(folder, signature={"inputs": 5}))
    assert served.installed([0]) == {}  # as a broken model, which no worker loads
