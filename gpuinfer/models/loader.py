# SPDX-License-Identifier: Apache-2.0
"""Load an artefact onto a device.

Loading runs code, in any format. So the digest is checked first, and the very file that was checked is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import BinaryIO

from gpuinfer.errors import DeviceError, ModelLoadError
from gpuinfer.models.device import translate
from gpuinfer.models.loaded import LoadedModel
from gpuinfer.models.manifest import Format
from gpuinfer.models.repository import ModelFolder, open_verified

#: Characters of a digest that make a version: ``sha256:`` and twelve digits.
VERSION_LENGTH = 19

_Reader = Callable[[ModelFolder, BinaryIO, str], LoadedModel]


def load(folder: ModelFolder, device: str, *, threads: int = 0) -> LoadedModel:
    """Check the digest, then load the model onto ``device`` (``cpu``, ``cuda``, ``cuda:0``).

    ``threads`` is torch's number of threads for one operation on the CPU; 0 leaves it to torch.
    Raises DigestMismatch; ModelLoadError; DeviceError; DeviceOutOfMemory if the model does not fit.
    """
    with open_verified(folder) as file:
        import torch

        name = folder.manifest.name
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise DeviceError(f"torch finds no usable GPU: cannot load {name} on {device!r}", "device")
        if threads:
            torch.set_num_threads(threads)
        _import(folder)
        try:
            model = _reader(folder.manifest.format)(folder, file, device)
        except Exception as exc:
            error = translate(exc, ModelLoadError, f"{folder.artefact} cannot be loaded")
            error = ModelLoadError(error.message, name) if isinstance(error, ModelLoadError) else error
            if error is exc:  # it keeps its own cause
                raise
            raise error from exc
        model.version = "" if folder.record is None else folder.record.digest[:VERSION_LENGTH]
        return model


def _reader(name: Format) -> _Reader:
    # Imported here, as listing models must not import what a format needs.
    from gpuinfer.models.formats import export, python, torchscript

    readers: dict[str, _Reader] = {
        "torchscript": torchscript.read,
        "export": export.read,
        "python": python.read,
    }
    return readers[name]


def _import(folder: ModelFolder) -> None:
    """Import the libraries that the artefact needs. Raises ModelLoadError naming the one that fails."""
    for module in folder.manifest.imports:
        try:
            importlib.import_module(module)
        except Exception as exc:
            package = module.partition(".")[0]
            raise ModelLoadError(
                f"imports = [..., {module!r}] failed: {type(exc).__name__}: {exc}; install {package} where "
                "the workers' Python finds it",
                folder.manifest.name,
            ) from exc
