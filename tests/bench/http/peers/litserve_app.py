# SPDX-License-Identifier: Apache-2.0
"""The perceptron on LitServe, as its own examples do it. Runs in LitServe's environment."""

# mypy: ignore-errors

import os

import litserve
import torch


class Perceptron(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"])

    def decode_request(self, request):
        return torch.tensor(request["input"], dtype=torch.float32)

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, x):
        with torch.inference_mode():
            return self.model(x)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"output": output.tolist()}


if __name__ == "__main__":
    api = Perceptron(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="error"
    )
