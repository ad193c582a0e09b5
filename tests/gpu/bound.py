# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu.bound N PER_GPU``: bind as worker N does, and print which GPU CUDA then has."""

from __future__ import annotations

import json
import os
import sys

from gpuinfer.errors import GpuinferError
from gpuinfer.gpu_binding import VISIBLE, visible_device
from gpuinfer.models.device import try_device
from gpuinfer.settings import WorkerSettings
from tests.gpu.dry import dry_run


def seen() -> str:
    """Return the UUID of the one GPU that CUDA sees; empty when it sees none."""
    if dry_run():
        from tests.gpu import stub

        return stub.UUID if stub.visible() else ""
    import torch

    if not torch.cuda.device_count():
        return ""
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def main() -> None:
    """Print ``device``, ``uuid`` and ``error`` as JSON."""
    answer = {"device": "", "uuid": "", "error": ""}
    try:
        number, per_gpu = map(int, sys.argv[1:])
        binding = visible_device(number, WorkerSettings(per_gpu=per_gpu), os.environ)
        answer["device"] = binding.device
        if binding.cuda_visible_devices is not None:  # as gpuinfer.worker.bootstrap does
            os.environ[VISIBLE] = binding.cuda_visible_devices
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if binding.device != "cpu":
            try_device(binding.device)
        answer["uuid"] = seen()
    except GpuinferError as exc:
        answer["error"] = str(exc)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
