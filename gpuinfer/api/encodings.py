# SPDX-License-Identifier: Apache-2.0
"""Compressed bodies: ``Content-Encoding: gzip`` or ``deflate``, unpacked up to the size of a plain body."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable

from gpuinfer.api.holding import SMALL_BYTES
from gpuinfer.errors import MalformedEncoding, PayloadTooLarge, UnsupportedEncoding

#: Content-Encoding -> zlib's window bits for it.
_FORMATS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
#: Maximum gzip members in one body; each costs a copy of the remaining bytes.
_MAX_MEMBERS = 16
#: Larger compressed bodies are unpacked in a thread, so as not to block other requests.
_IN_A_THREAD = 16 * 1024


def coding_of(text: str) -> str | None:
    """Return the encoding of a Content-Encoding header; None: not compressed. Raises UnsupportedEncoding."""
    coding = text.strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _FORMATS:
        raise UnsupportedEncoding(
            f"{text[:40]!r} is not supported; send the body uncompressed, or as gzip or deflate",
            "Content-Encoding",
        )
    return coding


async def unpacked(body: bytes, coding: str, limit: int, take: Callable[[int], Awaitable[None]]) -> bytes:
    """Return the unpacked body. ``limit``: its maximum bytes; unpacking stops there.

    ``take`` reserves memory for a total number of bytes before they are unpacked; it is not called for a
    small body. Raises PayloadTooLarge, MalformedEncoding, and the errors of ``take``.
    """
    work = Unpacking(body, coding, limit)
    room = max(SMALL_BYTES, work.announced) + 1  # one more, to reach the end of the stream
    if room == SMALL_BYTES + 1:
        if len(body) <= _IN_A_THREAD:
            work.go_on(min(room, limit + 1))
        else:
            await asyncio.to_thread(work.go_on, min(room, limit + 1))
        room *= 2
    while not work.done:
        await take(min(room, limit + 1))
        await asyncio.to_thread(work.go_on, min(room, limit + 1))
        room *= 2
    return work.body()


class Unpacking:
    """Unpacks a body step by step. ``limit``: maximum bytes of the unpacked body."""

    def __init__(self, body: bytes, coding: str, limit: int) -> None:
        self._coding, self._limit = coding, limit
        self._bits = _FORMATS[coding]
        if coding == "deflate" and not _has_zlib_header(body):
            self._bits = -15  # raw deflate, which some clients send under that name
        #: Unpacked size according to the gzip trailer.
        self.announced = int.from_bytes(body[-4:], "little") if self._bits == _FORMATS["gzip"] else 0
        self._left = body
        self._unpacker = zlib.decompressobj(self._bits)
        self._members = 1
        self._parts: list[bytes] = []
        self._size = 0
        self.done = False

    def go_on(self, most: int) -> None:
        """Unpack up to ``most`` bytes in total. Raises PayloadTooLarge, MalformedEncoding."""
        while not self.done and self._size < most:
            try:
                part = self._unpacker.decompress(self._left, most - self._size)
            except zlib.error as exc:
                raise MalformedEncoding(
                    f"the body is not {self._coding}: {exc}", "Content-Encoding"
                ) from None
            if part:
                self._parts.append(part)
            self._size += len(part)
            if self._size > self._limit:
                raise PayloadTooLarge(f"the body unpacks to more than {self._limit} bytes", "inputs")
            if self._unpacker.eof:
                self._next_member()
                continue
            self._left = self._unpacker.unconsumed_tail
            if not self._left and not part:
                raise MalformedEncoding(
                    f"the body is incomplete: its {self._coding} data has no end", "Content-Encoding"
                )

    def _next_member(self) -> None:
        self._left = self._unpacker.unused_data
        self.done = not self._left
        if self.done:
            return
        if self._members == _MAX_MEMBERS:
            raise MalformedEncoding(
                f"the body is more than {_MAX_MEMBERS} {self._coding} files in a row", "Content-Encoding"
            )
        self._members += 1
        self._unpacker = zlib.decompressobj(self._bits)

    def body(self) -> bytes:
        """Return the unpacked body, once it is complete."""
        return b"".join(self._parts)


def _has_zlib_header(body: bytes) -> bool:
    return len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
