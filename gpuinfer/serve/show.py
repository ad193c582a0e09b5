# SPDX-License-Identifier: Apache-2.0
"""How ``gpuinfer serve`` names things: a command to try the model, and files where the user has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.models.source import Source


def command(url: str, value: Any | None, scratch: Path, *, short: int = 400) -> str:
    """Return a shell's command that sends a value and prints its result; a long one goes into ``scratch``."""
    body = orjson.dumps({"inputs": value}).decode()
    if len(body) > short:
        scratch.write_text(body, encoding="utf-8")
        data = f"@{scratch}"
    else:
        data = "'" + body.replace("'", r"'\''") + "'"
    ask = f"curl -s -d {data} {url}/predict"
    return f'curl -s "{url}/result/$({ask} | cut -d\'"\' -f4)?wait=30"'


def as_theirs(text: str, models: Path, source: Source) -> str:
    """Name files where the user has them, not where they are linked."""
    return re.sub(re.escape(str(models)) + r"/[a-z0-9_.-]+(?=/|\b)", str(source.folder), text)
