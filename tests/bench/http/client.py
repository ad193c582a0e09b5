# SPDX-License-Identifier: Apache-2.0
"""A small HTTP client for load: connections that are kept, and the time each answer takes."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple


class Answer(NamedTuple):
    """What came, and after how many seconds."""

    status: int
    body: bytes
    seconds: float


class Connections:
    """Connections to one server; a request takes an idle one, or opens another."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Send a request and return its answer. The server must say a Content-Length."""
        began = time.perf_counter()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._place)
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        content = await reader.readexactly(length)
        self._idle.append((reader, writer))
        return Answer(int(first.split()[1]), content, time.perf_counter() - began)

    async def open(self, count: int) -> None:
        """Have so many idle connections."""
        while len(self._idle) < count:
            self._idle.append(await asyncio.open_connection(*self._place))

    def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop()[1].close()


def percentile(values: list[float], share: float) -> float:
    """Return the value that ``share`` of these are not above; NaN without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
