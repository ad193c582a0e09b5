# SPDX-License-Identifier: Apache-2.0
"""WAV files become samples, or a clear error."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest

from gpuinfer.errors import InputError
from gpuinfer.models.manifest import Manifest
from gpuinfer.models.sounds import read_wav, resample, wav_to_array
from gpuinfer.models.specs import AudioSpec
from gpuinfer.models.tensors import decode_batch

pytestmark = pytest.mark.unit


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0, channels: int = 1) -> bytes:
    """Write a tone at half of full scale, in 16 bits."""
    at = np.arange(int(rate * seconds)) / rate
    samples = np.round(16384 * np.sin(2 * np.pi * hertz * at)).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())
    return buffer.getvalue()


def riff(code: int, bits: int, content: bytes, channels: int = 1, rate: int = 8000, size: int = -1) -> bytes:
    frame = channels * bits // 8
    head = struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, bits)
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", len(head)) + head
    chunks += b"data" + struct.pack("<I", len(content) if size < 0 else size) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize(
    ("code", "bits", "content"),
    [
        (1, 8, bytes([128, 192, 0])),
        (1, 16, struct.pack("<3h", 0, 1 << 14, -(1 << 15))),
        (1, 24, b"\0\0\0" + b"\0\0\x40" + b"\0\0\x80"),
        (1, 32, struct.pack("<3i", 0, 1 << 30, -(1 << 31))),
        (3, 32, struct.pack("<3f", 0, 0.5, -1)),
        (3, 64, struct.pack("<3d", 0, 0.5, -1)),
    ],
)
def test_each_format(code: int, bits: int, content: bytes) -> None:
    """Silence, half and full scale are the same in all; a chunk of other things is passed over."""
    samples, rate = read_wav(riff(code, bits, content), "inputs")
    assert (samples.tolist(), rate) == ([[0.0, 0.5, -1.0]], 8000)
    assert samples.dtype == np.float32


def test_another_rate_is_the_same_sound() -> None:
    """A tone of 44.1 kHz at 16 kHz is that tone, away from its ends; one above half the rate is silence."""
    audio = AudioSpec(rate=16000, channels=1)
    made = wav_to_array(tone(44100), audio, "inputs")
    wanted = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000) / 2
    assert made.shape == (1, 8000)
    assert np.abs(made[0] - wanted)[200:-200].max() < 0.01
    assert np.abs(wav_to_array(tone(44100, hertz=12000), audio, "inputs"))[0, 200:-200].max() < 0.01


def test_channels() -> None:
    """Mixed down to one, one for several; another number is refused."""
    stereo = tone(8000, 0.1, channels=2)
    mono = wav_to_array(stereo, AudioSpec(rate=8000, channels=1), "x")
    assert np.array_equal(mono, wav_to_array(tone(8000, 0.1), AudioSpec(rate=8000, channels=1), "x"))
    assert wav_to_array(tone(8000, 0.1), AudioSpec(rate=8000, channels=2), "x").shape == (2, 800)
    with pytest.raises(InputError, match="has 2 channels, but the model takes 4"):
        wav_to_array(stereo, AudioSpec(rate=8000, channels=4), "x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has no WAV header"),
        (b"ID3 a song", "it has no WAV header"),
        (tone(8000)[:30], "unpack|contains no samples"),
        (tone(8000)[:-10], "it is incomplete: 7990 of 8000 bytes"),
        (riff(1, 16, b""), "contains no samples"),
        (riff(1, 12, b"abcd"), "12 bits. is not supported"),
        (riff(85, 16, b"abcd"), "format .85"),
        (riff(1, 16, b"abcd", rate=0), "0 samples per second"),
        (riff(1, 16, b"abcd", channels=0), "0 channels"),
        (riff(3, 32, struct.pack("<f", float("nan"))), "NaN or infinite"),
    ],
)
def test_what_is_no_sound(data: bytes, words: str) -> None:
    """An InputError with the field, whatever the file's header promises."""
    with pytest.raises(InputError, match=words) as caught:
        read_wav(data, "inputs.voice")
    assert caught.value.field == "inputs.voice"


def test_a_pipe_s_end_is_not_known() -> None:
    """What a program writes into a pipe says that its samples go on for ever."""
    samples, _ = read_wav(riff(1, 16, b"\0\0" * 5, size=0xFFFFFFFF), "x")
    assert samples.shape == (1, 5)


def test_a_few_bytes_do_not_become_gigabytes() -> None:
    """A sound of 100 samples per second for a model that takes 768,000."""
    with pytest.raises(InputError, match="makes more than"):
        resample(np.zeros((1, 20_000), np.float32), 100, 768_000, "inputs")


def test_a_tensor_from_a_sound() -> None:
    """One file that is none fails alone; its neighbours become tensors of the manifest's shape."""
    voice = {"name": "voice", "shape": [-1], "audio": {"rate": 8000, "channels": 1}}
    manifest = Manifest.model_validate(
        {"name": "m", "artefact": "m.pt", "inputs": [voice], "outputs": [{"name": "y"}]}
    )
    good, bad, array = decode_batch(manifest, [tone(8000, 0.1), {"b64": "AAAA"}, [0.5, 1.0]])
    assert isinstance(good, tuple)
    assert isinstance(array, tuple)
    assert (good[0].shape, array[0].tolist()) == ((800,), [0.5, 1.0])
    assert good[0].dtype == np.float32
    assert isinstance(bad, InputError)
    assert bad.field == "inputs"
