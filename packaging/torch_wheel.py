# SPDX-License-Identifier: Apache-2.0
"""Say which build of torch a wheel holds: ``python packaging/torch_wheel.py WHEEL`` prints cpu or cuda.

For a GPU build, the wheels that it needs (NVIDIA's libraries, triton) must be in the same folder. If some are
missing, it names them on standard error and exits with 1. It runs with Debian's Python and nothing installed.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

#: What a GPU build needs besides what packaging/requirements.lock holds; the same as in packaging/lock.
WITH_TORCH = re.compile(r"^(triton|cuda-.*|nvidia-(?!ml-py).*)$")


def normal(name: str) -> str:
    """Return a project's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def flavour(wheel: Path) -> str:
    """Return ``cpu`` or ``cuda``, from torch/version.py in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("torch/version.py").decode()
    return "cpu" if re.search(r"(?m)^cuda\b.*= None$", text) else "cuda"


def missing(wheel: Path) -> list[str]:
    """Return the projects torch names for this platform that have no wheel in its folder."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    # torch's extras are not needed.
    lines = [line for line in re.findall(r"(?m)^Requires-Dist: (.*)$", text) if "extra ==" not in line]
    needed = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}
    there = {normal(file.name.split("-")[0]) for file in wheel.parent.glob("*.whl")}
    return sorted(name for name in needed - there if WITH_TORCH.match(name))


def main() -> None:
    """Print the flavour, or what is missing."""
    wheel = Path(sys.argv[1])
    if absent := missing(wheel):
        raise SystemExit(f"{wheel.parent} lacks what {wheel.name} needs: {', '.join(absent)}")
    print(flavour(wheel))  # noqa: T201  a script's output


if __name__ == "__main__":
    main()
