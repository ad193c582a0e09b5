# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer gpus`` and the doctor's checks of the GPU, against NVML itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpuinfer.gpus import Gpu
from tests.gpu.conftest import command, findings
from tests.gpu.dry import GIB

pytestmark = pytest.mark.gpu

#: These must be well on a machine that is. The others may warn of it, or have nothing to look at.
SOUND = {"gpu.driver", "gpu.memory", "gpu.cuda", "versions.torch"}


def test_gpus_lists_what_nvml_knows(gpu: Gpu) -> None:
    """`gpuinfer gpus` lists worker 0's GPU with name, PCI address, memory and driver."""
    done = command("gpus", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["source"], found["failed"], found["broken"]) == ("nvml", False, {})
    first = found["gpus"][0]
    assert (first["workers"], first["index"], first["uuid"]) == ([0], gpu.index, gpu.uuid)
    assert first["name"] and first["pci"] and found["driver"]
    assert first["memory_bytes"] > GIB
    assert 0 <= first["used_bytes"] <= first["memory_bytes"]
    assert f"worker 0: GPU {gpu.index}  {gpu.name}" in command("gpus").stdout


def test_the_doctor_finds_a_sound_gpu() -> None:
    """`gpuinfer doctor gpu` finds driver, GPU, memory and CUDA in order, and no error."""
    found = findings("gpu", "versions.torch")
    assert [entry for entry in found if entry["status"] == "error"] == []
    assert {entry["check"] for entry in found if entry["status"] == "ok"} >= SOUND
