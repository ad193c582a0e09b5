# SPDX-License-Identifier: Apache-2.0
"""Turns a WAV file into samples: float32 in -1..1, (channels, samples), at the rate that a model wants.

Reads PCM of 8, 16, 24 and 32 bits and floats of 32 and 64 (RIFF, Microsoft's multimedia standards update).
Resamples by the Fourier transform: exact for frequencies that both rates can represent, without aliasing.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuinfer.errors import InputError
from gpuinfer.models.specs import AudioSpec

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
#: The sizes that programs write into a file if its length is not known, as their output is a pipe.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF)
#: Maximum samples of all channels together, before and after resampling: about an hour at 16 kHz.
MAX_SAMPLES = 64 * 1024 * 1024
_RATES = range(100, 768_001)
_MAX_CHANNELS = 64
#: Zeros around the sound while it is resampled, so that its end does not ring into its beginning.
_PADDING_S = 0.05


@dataclass(frozen=True, slots=True)
class _Format:
    code: int
    channels: int
    rate: int
    bits: int


def wav_to_array(data: bytes | memoryview, audio: AudioSpec, field: str) -> NDArray[Any]:
    """Return the samples of a WAV file, (``audio.channels``, samples) at ``audio.rate``, as float32.

    Several channels are mixed down to one, one is repeated for several. Raises InputError.
    """
    samples, rate = read_wav(data, field)
    channels = len(samples)
    if channels != audio.channels:
        if audio.channels == 1:
            samples = samples.mean(axis=0, keepdims=True)
        elif channels == 1:
            samples = np.repeat(samples, audio.channels, axis=0)
        else:
            raise InputError(f"has {channels} channels, but the model takes {audio.channels}", field)
    if rate != audio.rate:
        samples = resample(samples, rate, audio.rate, field)
    return np.ascontiguousarray(samples, np.float32)


def read_wav(data: bytes | memoryview, field: str) -> tuple[NDArray[Any], int]:
    """Return the samples of a WAV file, (channels, samples) in -1..1, and their rate. Raises InputError."""
    data = memoryview(data)
    try:
        found, samples = _chunks(data)
        return _decoded(samples, found), found.rate
    except (ValueError, struct.error) as exc:
        raise InputError(f"cannot be read as a WAV file: {exc}", field) from None


def _chunks(data: memoryview) -> tuple[_Format, memoryview]:
    if bytes(data[:4]) != b"RIFF" or bytes(data[8:12]) != b"WAVE":
        raise ValueError("it has no WAV header")
    found: _Format | None = None
    at = 12
    while at + 8 <= len(data):
        name, size = bytes(data[at : at + 4]), struct.unpack_from("<I", data, at + 4)[0]
        content = data[at + 8 : at + 8 + size]
        if name == b"fmt ":
            found = _format(content)
        elif name == b"data":
            if found is None:
                raise ValueError("its samples precede their format")
            if len(content) < size and size not in _UNKNOWN_SIZES:
                raise ValueError(f"it is incomplete: {len(content)} of {size} bytes of samples")
            return found, content if size else data[at + 8 :]
        at += 8 + size + size % 2
    raise ValueError("it contains no samples")


def _format(content: memoryview) -> _Format:
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content)
    if code == _EXTENSIBLE:
        code = struct.unpack_from("<H", content, 24)[0]
    if channels not in range(1, _MAX_CHANNELS + 1):
        raise ValueError(f"it has {channels} channels")
    if rate not in _RATES:
        raise ValueError(f"it has {rate} samples per second; must be {_RATES[0]} to {_RATES[-1]}")
    if (code, bits) not in _READERS:
        raise ValueError(f"its format ({code}, {bits} bits) is not supported; must be PCM or float")
    return _Format(code, channels, rate, bits)


def _decoded(content: memoryview, found: _Format) -> NDArray[Any]:
    frame = found.channels * found.bits // 8
    content = content[: len(content) // frame * frame]
    if not content:
        raise ValueError("it contains no samples")
    if len(content) * 8 // found.bits > MAX_SAMPLES:
        raise ValueError(f"it contains more than {MAX_SAMPLES} samples")
    samples: NDArray[Any] = _READERS[found.code, found.bits](content)
    if not np.isfinite(samples).all():
        raise ValueError("it contains samples that are NaN or infinite")
    return samples.reshape(-1, found.channels).T


def _integers(dtype: str, zero: float, scale: float) -> Any:
    return lambda content: ((np.frombuffer(content, dtype) - zero) / scale).astype(np.float32)


def _of_24_bits(content: memoryview) -> NDArray[Any]:
    wide = np.zeros((len(content) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)


_READERS: dict[tuple[int, int], Any] = {
    (_PCM, 8): _integers("u1", 128.0, 128.0),
    (_PCM, 16): _integers("<i2", 0.0, 2.0**15),
    (_PCM, 24): _of_24_bits,
    (_PCM, 32): _integers("<i4", 0.0, 2.0**31),
    (_FLOAT, 32): lambda content: np.frombuffer(content, "<f4").astype(np.float32),
    (_FLOAT, 64): lambda content: np.frombuffer(content, "<f8").astype(np.float32),
}


def resample(samples: NDArray[Any], rate: int, wanted: int, field: str) -> NDArray[Any]:
    """Return (channels, samples) at another rate. Raises InputError if that would be too many."""
    length = samples.shape[1]
    result = -(-length * wanted // rate)
    if result * len(samples) > MAX_SAMPLES:
        raise InputError(f"makes more than {MAX_SAMPLES} samples at {wanted} a second", field)
    common = math.gcd(rate, wanted)
    step, made = rate // common, wanted // common
    blocks = -(-(length + int(rate * _PADDING_S)) // step)
    spectrum = np.fft.rfft(samples.astype(np.float64), blocks * step, axis=1)
    kept = spectrum[:, : blocks * made // 2 + 1]
    whole: NDArray[Any] = np.fft.irfft(kept, blocks * made, axis=1) * (made / step)
    return whole[:, :result].astype(np.float32)
