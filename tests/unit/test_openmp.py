# SPDX-License-Identifier: Apache-2.0
"""worker.threads holds in every thread of the worker, and idle threads of torch take no processor time."""

from __future__ import annotations

import subprocess
import sys

from gpuinfer.worker.openmp import bind_threads

_PROGRAM = """
import os, threading
from gpuinfer.worker.openmp import bind_threads
bind_threads({threads}, os.environ)
import torch
if {threads}:
    torch.set_num_threads({threads})
layer, inputs = torch.nn.Linear(64, 256), torch.rand(64, 64)

def run():
    with torch.inference_mode():
        for _ in range(20):
            layer(inputs)
    print(len(os.listdir("/proc/self/task")))

thread = threading.Thread(target=run)
alone = len(os.listdir("/proc/self/task"))
thread.start()
thread.join()
print(alone)
"""


def _run(threads: int) -> int:
    """Return how many threads an operation has started beside the one that it runs in."""
    program = _PROGRAM.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    during, alone = done.stdout.split()
    return int(during) - int(alone) - 1


def test_the_number_of_threads_holds_in_each_thread() -> None:
    """torch.set_num_threads, called in another thread, does not bind the one in which batches run."""
    assert _run(1) == 0


def test_a_setting_of_the_environment_is_left() -> None:
    """Who has said how threads wait is obeyed; the number of threads is the worker's own setting."""
    environ = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}
    bind_threads(0, environ)
    assert environ == {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}
    bind_threads(2, environ)
    assert environ == {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"}


def test_idle_threads_sleep() -> None:
    """They would spin otherwise, on the cores that the rest of the host needs."""
    environ: dict[str, str] = {}
    bind_threads(0, environ)
    assert environ == {"OMP_WAIT_POLICY": "passive"}
