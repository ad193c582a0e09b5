# SPDX-License-Identifier: Apache-2.0
"""Adapts each model's maximum batch size: smaller after one that did not fit, then slowly larger. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Full passes before a size that never failed is doubled.
TRIED_AFTER = 4
#: Full passes before a size that failed grows by a quarter; doubled after each further failure.
GROWS_AFTER, GROWS_AFTER_MOST = 64, 4096


@dataclass(slots=True)
class _Size:
    now: int
    most: int
    needed: int
    #: True once a larger batch did not fit.
    failed: bool
    passes: int = 0


class Sizes:
    """Each model's largest batch.

    ``fits``: sizes found by the warm-up; ``most``: limits of manifest and settings. A size of 1 means that
    the warm-up had no example; it is doubled until a batch does not fit.
    """

    def __init__(self, fits: Mapping[str, int], most: Mapping[str, int] | None = None) -> None:
        self._of: dict[str, _Size] = {}
        for model, size in fits.items():
            ceiling = max(size, (most or fits)[model])
            failed = 1 < size < ceiling
            self._of[model] = _Size(size, ceiling, GROWS_AFTER if failed else TRIED_AFTER, failed)

    def limit(self, model: str) -> int:
        """Return how many inputs a batch of the model may have now."""
        return self._of[model].now

    def shrink(self, model: str, fits: int) -> None:
        """Remember that more than ``fits`` inputs did not fit at once."""
        size = self._of[model]
        if fits >= size.now:
            return
        size.needed = min(GROWS_AFTER_MOST, max(GROWS_AFTER, 2 * size.needed))
        size.now, size.passes, size.failed = fits, 0, True
        log.warning("batch_size_reduced", model=model, max_batch_size=fits)

    def passed(self, model: str, count: int) -> None:
        """A pass with ``count`` inputs has fitted; after enough full ones the size grows."""
        size = self._of[model]
        if count < size.now or size.now >= size.most:
            return
        size.passes += 1
        if size.passes >= size.needed:
            larger = max(size.now + 1, size.now * 5 // 4) if size.failed else 2 * size.now
            size.now, size.passes = min(size.most, larger), 0
            log.info("batch_size_raised", model=model, max_batch_size=size.now)
