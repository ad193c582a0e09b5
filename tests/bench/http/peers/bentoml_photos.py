# SPDX-License-Identifier: Apache-2.0
"""The network for photos on BentoML: a form with the file. Runs in BentoML's environment."""

# mypy: ignore-errors

import os

import bentoml
import numpy as np
import torch
from PIL.Image import Image

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


@bentoml.service(workers=1)
class Photos:
    def __init__(self):
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"])

    @bentoml.api
    def predict(self, photo: Image) -> int:
        image = photo.convert("RGB").resize((224, 224))
        x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD
        with torch.inference_mode():
            return int(self.model(x.unsqueeze(0)).argmax(1)[0])


if __name__ == "__main__":
    command = ["bentoml", "serve", "bentoml_photos:Photos", "--host", "127.0.0.1"]
    os.execvp(command[0], [*command, "--port", os.environ["BENCH_PORT"]])  # noqa: S606
