# SPDX-License-Identifier: Apache-2.0
"""A ``Surface`` without a GPU: what streams are given runs as late as CUDA might run it.

That is when somebody waits for it. What is read too early is garbage, and so what waits for nothing shows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

GARBAGE = 0xA5


@dataclass
class Stream:
    """Runs what it is given in order, when an event of it is waited for."""

    name: str
    given: deque[Callable[[], object]] = field(default_factory=deque)
    count: int = 0
    ran: int = 0

    def give(self, call: Callable[[], object]) -> None:
        self.given.append(call)
        self.count += 1

    def run_until(self, count: int) -> None:
        while self.ran < count:
            call = self.given.popleft()
            self.ran += 1
            call()


@dataclass(frozen=True)
class Event:
    stream: Stream
    count: int


class FakeCuda:
    """Records the calls, in ``calls``; ``launch`` is a kernel's."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._compute = Stream("compute")
        self._names = iter(("in", "out"))
        self._here = threading.local()
        #: Where the device's memory begins, and that memory: none of it is ever given out twice.
        self._device: dict[int, torch.Tensor] = {}
        self._lock = threading.RLock()
        #: Raised by the next ``finish``, once.
        self.failure: RuntimeError | None = None

    def _say(self, *words: str) -> None:
        self.calls.append(" ".join(words))

    def stream(self) -> Stream:
        return Stream(next(self._names))

    def current(self) -> Stream:
        stream: Stream = getattr(self._here, "stream", self._compute)
        return stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current(), stream
        yield
        self._here.stream = before

    def record(self, stream: Stream) -> Event:
        self._say("record", stream.name)
        return Event(stream, stream.count)

    def wait(self, stream: Stream, event: Event) -> None:
        self._say(stream.name, "waits for", event.stream.name)
        stream.give(lambda: event.stream.run_until(event.count))

    def finish(self, event: Event) -> None:
        self._say("host waits for", event.stream.name)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        with self._lock, torch.inference_mode():
            event.stream.run_until(event.count)

    def happened(self, event: Event) -> bool:
        """Tell whether nobody need wait for an event any more."""
        return event.stream.ran >= event.count

    def page_locked(self, count: int) -> torch.Tensor:
        self._say("lock")
        return torch.full((count,), GARBAGE, dtype=torch.uint8)

    def empty_like(self, source: torch.Tensor) -> torch.Tensor:
        memory = torch.full((source.numel() * source.element_size(),), GARBAGE, dtype=torch.uint8)
        self._device[memory.data_ptr()] = memory
        return memory.view(source.dtype).view(source.shape)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._say("copy on", self.current().name)
        self.current().give(lambda: target.copy_(source))

    def away(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self._device

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        assert self.away(tensor)
        self._say("keep for", stream.name)

    def compute(
        self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return what ``call`` makes of ``x``, in its shape: written once it has run, as a kernel does."""
        self._say("compute")
        out = self.empty_like(torch.empty(x.shape, dtype=dtype or x.dtype))
        self.current().give(lambda: out.copy_(call(x)))
        return out

    def work(self) -> None:
        """Give the compute stream something that takes long."""
        self.current().give(lambda: None)
