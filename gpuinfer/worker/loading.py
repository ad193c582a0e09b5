# SPDX-License-Identifier: Apache-2.0
"""Loads a worker's models. A model that fails to load does not stop the others."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuinfer.errors import DeviceError, GpuinferError, ModelLoadError
from gpuinfer.log import get_logger
from gpuinfer.models import blame, words
from gpuinfer.models.repository import Repository
from gpuinfer.settings import Settings

if TYPE_CHECKING:
    from gpuinfer.models.loaded import LoadedModel

log = get_logger(__name__)

_HINT = "tasks for it wait for another worker; fix the model, then restart this worker"


@dataclass(frozen=True)
class Served:
    """The models of a worker: loaded, and failed to load."""

    #: Name -> model, and its largest batch that fits the device.
    models: dict[str, tuple[LoadedModel, int]]
    #: Name -> reason why it failed to load.
    missing: dict[str, GpuinferError]


def load_models(settings: Settings, device: str) -> Served:
    """Load and warm up the models of ``worker.models``.

    Raises DeviceError if the device itself fails, and the first model's error if none can be loaded.
    """
    from gpuinfer.models.device import try_device  # imports torch, after the device is bound

    if device != "cpu":
        try_device(device)  # so that errors of the device are not blamed on a model
    words.adopt()  # from here on, log what models print
    served = Served({}, {})
    for name in settings.worker.models:
        try:
            served.models[name] = _load(settings, name, device)
        except DeviceError:
            raise
        except Exception as exc:
            served.missing[name] = _plain(exc, name)
            _free(device)
    if not served.models:
        raise next(iter(served.missing.values()))
    for name, error in served.missing.items():
        log.error("model_not_loaded", model=name, code=error.code, reason=error.message, hint=_HINT)
    return served


def _load(settings: Settings, name: str, device: str) -> tuple[LoadedModel, int]:
    from gpuinfer.models.loader import load

    started = time.monotonic()
    folder = Repository(settings.models.folders).get(name)
    try:
        model = load(folder, device, threads=settings.worker.threads)
        wanted = model.manifest.max_batch_size
        fits = model.warm_up(min(wanted, settings.worker.max_batch_size or wanted))
    except GpuinferError as exc:
        own = blame.root(exc)
        if own is not exc and blame.location(own, folder.path):
            log.error("model_failed", model=name, reason=exc.message, exc_info=blame.told(own))
        raise
    took = round((time.monotonic() - started) * 1000)
    log.info("model_loaded", model=name, device=device, max_batch_size=fits, duration_ms=took)
    for warning in model.warnings:
        log.warning("model_warning", model=name, reason=warning)
    return model, fits


def _plain(exc: Exception, name: str) -> GpuinferError:
    """Return a GpuinferError without the traceback, which would keep the loaded model in memory."""
    error = exc if isinstance(exc, GpuinferError) else ModelLoadError(f"{type(exc).__name__}: {exc}", name)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _free(device: str) -> None:
    """Free the memory of a model that failed to load."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
