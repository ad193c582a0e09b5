# SPDX-License-Identifier: Apache-2.0
"""Texts that ``gpuinfer serve`` prints: a command to try the model, and the user's own paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson

from gpuinfer.models.source import Source


def command(url: str, value: Any | None, scratch: Path, *, short: int = 400) -> str:
    """Return a shell command that sends a value and prints its result.

    A request longer than ``short`` bytes is written to the file ``scratch``.
    """
    body = orjson.dumps({"inputs": value}).decode()
    if len(body) > short:
        scratch.write_text(body, encoding="utf-8")
        data = f"@{scratch}"
    else:
        data = "'" + body.replace("'", r"'\''") + "'"
    ask = f"curl -s -d {data} {url}/predict"
    return f'curl -s "{url}/result/$({ask} | cut -d\'"\' -f4)?wait=30"'


def user_paths(text: str, models: Path, source: Source) -> str:
    """Replace paths of the links in ``models`` by those of the user's own files."""
    return re.sub(re.escape(str(models)) + r"/[a-z0-9_.-]+(?=/|\b)", str(source.folder), text)
