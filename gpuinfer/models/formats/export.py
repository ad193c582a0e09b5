# SPDX-License-Identifier: Apache-2.0
"""torch.export: ``torch.export.save``'s files."""

from __future__ import annotations

from typing import BinaryIO

from gpuinfer.models.repository import ModelFolder
from gpuinfer.models.tensor_model import TensorModel


def read(folder: ModelFolder, file: BinaryIO, device: str) -> TensorModel:
    """Load an exported program onto ``device``."""
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(file)
    if any(value.device.type != torch.device(device).type for value in program.state_dict.values()):
        program = move_to_device_pass(program, device)
    return TensorModel(folder.manifest, device, program.module())
