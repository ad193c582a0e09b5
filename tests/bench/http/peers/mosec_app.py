# SPDX-License-Identifier: Apache-2.0
"""The perceptron on mosec, as its own examples do it. Runs in mosec's environment."""

# mypy: ignore-errors

import os

import torch
from mosec import Server, Worker


class Perceptron(Worker):
    def __init__(self):
        super().__init__()
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_MODEL"])

    def forward(self, data):
        x = torch.tensor([one["input"] for one in data], dtype=torch.float32)
        with torch.inference_mode():
            return [{"output": one} for one in self.model(x).tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Perceptron, num=1, max_batch_size=64, max_wait_time=1)
    server.run()
