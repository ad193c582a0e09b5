# SPDX-License-Identifier: Apache-2.0
"""Train the shipped digit classifier: ``python -m gpuinfer.models.shipped.train_digits [--out DIR]``.

Data: the 1,797 handwritten digits of 8 x 8 pixels, 0..16, that scikit-learn ships (UCI Optical
Recognition of Handwritten Digits). One fifth, stratified by class, is held out and never trained on.
The same weights are written as TorchScript and as torch.export; the accuracy beside each is measured
on the artefact as the appliance loads it. Seeded, on the CPU, on one thread: the weights come out the
same each time, and with ``PYTHONHASHSEED=0`` so do the bytes of the artefacts.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder

SEED = 20240229
TEST_SHARE = 0.2
EPOCHS = 80
BATCH = 64
#: Less than this on the test split is an error.
LEAST_ACCURACY = 0.98

MANIFEST = """\
# SPDX-License-Identifier: Apache-2.0
# Written by train_digits.py; shapes are per item.
name = "{name}"
description = "Handwritten digits of 8 x 8 pixels, values 0 to 16; a small convolutional network"
artefact = "{artefact}"
sha256 = "{sha256}"
max_batch_size = 256
soft_time_limit_s = 5
hard_time_limit_s = 10

[[inputs]]
name = "image"
dtype = "float32"
shape = [1, 8, 8]

# How an image file becomes this input: 0..255 to 0..16, bright strokes on a dark ground.
[inputs.image]
mode = "L"
size = [8, 8]
layout = "CHW"
scale = 0.06274509803921569

[[outputs]]
name = "digit"
kind = "classification"
dtype = "float32"
shape = [10]
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
activation = "softmax"
"""


class DigitNet(nn.Module):
    """Two convolutions, one pooling, one linear layer; float32 (N, 1, 8, 8) of 0..16 to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image / 16.0)
        return scores


@dataclass(frozen=True)
class Split:
    """The data, in two parts that share no image."""

    train_images: Tensor
    train_labels: Tensor
    test_images: np.ndarray[Any, np.dtype[np.uint8]]
    test_labels: np.ndarray[Any, np.dtype[np.uint8]]


def split_data() -> Split:
    digits = load_digits()
    images = digits.images.astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = digits.target.astype(np.uint8)
    a, b, c, d = train_test_split(images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SEED)
    return Split(torch.from_numpy(a).float(), torch.from_numpy(c).long(), b, d)


def _shifted(images: Tensor, random: torch.Generator) -> Tensor:
    """Move each image by up to one pixel each way; what moves in is dark."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2), generator=random).tolist()
    return torch.stack(
        [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets, strict=True)]
    )


def train(split: Split, epochs: int = EPOCHS) -> DigitNet:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    random = torch.Generator().manual_seed(SEED)
    model = DigitNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(split.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(split.train_images), generator=random).split(BATCH):  # type: ignore[no-untyped-call]
            scores = model(_shifted(split.train_images[chosen], random))
            loss = nn.functional.cross_entropy(scores, split.train_labels[chosen], label_smoothing=0.02)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() * len(chosen)
        click.echo(f"epoch {epoch:3d}/{epochs}  loss {total / len(split.train_images):.4f}")
    return model.eval()


def torchscript_bytes(model: DigitNet) -> bytes:
    """Script the model, without the debug records, which hold the paths of the machine that trained it."""
    buffer, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
    return stripped.getvalue()


def export_bytes(model: DigitNet) -> bytes:
    """Export the model with a free batch dimension, without stack traces for the same reason."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes={"image": {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def write_model(folder: Path, artefact: str, content: bytes, split: Split) -> float:
    """Write a model folder, measure the artefact as the appliance runs it, and write that down."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / artefact).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = MANIFEST.format(name=folder.name, artefact=artefact, sha256=digest)
    (folder / "model.toml").write_text(manifest, encoding="utf-8")
    loaded = load(ModelFolder(path=folder, manifest=load_manifest(folder)), "cpu")
    outputs = loaded.forward([(image,) for image in split.test_images.astype(np.float32)])
    found = np.array([scores.argmax() for (scores,) in outputs])
    correct = int((found == split.test_labels).sum())
    accuracy = correct / len(found)
    record = {
        "accuracy": round(accuracy, 4),
        "correct": correct,
        "test_images": len(found),
        "train_images": len(split.train_images),
        "seed": SEED,
        "epochs": EPOCHS,
        "sha256": digest,
        "size_bytes": len(content),
        "torch": torch.__version__.partition("+")[0],
    }
    (folder / "accuracy.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return accuracy


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, show_default=True)
def main(out: Path) -> None:
    """Train the digit classifier and write both model folders and the test images to OUT."""
    split = split_data()
    model = train(split)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "digits_test.npz", images=split.test_images, labels=split.test_labels)
    formats = (
        ("digits", "model.pt", torchscript_bytes(model)),
        ("digits-export", "model.pt2", export_bytes(model)),
    )
    for name, artefact, content in formats:
        accuracy = write_model(out / name, artefact, content, split)
        click.echo(
            f"{name}: {len(content)} bytes, accuracy {accuracy:.4f} on {len(split.test_labels)} images"
        )
        if accuracy < LEAST_ACCURACY:
            raise click.ClickException(f"{name} misses the {LEAST_ACCURACY:.0%} it must reach")


if __name__ == "__main__":
    main()
