# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu.holder LEFT``: hold all but LEFT bytes of the GPU's memory until killed."""

from __future__ import annotations

import sys
import time

from tests.gpu.dry import TOTAL_BYTES, dry_run, use


def hold(left_bytes: int) -> object:
    """Take the memory, with plain allocations; return what holds it."""
    if dry_run():
        use(TOTAL_BYTES - left_bytes)
        return None
    import torch

    torch.zeros(1, device="cuda:0")
    free, _ = torch.cuda.mem_get_info(0)
    return torch.empty(max(0, free - left_bytes), dtype=torch.uint8, device="cuda:0")


def main() -> None:
    """Hold it."""
    _held = hold(int(sys.argv[1]))
    print("holding", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
