# SPDX-License-Identifier: Apache-2.0
"""A model whose tasks run until a test lets them go: what must happen meanwhile needs no luck."""

from __future__ import annotations

from pathlib import Path

from tests.host.container import Container
from tests.models_for_tests import python_model

#: The file on a host that holds its workers' tasks; a worker's environment may name another as $GATE.
GATE = "/run/gate"
_CODE = """
    import os
    import time

    GATE = os.environ.get("GATE", "/run/gate")


    class Gated:
        example = [0.0]

        def prepare(self, item: list):
            return item[0]

        def predict(self, batch):
            if any(batch):
                while os.path.exists(GATE):
                    time.sleep(0.02)
                time.sleep(SECONDS)
            return [2 * number for number in batch]
"""


def gated(folder: Path, seconds: float = 0.0) -> Path:
    """Write a model: one float in a list to its double, a task at a time.

    Any but 0 is held while the gate is shut, and takes ``seconds`` after that, without the CPU.
    """
    tables = "max_batch_size = 1\nsoft_time_limit_s = 900\nhard_time_limit_s = 1000\n"
    return python_model(folder, _CODE.replace("SECONDS", f"{seconds:g}"), tables)


def shut(host: Container, gate: str = GATE) -> None:
    """Hold what runs from now on."""
    host.ok(f"touch {gate}")


def let_go(host: Container, gate: str = GATE) -> None:
    """Let all that is held end."""
    host.ok(f"rm -f {gate}")


__all__ = ["GATE", "gated", "let_go", "shut"]
