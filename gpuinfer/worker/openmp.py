# SPDX-License-Identifier: Apache-2.0
"""Configures torch's CPU threads; call it before torch is imported.

``torch.set_num_threads`` only affects the calling thread. Matrix products in other threads, such as the one
that runs batches, use the number of threads that the environment gives to OpenMP.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def bind_threads(threads: int, environ: MutableMapping[str, str]) -> None:
    """Use ``threads`` threads per operation (0: one per core) in all threads of the process.

    Idle threads sleep, unless the environment says otherwise. By default OpenMP's threads spin for a while
    after each operation, on cores that Redis, the API and the worker need.
    """
    if threads:
        environ["OMP_NUM_THREADS"] = str(threads)
    environ.setdefault("OMP_WAIT_POLICY", "passive")
