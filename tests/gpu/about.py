# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu.about``: tell what the check runs on, and that it runs on what was packed."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpuinfer
from gpuinfer.gpus import list_gpus
from tests.gpu.dry import GIB, dry_run
from tests.gpu.records import tell, tell_check

#: Our packages whose versions matter most; all are those of the lock files.
_OURS = ("gpuinfer", "celery", "kombu", "redis")
_THEIRS = ("torch", "numpy")


def about() -> dict[str, Any]:
    """Return card, driver, torch, CUDA, Python, versions."""
    import torch

    found, capability = list_gpus(), "none"
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
    cards = [f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in found.gpus]
    return {
        "card": " + ".join(cards) or found.reason,
        "driver": found.driver,
        "compute capability": capability,
        "CUDA of torch": torch.version.cuda or "none",
        "Python": platform.python_version(),
        **{name: version(name) for name in (*_THEIRS, *_OURS)},
    }


def main() -> None:
    """Tell it; fail when gpuinfer does not come from its wheel, or torch cannot use a GPU."""
    began = time.monotonic()
    tell(about=about())
    here = Path(gpuinfer.__file__)
    packed = here.is_relative_to(sys.prefix)
    tell_check("gpuinfer comes from its wheel", time.monotonic() - began, "" if packed else f"from {here}")
    import torch

    began = time.monotonic()
    usable = dry_run() or torch.cuda.is_available()
    tell_check("torch can use a GPU", time.monotonic() - began, "" if usable else "it cannot")


if __name__ == "__main__":
    main()
