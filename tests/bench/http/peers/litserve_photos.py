# SPDX-License-Identifier: Apache-2.0
"""The network for photos on LitServe: a form with the file. Runs in LitServe's environment."""

# mypy: ignore-errors

import io
import os

import litserve
import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class Photos(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"])

    def decode_request(self, request):
        image = Image.open(io.BytesIO(request["photo"].file.read())).convert("RGB").resize((224, 224))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, x):
        with torch.inference_mode():
            return self.model(x).argmax(1)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"class": int(output)}


if __name__ == "__main__":
    api = Photos(max_batch_size=32, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="error"
    )
