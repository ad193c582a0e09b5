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
    """A model on its device. An item is what ``prepare`` makes from one request's ``inputs`` value.

    ``prepare``, ``stage``, ``land`` and ``finish`` may be called from several threads at once; ``forward``,
    ``launch``, ``warm_up``, ``probe`` and ``release_cache`` only from the device thread.
    """

    def __init__(self, manifest: Manifest, device: str) -> None:
        self.manifest = manifest
        self.device = device
        self.name = manifest.name
        #: ``sha256:`` and the first twelve digits of its folder's digest; "" if it was not verified.
        self.version = ""
        #: What it takes, as data. A Python model's may come from its annotations.
        self.signature = from_manifest(manifest) or Signature(
            inputs=(), outputs=outputs_of(manifest), batchable=manifest.batchable
        )
        #: Problems that warm-up found, and what to do about them; to be logged once.
        self.warnings: list[str] = []
        #: Why the model accepted none of warm-up's inputs; if set, its batches start at 1 and grow.
        self.refused = ""
        #: The ``inputs`` value that warm-up ran: the example, or a made-up one; None: none yet.
        self.taken: Any | None = None

    @property
    def prepares(self) -> bool:
        """Whether ``prepare`` may run a model's own code or decode files, and so may be slow or fail."""
        return False

    def prepares_these(self, values: Sequence[object]) -> bool:
        """Tell whether ``prepare`` does so for these values."""
        return self.prepares

    @property
    def finishes(self) -> bool:
        """Whether ``finish`` runs a model's own code."""
        return False

    @property
    def runs_code(self) -> bool:
        """Whether the model has its own Python code, which may print, log, and ask for cancellations."""
        return False

    @abstractmethod
    def prepare(self, values: Sequence[object]) -> list[Any]:
        """Turn one ``inputs`` value per request into items; a bad one gives an error in its place."""

    @abstractmethod
    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Run the items and return, for each in the same order, its output or its own error.

        Raises DeviceOutOfMemory, DeviceError, and InferenceError for any other failure of the model; no item
        has a result then.
        """

    def stage(self, items: Sequence[Any]) -> Sequence[Any]:
        """Start to copy items to the device, which may run others; return staged items for ``launch``.

        Slices of staged items are plain items. Raises nothing: items that cannot be staged are returned
        unchanged.
        """
        return items

    def launch(self, items: Sequence[Any]) -> list[Any]:
        """Run the items as ``forward`` does; the outputs may be read once ``land`` has returned."""
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
        """Turn outputs into the JSON of results, one per request; a bad one gives an error in its place.

        ``top_k`` (None: the manifest's) and ``encoding`` (default ``list``) are per output.
        """

    @abstractmethod
    def warm_up(self, max_batch_size: int | None = None) -> int:
        """Run the model before it serves, and return the largest batch that fits its device.

        That is ``max_batch_size`` (default: the manifest's), or less; 1 if there is no input to try the model
        with (see ``refused``). Raises ModelLoadError; DeviceOutOfMemory when not even one item fits.
        """

    def example(self) -> Any | None:
        """Return an ``inputs`` value that the model accepts; None if none is known."""
        return None

    def probe(self) -> None:
        """Test the model's device with a tiny computation. Raises as ``try_device`` does."""
        try_device(self.device)

    def release_cache(self) -> None:
        """Release device memory that torch has cached and no tensor uses."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def close(self) -> None:  # noqa: B027  # most models hold nothing that must be released
        """Release what the model holds besides memory. No method is called after it."""
