# SPDX-License-Identifier: Apache-2.0
"""What a part tells the run, a line of JSON at a time: one that is killed has told what it had done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def tell(**record: Any) -> None:
    """Add a line; without a run that reads it, print it."""
    file = os.environ.get("GPU_CHECK_RECORDS")
    line = json.dumps(record)
    if not file:
        print(line)
        return
    with Path(file).open("a", encoding="utf-8") as records:
        records.write(line + "\n")


def tell_check(what: str, seconds: float, failure: str = "") -> None:
    """Tell what one check came to; ``failure`` is empty when it passed."""
    check = {"what": what, "ok": not failure, "seconds": round(seconds, 2), "detail": failure[:300]}
    tell(checks=[check])
