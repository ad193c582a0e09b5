# SPDX-License-Identifier: Apache-2.0
"""The contract of ``models.copies``: what holds on a GPU, and on the fake that stands for one."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from gpuinfer.models.copies import Copies, Host, Surface


class CopiesContract:
    """``surface`` is a fixture; ``compute``, ``work`` and ``happened`` are the device's."""

    def compute(self, surface: Any, x: torch.Tensor) -> torch.Tensor:
        """Double ``x`` on the device."""
        raise NotImplementedError

    def work(self, surface: Any) -> None:
        """Have the device compute for a second or so."""
        raise NotImplementedError

    def happened(self, surface: Any, event: Any) -> bool:
        raise NotImplementedError

    def _filled(self, copies: Copies, values: Any) -> Host:
        array = np.asarray(values)
        host = copies.host(array.shape, torch.from_numpy(array).dtype)
        host.array[...] = array
        return host

    @pytest.mark.parametrize("most_bytes", [1 << 20, 0])
    def test_there_and_back(self, surface: Surface, most_bytes: int) -> None:
        """What is sent is computed with once it has arrived, and read once it has landed; also with memory
        that is not page-locked."""
        copies = Copies(surface, most_bytes)
        for dtype in ("float32", "float64", "float16", "int64", "uint8"):
            values = np.arange(12).reshape(3, 4).astype(dtype)
            arrival = copies.send([self._filled(copies, values)])
            (tensor,) = copies.arrive(arrival)
            doubled = self.compute(surface, tensor)
            assert copies.away(doubled)
            (array,), event = copies.fetch([doubled], copies.computed())
            copies.land(event)
            np.testing.assert_array_equal(array, 2 * values)

    def test_batches_in_flight_do_not_meet(self, surface: Surface) -> None:
        """Each is sent while the one before it runs, and read after the next has been launched."""
        copies = Copies(surface)
        sent = copies.send([self._filled(copies, np.full(1000, 0.0))])
        waiting: tuple[Any, Any] | None = None
        for number in range(20):
            (tensor,) = copies.arrive(sent)
            doubled = self.compute(surface, tensor)
            size = 1000 - 10 * number
            sent = copies.send([self._filled(copies, np.full(size, float(number + 1)))])
            if waiting is not None:
                copies.land(waiting[1])
                assert set(waiting[0].tolist()) == {2.0 * (number - 1)}
            (array,), event = copies.fetch([doubled], copies.computed())
            waiting = array, event

    def test_copies_in_do_not_wait_for_what_is_computed(self, surface: Surface) -> None:
        """They are on the device while it still works at something else."""
        copies = Copies(surface)
        self.work(surface)
        busy = surface.record(surface.current())
        arrival = copies.send([self._filled(copies, np.arange(1000.0))])
        surface.finish(arrival.event)
        assert not self.happened(surface, busy)
        surface.finish(busy)

    def test_page_locked_memory_is_bounded(self, surface: Surface) -> None:
        """What is beyond the bound is plain; what is let go of makes room."""
        copies = Copies(surface, 10_000)
        kept = [copies.host((1000,), torch.float32) for _ in range(5)]
        assert len(copies._locked) == 2
        held = weakref.ref(kept[0].array)
        del kept
        assert held() is None
        copies.host((2000,), torch.float32)
        assert len(copies._locked) == 1
