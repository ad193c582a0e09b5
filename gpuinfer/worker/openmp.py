# SPDX-License-Identifier: Apache-2.0
"""How torch's threads on the CPU behave; to be said before torch is imported.

``torch.set_num_threads`` holds for the thread that calls it: the matrix products of another one, such as the
one in which batches run, take as many threads as OpenMP is told of in the environment.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def bind_threads(threads: int, environ: MutableMapping[str, str]) -> None:
    """Let all threads of the process use ``threads`` for one operation (0: as many as there are cores).

    Threads that have nothing to do sleep, unless the environment says otherwise: by OpenMP's own default
    they spin for a while after each operation, on cores that Redis, the front and the worker itself need.
    """
    if threads:
        environ["OMP_NUM_THREADS"] = str(threads)
    environ.setdefault("OMP_WAIT_POLICY", "passive")
