# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer`` with models that sleep: ``BENCH_SLEEP_S=0.005 python -m tests.bench.sleeping worker 0``.

Each forward pass sleeps so long an item, without the GIL and without a core, as a pass on a GPU does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from gpuinfer.cli import main
from gpuinfer.models.tensor_model import TensorModel

_LAUNCH = TensorModel.launch


def _launch(self: TensorModel, items: Sequence[Any]) -> list[Any]:
    time.sleep(float(os.environ["BENCH_SLEEP_S"]) * len(items))
    return list(_LAUNCH(self, items))


if __name__ == "__main__":
    TensorModel.launch = _launch  # type: ignore[method-assign]  # what this program is for
    main()
