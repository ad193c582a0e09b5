# SPDX-License-Identifier: Apache-2.0
"""JPEG photos through client, queue, decoding to 224 x 224 and a small network: images a second, and why."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import nn

from gpuinfer.models.images import image_to_array
from gpuinfer.models.manifest import load_manifest
from tests.bench.lines import Line, Sizes
from tests.bench.stacks import Fleet
from tests.models_for_tests import write_model

#: Different photos; each is sent many times.
DIFFERENT = 16
_SIZE = (1280, 960)
TABLES = """
max_batch_size = 32
[[inputs]]
name = "photo"
shape = [3, 224, 224]
image = { mode = "RGB", size = [224, 224], scale = 0.00392156862745098, mean = [0.485, 0.456, 0.406], \
std = [0.229, 0.224, 0.225] }
[[outputs]]
name = "class"
kind = "classification"
activation = "softmax"
"""


def network() -> nn.Module:
    """Return a small convolutional network for (N, 3, 224, 224)."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def made() -> list[bytes]:
    """Return JPEG files of 1280 x 960: soft shapes with some noise, as photos have it."""
    random = np.random.default_rng(1)
    files = []
    for _ in range(DIFFERENT):
        coarse = random.integers(0, 256, (30, 40, 3), np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = (soft + random.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def photos(folder: Path, sizes: Sizes) -> Iterator[Line]:
    """Send photos as files, and wait for all results; then what each step takes by itself."""
    model = write_model(folder / "models" / "photos", network(), TABLES)
    files = made()
    rates, sent, device, redis = [], [], [], []
    with Fleet(folder, "photos", workers=1) as ours:
        worker = ours.start()
        ours.client.results(ours.client.submit_many(files, model="photos"), 120)
        for _ in range(sizes.repeats):
            before, logged = ours.cpu_seconds()["Redis"], len(worker.lines())
            began, ids = time.perf_counter(), []
            for _ in range(max(1, sizes.images // DIFFERENT // 2)):
                ids += ours.client.submit_many(files, model="photos")
            sent.append((time.perf_counter() - began) / len(ids))
            ours.client.results(ids, 120)
            rates.append(len(ids) / (time.perf_counter() - began))
            redis.append((ours.cpu_seconds()["Redis"] - before) / len(ids))
            device.append(_device_s(worker.lines()[logged:], len(ids)))
    kilobytes = sum(map(len, files)) / len(files) / 1024
    what = f"JPEG photos of 1280 x 960, {kilobytes:.0f} KiB"
    yield Line(what=what, unit="1/s", ours=median(rates), repeats=(rates, ()))
    yield Line(what="  the client, a photo", unit="ms", ours=1000 * median(sent))
    yield Line(what="  Redis, a photo", unit="ms", ours=1000 * median(redis))
    yield Line(what="  decoding, a photo", unit="ms", ours=1000 * _decoding_s(model, files, sizes.repeats))
    yield Line(what="  the pass, a photo", unit="ms", ours=1000 * median(device))


def _device_s(lines: Sequence[str], count: int) -> float:
    """Return the seconds that batches have taken by the worker's log, a photo."""
    done = [json.loads(line) for line in lines if '"batch_done"' in line]
    return sum(float(line["duration_ms"]) for line in done) / 1000 / count


def _decoding_s(model: Path, files: Sequence[bytes], repeats: int) -> float:
    """Return the seconds that one photo's way to a tensor takes in one thread."""
    (spec,) = load_manifest(model).inputs
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        for file in files:
            image_to_array(file, spec)
        took.append((time.perf_counter() - began) / len(files))
    return median(took)
