# SPDX-License-Identifier: Apache-2.0
"""The settings of one worker: ``/etc/gpuinfer/worker@N.env``.

The file is read as the worker's unit reads it (``EnvironmentFile=``, systemd.exec(5)). The doctor, the
watcher and ``gpuinfer config`` use this to know what an instance would run with; so do workers that are
plain processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpuinfer import env_file

#: The folder in which the units look for the files.
FOLDER = Path("/etc/gpuinfer")
_NAME = re.compile(r"worker@(\d+)\.env")


def file_of(number: int, folder: Path = FOLDER) -> Path:
    """Return the path of an instance's own file, which may not exist."""
    return folder / f"worker@{number}.env"


def with_file(folder: Path = FOLDER) -> list[int]:
    """Return the instances that have a file of their own."""
    names = (path.name for path in folder.glob("worker@*.env"))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read(number: int, folder: Path = FOLDER) -> Mapping[str, str]:
    """Return the variables of an instance's own file; none where there is no file. Raises OSError."""
    return env_file.read(file_of(number, folder)).variables


def remarks(number: int, folder: Path = FOLDER) -> tuple[str, ...]:
    """Return a remark for each line that systemd would ignore or change. Raises OSError."""
    return env_file.read(file_of(number, folder)).remarks
