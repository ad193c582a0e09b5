# SPDX-License-Identifier: Apache-2.0
"""Where models lie: folders with one sub-folder a model, and the shipped ones behind them.

A model is called by the name of its folder. The first folder that holds a name wins, even when the
model there is broken: falling through to another model of that name would be a silent swap.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gpuinfer.errors import DigestMismatch, ManifestError, ModelError, UnknownModel, UsageError
from gpuinfer.models.manifest import MANIFEST_FILE, MODEL_NAME, Manifest, load_manifest

SHIPPED = Path(__file__).parent / "shipped"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """One installed model."""

    path: Path
    manifest: Manifest
    #: True for a model that came with the package.
    shipped: bool = False

    @property
    def artefact(self) -> Path:
        return self.path / self.manifest.artefact


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a listing: a sound model, or the error that its manifest met."""

    name: str
    path: Path
    folder: ModelFolder | None
    error: ManifestError | None


@contextmanager
def open_verified(folder: ModelFolder) -> Iterator[BinaryIO]:
    """Open the artefact once its SHA-256 is the manifest's; the open file is the one that was checked.

    Where the manifest names none, there is nothing to check.

    Raises DigestMismatch; ModelError when the file cannot be read.
    """
    try:
        file = folder.artefact.open("rb")
    except OSError as exc:
        raise ModelError(f"artefact cannot be read: {exc}", folder.manifest.name) from exc
    with file:
        found = _digest(file)
        if folder.manifest.sha256 not in (None, found):
            raise DigestMismatch(
                f"{folder.artefact} has sha256 {found}, its manifest says {folder.manifest.sha256}; "
                "it was not opened",
                folder.manifest.name,
            )
        file.seek(0)
        yield file


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def verify(folder: ModelFolder) -> str:
    """Check the artefact's SHA-256 and return it. Raises DigestMismatch, or ModelError where it is gone."""
    with open_verified(folder) as file:
        return _digest(file)


class Repository:
    """The models of some folders, then the shipped ones. Reads the disk at each call."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)

    def entries(self) -> list[Entry]:
        """List what is installed, sorted by name, broken manifests included."""
        paths: dict[str, Path] = {}
        for folder in (*self.folders, SHIPPED):
            for path in _model_paths(folder):
                paths.setdefault(path.name, path)
        return [_entry(path) for _, path in sorted(paths.items())]

    def names(self) -> tuple[str, ...]:
        """Return the names of all sound models, sorted."""
        return tuple(entry.name for entry in self.entries() if entry.folder)

    def get(self, name: str) -> ModelFolder:
        """Find a model by name. Raises UnknownModel; ManifestError when it is there but broken."""
        path = self._find(name)
        if path is None:
            raise UnknownModel(self._unknown(name), "model")
        return _open_folder(path)

    def add(self, source: Path, name: str | None = None, force: bool = False) -> ModelFolder:
        """Copy the model in ``source`` into the first folder, under its own name or another.

        The copy is checked, then renamed into place: a reader sees the whole model or none.
        Raises ManifestError, DigestMismatch; UsageError when the name is taken and ``force`` is not given.
        """
        name = name or load_manifest(source).name
        if not MODEL_NAME.fullmatch(name):
            raise UsageError(f"a model cannot be called {name!r}; use a-z 0-9 _ . -", "name")
        if not self.folders:
            raise UsageError("there is no folder to add to; set models.folders", "models.folders")
        target = self.folders[0] / name
        if target.exists() and not force:
            raise UsageError(f"{target} is there already; --force replaces it", "name")
        try:
            self.folders[0].mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".add-", dir=self.folders[0]) as scratch:
                staged = Path(scratch, name)
                _copy_model(source, staged, name)
                _replace(staged, target, Path(scratch, "old"))
        except OSError as exc:
            raise ModelError(f"cannot be added to {self.folders[0]}: {exc}", name) from exc
        return _open_folder(target)

    def remove(self, name: str) -> Path:
        """Delete a model and return where it was. Raises UnknownModel; UsageError for a shipped one."""
        path = self._find(name)
        if path is None:
            raise UnknownModel(self._unknown(name), "model")
        if path.parent == SHIPPED:
            raise UsageError(f"{name} is part of the package and cannot be removed", "model")
        try:
            with tempfile.TemporaryDirectory(prefix=".remove-", dir=path.parent) as scratch:
                path.rename(Path(scratch, name))
        except OSError as exc:
            raise ModelError(f"cannot be removed: {exc}", name) from exc
        return path

    def _find(self, name: str) -> Path | None:
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            return None
        candidates = (folder / name for folder in (*self.folders, SHIPPED))
        return next((path for path in candidates if os.path.lexists(path / MANIFEST_FILE)), None)

    def _unknown(self, name: object) -> str:
        names = self.names()
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"there is no model {str(name)[:80]!r}; {hint}known: {', '.join(names)}"


def _model_paths(folder: Path) -> list[Path]:
    try:
        return [
            p for p in folder.iterdir() if MODEL_NAME.fullmatch(p.name) and os.path.lexists(p / MANIFEST_FILE)
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []  # a folder nobody has added a model to yet
    except OSError as exc:
        raise ModelError(f"cannot be listed: {exc}", str(folder)) from exc


def _open_folder(path: Path) -> ModelFolder:
    manifest = load_manifest(path)
    if manifest.name != path.name:
        raise ManifestError(
            f"name = {manifest.name!r}: must be {path.name!r}, as its folder is called",
            str(path / MANIFEST_FILE),
        )
    return ModelFolder(path=path, manifest=manifest, shipped=path.parent == SHIPPED)


def _entry(path: Path) -> Entry:
    try:
        return Entry(name=path.name, path=path, folder=_open_folder(path), error=None)
    except ManifestError as exc:
        return Entry(name=path.name, path=path, folder=None, error=exc)


def _copy_model(source: Path, staged: Path, name: str) -> None:
    """Copy the plain files of ``source``, call the copy ``name``, and check it."""
    staged.mkdir()
    staged.chmod(0o755)  # whatever the umask: workers run as another user
    for path in sorted(source.iterdir()):
        if not path.name.startswith("."):
            _copy_file(path, source.resolve(), staged / path.name)
    if load_manifest(staged).name != name:
        _rename_in(staged / MANIFEST_FILE, name)
    verify(_open_folder(staged))


def _rename_in(manifest: Path, name: str) -> None:
    """Set the first top-level ``name`` of a manifest, and leave the rest of it, comments too, as it is."""
    text = manifest.read_text(encoding="utf-8")
    head = re.split(r"(?m)^(?=[ \t]*\[)", text, maxsplit=1)[0]
    tables = text[len(head) :]
    head = re.sub(r"(?m)^[ \t]*name[ \t]*=.*$", f'name = "{name}"', head, count=1)
    manifest.write_text(head + tables, encoding="utf-8")


def _copy_file(path: Path, root: Path, target: Path) -> None:
    """Copy one regular file; a link may only point at another file in ``root``."""
    real = path.resolve()
    if not real.is_relative_to(root):
        raise ManifestError(f"links out of its folder, to {real}; a model is self-contained", str(path))
    if not stat.S_ISREG(real.stat().st_mode):
        raise ManifestError("is no plain file; a model is model.toml, one artefact, plain files", str(path))
    # Neither a link nor a pipe that was put there since is followed or waited for.
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o644)


def _replace(staged: Path, target: Path, old: Path) -> None:
    """Rename ``staged`` to ``target``; what was there moves to ``old``, and back should the rename fail."""
    if not os.path.lexists(target):
        staged.rename(target)
        return
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
