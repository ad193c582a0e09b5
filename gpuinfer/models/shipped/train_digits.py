# SPDX-License-Identifier: Apache-2.0
"""Train the shipped digit classifier: ``python -m gpuinfer.models.shipped.train_digits [--out DIR]``.

Data: the 1,797 handwritten digits of 8 x 8 pixels, 0..16, that scikit-learn ships (UCI Optical
Recognition of Handwritten Digits). One fifth, stratified by class, is only used for testing.
The same weights are written as TorchScript, for ``digits``, and as arrays, for the Python model
``digits-photo``, which converts any picture to 8 x 8 pixels and also gets a picture of each digit. Each
model's accuracy is measured as gpuinfer loads it. Training is seeded and uses one CPU thread, so the weights
are the same each time; with ``PYTHONHASHSEED=0`` so are the bytes of the artefacts.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gpuinfer.models import record
from gpuinfer.models.loader import load
from gpuinfer.models.manifest import load_manifest
from gpuinfer.models.repository import ModelFolder

SEED = 20240229
TEST_SHARE = 0.2
EPOCHS = 80
BATCH = 64
#: The command fails if the accuracy on the test images is below this.
LEAST_ACCURACY = {"digits": 0.98, "digits-photo": 0.97}
#: The folder of the Python model, whose code and manifest are written by hand.
PHOTO = Path(__file__).with_name("digits-photo")

MANIFEST = """\
# SPDX-License-Identifier: Apache-2.0
# Written by train_digits.py; shapes are per item.
name = "{name}"
description = "Handwritten digits of 8 x 8 pixels, values 0 to 16; a small convolutional network"
artefact = "{artefact}"
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
    """The data, in two parts without a common image."""

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
    """Move each image by up to one pixel in each direction; the new pixels are dark."""
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
    """Script the model, without debug records, which contain paths of the machine that trained it."""
    buffer, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
    return stripped.getvalue()


def photo(digit: np.ndarray[Any, Any], random: np.random.Generator, *, chalk: bool = False) -> Image.Image:
    """Return a picture of a digit (8, 8) of 0..16, of random size and position: ink on paper, or chalk."""
    side = int(random.integers(60, 160))
    drawn = Image.fromarray(np.round(digit / 16 * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    page = np.zeros((side + int(random.integers(20, 120)), side + int(random.integers(20, 120))))
    top, left = (int(random.integers(8, length - side - 7)) for length in page.shape)
    page[top : top + side, left : left + side] = np.asarray(drawn) / 255
    ground, ink = (30, 220) if chalk else (235, 40)
    values = ground + (ink - ground) * page + random.normal(0, 3, page.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def as_file(picture: Image.Image) -> bytes:
    """Return a picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def photos(split: Split) -> list[bytes]:
    """Return a picture of every test image, alternately as ink on paper and as chalk on a board."""
    random = np.random.default_rng(SEED)
    return [
        as_file(photo(image[0], random, chalk=place % 2 == 1))
        for place, image in enumerate(split.test_images)
    ]


def write_model(folder: Path, artefact: str, content: bytes, split: Split) -> float:
    """Write a model folder, and measure and record the model's accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / artefact).write_bytes(content)
    manifest = MANIFEST.format(name=folder.name, artefact=artefact)
    (folder / "model.toml").write_text(manifest, encoding="utf-8")
    return measure(folder, [*split.test_images.astype(np.float32)], split)


def write_photo_model(folder: Path, model: DigitNet, split: Split) -> float:
    """Write weights and pictures into the Python model's folder, and measure it."""
    if folder != PHOTO:
        shutil.copytree(PHOTO, folder, dirs_exist_ok=True)
    layers = nn.Sequential(*(layer for layer in model.layers if not isinstance(layer, nn.Dropout)))
    weights: dict[str, Any] = {name: tensor.numpy() for name, tensor in layers.state_dict().items()}
    np.savez(folder / "weights.npz", **weights)
    pictures = photos(split)
    for label in range(10):
        place = int(np.flatnonzero(split.test_labels == label)[0])
        (folder / f"photo-{label}.jpg").write_bytes(pictures[place])
    return measure(folder, pictures, split)


def measure(folder: Path, inputs: Sequence[object], split: Split) -> float:
    """Run a model on ``inputs`` made from the test images; write and return its accuracy."""
    loaded = load(ModelFolder(path=folder, manifest=load_manifest(folder)), "cpu")
    results = loaded.finish(loaded.forward(loaded.prepare(inputs)))
    found = np.array([result["class"] for result in results])
    correct = int((found == split.test_labels).sum())
    artefact = folder / loaded.manifest.artefact
    measured = {
        "accuracy": round(correct / len(found), 4),
        "correct": correct,
        "test_images": len(found),
        "train_images": len(split.train_images),
        "seed": SEED,
        "epochs": EPOCHS,
        "sha256": hashlib.sha256(artefact.read_bytes()).hexdigest(),
        "size_bytes": artefact.stat().st_size,
        "torch": torch.__version__.partition("+")[0],
    }
    (folder / "accuracy.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    record.write(folder, replace(record.of(folder, example_ok=True), added_at=""))
    return correct / len(found)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, show_default=True)
def main(out: Path) -> None:
    """Train the digit classifier and write both models and the test images to OUT."""
    split = split_data()
    model = train(split)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "digits_test.npz", images=split.test_images, labels=split.test_labels)
    accuracies = {
        "digits": write_model(out / "digits", "model.pt", torchscript_bytes(model), split),
        PHOTO.name: write_photo_model(out / PHOTO.name, model, split),
    }
    for name, accuracy in accuracies.items():
        click.echo(f"{name}: accuracy {accuracy:.4f} on {len(split.test_labels)} images")
        if accuracy < LEAST_ACCURACY[name]:
            raise click.ClickException(f"{name} must reach an accuracy of {LEAST_ACCURACY[name]:.0%}")


if __name__ == "__main__":
    main()
