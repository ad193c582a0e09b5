# SPDX-License-Identifier: Apache-2.0
"""Compressed bodies: ``Content-Encoding: gzip`` or ``deflate``, unpacked up to the size of a plain body."""

from __future__ import annotations

import asyncio
import zlib

from gpuinfer.errors import MalformedEncoding, PayloadTooLarge, UnsupportedEncoding

#: Content-Encoding -> zlib's window bits for it.
_FORMATS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
#: A gzip file may be several in a row; each costs a copy of what is left.
_MAX_MEMBERS = 16
#: More compressed bytes than this are unpacked in a thread, so that other requests are served meanwhile.
_IN_A_THREAD = 16 * 1024


def coding_of(text: str) -> str | None:
    """Return the coding that a Content-Encoding names; None: plain. Raises UnsupportedEncoding."""
    coding = text.strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in _FORMATS:
        raise UnsupportedEncoding(
            f"{text[:40]!r} is not read; send the body plain, or as gzip or deflate", "Content-Encoding"
        )
    return coding


async def unpacked(body: bytes, coding: str, limit: int) -> bytes:
    """Return the plain body. ``limit``: its most bytes; nothing beyond them is unpacked.

    Raises PayloadTooLarge, MalformedEncoding.
    """
    if len(body) <= _IN_A_THREAD:
        return unpack(body, coding, limit)
    return await asyncio.to_thread(unpack, body, coding, limit)


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    """Do as ``unpacked`` does, here and now."""
    bits = _FORMATS[coding]
    if coding == "deflate" and not _has_zlib_header(body):
        bits = -15  # what some clients send by that name
    found = bytearray()
    left = body
    for _ in range(_MAX_MEMBERS):
        unpacker = zlib.decompressobj(bits)
        try:
            found += unpacker.decompress(left, limit - len(found) + 1)
        except zlib.error as exc:
            raise MalformedEncoding(f"the body is not {coding}: {exc}", "Content-Encoding") from None
        if len(found) > limit:
            raise PayloadTooLarge(f"the body unpacks to more than {limit} bytes", "inputs")
        if not unpacker.eof:
            raise MalformedEncoding(f"the body is cut off: its {coding} has no end", "Content-Encoding")
        left = unpacker.unused_data
        if not left:
            return bytes(found)
    raise MalformedEncoding(
        f"the body is more than {_MAX_MEMBERS} {coding} files in a row", "Content-Encoding"
    )


def _has_zlib_header(body: bytes) -> bool:
    return len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
