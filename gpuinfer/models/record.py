# SPDX-License-Identifier: Apache-2.0
"""The record that ``gpuinfer model add`` writes: the digest of a model's folder, and what its trial found.

The record, ``installed.json``, is in the model's folder but not part of the digest. The digest is the SHA-256
of what ``sha256sum`` prints for the files, sorted by the bytes of their names. A shell can check it::

    cd FOLDER && find . -type f ! -path ./installed.json -printf '%P\\0' \\
        | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any

from gpuinfer.errors import DigestMismatch, ManifestError, ModelError, UsageError
from gpuinfer.models.signature import Signature

RECORD_FILE = "installed.json"
#: The form of a digest, here and in ``--expect``.
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: Files that are read at the same time: weights often come in several large ones.
_READERS = 4
#: Maximum number of changed files that an error names.
_NAMED = 3
#: Characters in a name for which sha256sum would print an escaped form.
_ODD_NAME = re.compile(r"[\\\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about an installed model. ``digest`` is "" if its folder is not to be verified."""

    digest: str
    #: Path within the folder -> SHA-256 in hexadecimal; tells which files have changed.
    files: Mapping[str, str] = field(default_factory=dict)
    #: When it was added: ISO 8601, UTC.
    added_at: str = ""
    #: What a request must look like, as ``gpuinfer.models.signature`` writes it.
    signature: Mapping[str, Any] | None = None
    #: Whether the example gave a result when the model was added; None: it was not tried.
    example_ok: bool | None = None


def read(folder: Path) -> Record | None:
    """Return the record of a model's folder; None if there is none. Raises ModelError for a broken one."""
    path = folder / RECORD_FILE
    try:
        data = json.loads(path.read_bytes())
        return _checked(Record(**data))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ManifestError) as exc:
        raise ModelError(f"{path} cannot be read: {exc}; gpuinfer model add writes it", folder.name) from exc


def _checked(found: Record) -> Record:
    """Return a valid record. Raises ValueError, TypeError or ManifestError for another."""
    if found.digest != "" and not (isinstance(found.digest, str) and DIGEST.fullmatch(found.digest)):
        raise ValueError(f"digest = {found.digest!r}: must be sha256: and 64 of 0-9 a-f")
    if not isinstance(found.files, Mapping):
        raise TypeError("files must map names to SHA-256")
    if found.signature is not None:
        Signature.from_json(found.signature)
    return found


def write(folder: Path, record: Record) -> None:
    """Write a record into a model's folder, atomically."""
    scratch = folder / f".{RECORD_FILE}"
    scratch.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    scratch.chmod(0o644)
    scratch.rename(folder / RECORD_FILE)


def of(folder: Path, **learned: Any) -> Record:
    """Make the record of a folder as it is now. Raises ModelError if it cannot be read."""
    files = hashes(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(digest=digest_of(files), files=files, added_at=now, **learned)


def checked_digest(text: str) -> str:
    """Return a digest given with or without ``sha256:`` in its full form. Raises UsageError."""
    digest = text if text.startswith("sha256:") else f"sha256:{text}"
    if not DIGEST.fullmatch(digest):
        raise UsageError(f"{text!r} is not a digest; must be sha256: and 64 of 0-9 a-f", "--expect")
    return digest


def digest_of(files: Mapping[str, str]) -> str:
    """Return the digest of a folder from the SHA-256 of its files."""
    lines = (f"{files[name]}  {name}\n" for name in sorted(files, key=os.fsencode))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def hashes(
    folder: Path, opened: Mapping[str, BufferedReader] | None = None, *, leave_out: Collection[str] = ()
) -> dict[str, str]:
    """Return path -> SHA-256 of all files of a folder except its record and the sub-folders in ``leave_out``.

    Files in ``opened`` (path -> open file) are read from there. Raises ModelError if one is not a regular
    file or cannot be read.
    """
    already = opened or {}

    def hashed(name: str) -> str:
        if name in already:
            already[name].seek(0)
            return hashlib.file_digest(already[name], "sha256").hexdigest()
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        names = sorted(_names(folder, folder, leave_out))
        with ThreadPoolExecutor(_READERS) as readers:
            return dict(zip(names, readers.map(hashed, names), strict=True))
    except OSError as exc:
        raise ModelError(f"cannot be read: {exc}", folder.name) from exc


def _names(folder: Path, root: Path, leave_out: Collection[str]) -> Iterator[str]:
    """Yield the paths of all files below ``folder``, relative to ``root``."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            if entry.name not in leave_out:
                yield from _names(path, root, leave_out)
        elif not stat.S_ISREG(mode):
            raise ModelError(f"{path} is not a regular file", root.name)
        elif path != root / RECORD_FILE:
            yield checked_name(path.relative_to(root)).as_posix()


def checked_name(path: Path) -> Path:
    """Return the path if it may be part of a model. Raises ModelError for a name with control characters."""
    try:
        odd = _ODD_NAME.search(path.as_posix().encode().decode())
    except UnicodeEncodeError:
        odd = True  # type: ignore[assignment]  # not UTF-8
    if odd:
        raise ModelError(
            f"{str(path)!r}: a file name must not contain a backslash or a control character", "name"
        )
    return path


def verify(
    folder: Path,
    record: Record,
    opened: Mapping[str, BufferedReader] | None = None,
    *,
    leave_out: Collection[str] = (),
) -> str:
    """Check a folder against its record and return the digest. Raises DigestMismatch; ModelError."""
    if not record.digest:
        return ""
    found = hashes(folder, opened, leave_out=leave_out)
    digest = digest_of(found)
    if digest != record.digest:
        raise DigestMismatch(
            f"{folder} has digest {digest}, but {record.digest} was added{_changes(record.files, found)}; "
            "it was not loaded",
            folder.name,
        )
    return digest


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return a text that names some files that were changed, added or removed."""
    said = [f"{name} is missing" for name in sorted(before.keys() - now.keys())]
    said += [f"{name} is new" for name in sorted(now.keys() - before.keys())]
    said += [
        f"{name} has changed" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]
    ]
    more = f" and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
    return f": {', '.join(said[:_NAMED])}{more}" if said else ""
