# SPDX-License-Identifier: Apache-2.0
"""gpuinfer whose workers die of bombs: ``python -m tests.faults.fragile worker 0``.

The kernel kills a process that takes too much memory; here a SIGKILL stands for it, so that it comes at once
and always.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from gpuinfer.models.tensor_model import TensorModel
from gpuinfer.queue import bodies

#: Arguments that unpack to more bytes are fatal.
FATAL_BYTES = 5_000_000
#: An input that kills the process that reads it, and one whose first number kills the process that runs it.
KILLS_ITS_READER = "kills its reader"
KILLS_ITS_RUNNER = -7.0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the command line."""
    from gpuinfer.cli import main as command

    open_body, launch = bodies.open_body, TensorModel.launch

    def fatal_open(*args: Any) -> Any:
        body, size = open_body(*args)
        if size > FATAL_BYTES or (isinstance(body, list) and body[0] == [KILLS_ITS_READER]):
            _die()
        return body, size

    def fatal_launch(self: TensorModel, items: Sequence[Any]) -> Any:
        if any(item[0].flat[0] == KILLS_ITS_RUNNER for item in items):
            _die()
        return launch(self, items)

    bodies.open_body = fatal_open  # type: ignore[assignment]
    TensorModel.launch = fatal_launch  # type: ignore[method-assign]
    command()


if __name__ == "__main__":
    main()
