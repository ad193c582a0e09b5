# SPDX-License-Identifier: Apache-2.0
"""The reference results: the model called directly, image by image, without queue, batches or HTTP.

Runs as a process, ``python -m gpuinfer.demo.direct FILE``, so that the demo itself does not load torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.models.loader import load
from gpuinfer.models.repository import Repository
from gpuinfer.models.shipped import load_test_images
from gpuinfer.settings import load_settings


def classify(name: str) -> list[dict[str, Any]]:
    """Run every test image alone through the model, on the CPU; return the results in order."""
    images, _ = load_test_images()
    model = load(Repository(()).get(name), "cpu", threads=1)
    model.warm_up(1)
    rendered: list[dict[str, Any]] = []
    for item in model.prepare(list(images)):
        if isinstance(item, Exception):
            raise item
        rendered += model.finish(model.forward([item]))
    return rendered


def main() -> None:
    """Write the result of ``classify`` as JSON, atomically."""
    target = Path(sys.argv[1])
    scratch = target.with_suffix(".part")
    scratch.write_bytes(orjson.dumps(classify(load_settings().worker.models[0])))
    scratch.rename(target)


if __name__ == "__main__":
    main()
