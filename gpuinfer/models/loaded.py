# SPDX-License-Identifier: Apache-2.0
"""The interface of a loaded model, the same for every format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from gpuinfer.models.device import try_device
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.signature import Signature, from_manifest, outputs_of
from gpuinfer.models.tensors import Encoding


class LoadedModel(ABC):
    """A model on its device. An item is what ``prepare`` makes of one request's ``inputs`` value.

    ``prepare``, ``stage``, ``land`` and ``finish`` may be called from several threads at once; ``forward``,
    ``launch``, ``warm_up``, ``probe`` and ``release_cache`` from one thread at a time, the device's.
    """

    def __init__(self, manifest: Manifest, device: str) -> None:
        self.manifest = manifest
        self.device = device
        self.name = manifest.name
        #: The digest of its folder, ``sha256:`` and twelve digits of it; "" where nothing is verified.
        self.version = ""
        #: What it takes, without its code. A Python model's may come from its annotations.
        self.signature = from_manifest(manifest) or Signature(
            inputs=(), outputs=outputs_of(manifest), batchable=manifest.batchable
        )
        #: What warm-up could not find out, and what to do about it; to be logged once.
        self.warnings: list[str] = []
        #: Why the model took none of warm-up's inputs: its batches begin at 1 then, and grow.
        self.refused = ""
        #: The ``inputs`` value that warm-up has run: the example, or one that was invented; None: none yet.
        self.taken: Any | None = None

    @property
    def prepares(self) -> bool:
        """True when ``prepare`` may take a model's own code or a decoder of files, and so time and care."""
        return False

    def prepares_these(self, values: Sequence[object]) -> bool:
        """Tell whether it does so for these values."""
        return self.prepares

    @property
    def finishes(self) -> bool:
        """True when ``finish`` runs a model's own code."""
        return False

    @property
    def runs_code(self) -> bool:
        """True when the model runs code that may print, log, and ask whether its tasks were cancelled."""
        return False

    @abstractmethod
    def prepare(self, values: Sequence[object]) -> list[Any]:
        """Turn one ``inputs`` value per request into items; an error stands in the place of a bad one."""

    @abstractmethod
    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Run the items and return, for each in the same order, its output or an error of its own.

        Raises DeviceOutOfMemory, DeviceError, and InferenceError for whatever else the model does; no item
        has a result then.
        """

    def stage(self, items: Sequence[Any]) -> Sequence[Any]:
        """Bring items towards the device, while it may run others; return what ``launch`` takes instead.

        Slices of that are plain items. Raises nothing: what cannot be staged is returned as it came.
        """
        return items

    def launch(self, items: Sequence[Any]) -> list[Any]:
        """Run the items as ``forward`` does; what the device gave may be read once ``land`` has returned."""
        return self.forward(items)

    def land(self, outputs: Sequence[Any]) -> None:  # noqa: B027  # most outputs are where they are read
        """Wait until outputs of ``launch`` are in the host's memory. Raises DeviceError."""

    @abstractmethod
    def finish(
        self,
        outputs: Sequence[Any],
        *,
        top_k: Sequence[int | None] | None = None,
        encoding: Sequence[Encoding] | None = None,
    ) -> list[Any]:
        """Turn outputs into the JSON of results, one a request; an error stands in the place of a bad one.

        ``top_k`` (None: the manifest's) and ``encoding`` (default ``list``) are per output.
        """

    @abstractmethod
    def warm_up(self, max_batch_size: int | None = None) -> int:
        """Run the model before it serves, and return the largest batch that fits its device.

        That is the one asked for (default: the manifest's), or less; 1 where there is nothing that the model
        could be tried with (``refused``). Raises ModelLoadError; DeviceOutOfMemory when not even one item
        fits.
        """

    def example(self) -> Any | None:
        """Return one ``inputs`` value that the model is known to take; None where none is known."""
        return None

    def probe(self) -> None:
        """Try the model's device with next to no work. Raises as ``try_device`` does."""
        try_device(self.device)

    def release_cache(self) -> None:
        """Give memory that torch holds but no tensor uses back to the device."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def close(self) -> None:  # noqa: B027  # most models hold nothing that must be given back
        """Let go of what the model holds beside memory. Nothing is called after it."""
