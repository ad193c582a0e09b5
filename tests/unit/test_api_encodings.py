# SPDX-License-Identifier: Apache-2.0
"""Compressed bodies are unpacked, up to the size of a plain one."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import pytest

from gpuinfer.api.encodings import Unpacking, coding_of, unpacked
from gpuinfer.api.holding import SMALL_BYTES
from gpuinfer.errors import MalformedEncoding, PayloadTooLarge, UnsupportedEncoding

pytestmark = pytest.mark.unit


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    work = Unpacking(body, coding, limit)
    work.go_on(limit + 1)
    assert work.done
    return work.body()


class Room:
    """Notes what room was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def take(self, size: int) -> None:
        self.asked.append(size)


TEXT = b'{"inputs": [1, 2, 3]}' * 100


@pytest.mark.parametrize(
    ("named", "coding"), [("", None), ("identity", None), ("GZIP", "gzip"), (" x-gzip", "x-gzip")]
)
def test_a_coding_by_its_name(named: str, coding: str | None) -> None:
    """In any case; what is none is none."""
    assert coding_of(named) == coding


@pytest.mark.parametrize("named", ["br", "zstd", "gzip, gzip", "x" * 500])
def test_another_coding_is_refused(named: str) -> None:
    """By 415, and with those that are read."""
    with pytest.raises(UnsupportedEncoding, match="uncompressed, or as gzip or deflate") as caught:
        coding_of(named)
    assert (caught.value.http_status, caught.value.field) == (415, "Content-Encoding")


def _raw(text: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(text) + packer.flush()


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gzip.compress(TEXT), "gzip"),
        (gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:]), "x-gzip"),
        (zlib.compress(TEXT), "deflate"),
        (_raw(TEXT), "deflate"),
    ],
)
def test_what_is_packed_comes_out(body: bytes, coding: str) -> None:
    """To the last byte that is allowed; files in a row are one; deflate has a header of zlib's, or none."""
    assert unpack(body, coding, len(TEXT)) == TEXT
    with pytest.raises(PayloadTooLarge, match=f"unpacks to more than {len(TEXT) - 1} bytes") as caught:
        unpack(body, coding, len(TEXT) - 1)
    assert caught.value.http_status == 413


async def test_a_bomb_is_not_unpacked() -> None:
    """64 MiB in 64 KiB: in a thread, and no more of it than a body may have."""
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    room = Room()
    with pytest.raises(PayloadTooLarge):
        await unpacked(bomb, "gzip", 1024 * 1024, room.take)
    assert room.asked == [1024 * 1024 + 1]


@pytest.mark.parametrize("size", [10, SMALL_BYTES, SMALL_BYTES + 2, 1_000_000])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "two"])
async def test_room_is_taken_before_it_is_used(size: int, coding: str) -> None:
    """Of a gzip file as much as its end says, at once; of others more and more; of a small body none."""
    text = np.random.default_rng(1).bytes(size // 2) + bytes(size - size // 2)
    packed = {
        "gzip": gzip.compress(text),
        "deflate": zlib.compress(text),
        "two": gzip.compress(text[:-7]) + gzip.compress(text[-7:]),
    }[coding]
    room = Room()
    body = await unpacked(packed, coding.replace("two", "gzip"), 1_000_000, room.take)
    assert body == text
    if size <= SMALL_BYTES:
        assert room.asked == []
    elif coding == "gzip":
        assert room.asked == [size + 1]
    else:
        assert room.asked[0] == 2 * (SMALL_BYTES + 1)
        assert size <= room.asked[-1] <= 2 * size


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is incomplete"),
        (TEXT, "is not gzip"),
        (gzip.compress(TEXT)[:-3], "is incomplete"),
        (gzip.compress(TEXT) + b"more", "is not gzip"),
        (gzip.compress(b"") * 1000, "more than 16 gzip files"),
    ],
)
def test_what_is_not_so_packed_is_refused(body: bytes, said: str) -> None:
    """By 400; many tiny files in a row would take time without end."""
    with pytest.raises(MalformedEncoding, match=said) as caught:
        unpack(body, "gzip", 10_000)
    assert caught.value.http_status == 400
