# SPDX-License-Identifier: Apache-2.0
"""What is special about one worker of a host: the administrator's own file for it.

``/etc/gpuinfer/worker@N.env`` is read as the worker's unit reads it (``EnvironmentFile=``, systemd.exec(5)).
The doctor and the watcher ask here what an instance would run with; so do workers that are plain processes.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

#: Where the units look for the files.
FOLDER = Path("/etc/gpuinfer")
_NAME = re.compile(r"worker@(\d+)\.env")


def file_of(number: int, folder: Path = FOLDER) -> Path:
    """Return the path of an instance's own file, which need not be there."""
    return folder / f"worker@{number}.env"


def with_file(folder: Path = FOLDER) -> list[int]:
    """Return the instances that have a file of their own."""
    names = (path.name for path in folder.glob("worker@*.env"))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read(number: int, folder: Path = FOLDER) -> dict[str, str]:
    """Return the variables of an instance's own file; none where there is no file.

    Raises ValueError for a line that is no NAME=value; OSError for a file that cannot be read.
    """
    try:
        text = file_of(number, folder).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return parse(text)


def parse(text: str) -> dict[str, str]:
    """Read the text of such a file: NAME=value, quotes, # and ; comments. Raises ValueError."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip()[0] in "#;":
            continue
        name, equals, value = line.strip().partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"line {number} is no NAME=value, and systemd ignores it")
        found[name] = " ".join(shlex.split(value)) if value[:1] in "\"'" else value.strip()
    return found
