# SPDX-License-Identifier: Apache-2.0
"""The network for photos on mosec: the body is the file. Runs in mosec's environment."""

# mypy: ignore-errors

import io
import os

import numpy as np
import torch
from mosec import Server, Worker
from PIL import Image

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class Decode(Worker):
    def deserialize(self, data):
        return data

    def forward(self, data):
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224))
        return ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD).numpy()


class Classify(Worker):
    def __init__(self):
        super().__init__()
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"])

    def forward(self, data):
        with torch.inference_mode():
            return [{"class": one} for one in self.model(torch.from_numpy(np.stack(data))).argmax(1).tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1)
    server.append_worker(Classify, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
