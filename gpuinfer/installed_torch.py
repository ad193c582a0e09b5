# SPDX-License-Identifier: Apache-2.0
"""Which torch is installed, read without importing it: built for CUDA, or only for the CPU."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from gpuinfer.gpus import DRIVER

#: Replaces torch for CPUs by torch for GPUs.
CUDA_TORCH = "apt install gpuinfer-torch-cuda"


def torch_build() -> tuple[str, str] | None:
    """Return torch's version and its CUDA, without the seconds that importing it takes."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"(?m)^__version__ = '([^']+)'", text)
    cuda = re.search(r"(?m)^cuda\b.* = '([^']+)'", text)
    return version[1] if version else "of unknown version", cuda[1] if cuda else ""


def wrong_torch() -> str:
    """Return the fix for a host with NVIDIA's driver whose torch is built only for the CPU, else ""."""
    found = torch_build()
    if found is None or found[1] or not DRIVER.exists():
        return ""
    return f"{cpu_only(found[0])}: {CUDA_TORCH}"


def cpu_only(version: str) -> str:
    """Return the words for a build of torch that uses no GPU."""
    return f"torch {version} is built only for the CPU"
