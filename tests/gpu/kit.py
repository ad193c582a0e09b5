# SPDX-License-Identifier: Apache-2.0
"""What lies in the kit, and how ``run`` tells that it fits the checkout and this Python."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Where ``pack`` puts it unless told otherwise; git ignores it.
KIT = ROOT / "tests" / "gpu" / "kit"
#: The kit may have this many bytes: what carries it to the GPU machine has a limit.
LIMIT_BYTES = 60 * 1024 * 1024
_FACTS = "kit.json"
_SKIPPED = {"__pycache__"}


class KitError(Exception):
    """Raised when there is no kit, or it was packed for something else; says what to do."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a kit was packed for."""

    #: As in 3.12.
    python: str
    #: ``digest_of`` the sources that our wheel was built from.
    sources: str
    #: Over the lock files and the packer: the wheels need not be collected again while it stays the same.
    wheels: str
    #: What redis-server says of itself.
    redis: str

    def write(self, kit: Path) -> None:
        """Write it into the kit."""
        (kit / _FACTS).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(kit: Path) -> Facts | None:
    """Return what the kit was packed for; None where there is none, or one of an older form."""
    try:
        return Facts(**json.loads((kit / _FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def digest_of(root: Path = ROOT) -> str:
    """Return a digest of all that goes into our wheel."""
    files = [root / "pyproject.toml", *sorted((root / "gpuinfer").rglob("*"))]
    total = hashlib.sha256()
    for file in files:
        if file.is_file() and not _SKIPPED.intersection(file.parts):
            total.update(f"{file.relative_to(root)}\n".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check(kit: Path) -> Facts:
    """Return the facts of a kit that fits. Raises KitError."""
    facts = read(kit)
    if facts is None:
        raise KitError(f"there is no kit in {kit}; make one with tests/gpu/pack, where there is a network")
    here = "{}.{}".format(*sys.version_info)
    if facts.python != here:
        raise KitError(
            f"the kit is for Python {facts.python} and this is {here}: tests/gpu/pack --python {here}"
        )
    if facts.sources != digest_of():
        raise KitError("gpuinfer has changed since the kit was packed: run tests/gpu/pack again")
    return facts
