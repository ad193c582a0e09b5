# SPDX-License-Identifier: Apache-2.0
"""Finds, adds and removes models: folders with one sub-folder per model, and after them the shipped models.

A model has the name of its folder. The first folder that has a name wins, even when the model there is
broken: using another model of that name would be a silent swap.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from gpuinfer.errors import (
    DigestMismatch,
    GpuinferError,
    ManifestError,
    ModelError,
    ModelNotAdded,
    NotPermitted,
    UnknownModel,
    UsageError,
)
from gpuinfer.models import record
from gpuinfer.models.manifest import MANIFEST_FILE, Manifest, load_manifest
from gpuinfer.models.record import RECORD_FILE, Record
from gpuinfer.models.signature import Signature, from_manifest
from gpuinfer.names import MODEL_NAME

SHIPPED = Path(__file__).parent / "shipped"
_CHUNK_BYTES = 1 << 20
#: The folder that Python writes beside modules; it is not part of a model.
_BYTECODE = "__pycache__"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """One model. An installed one has a record; one that is only tried may have none."""

    path: Path
    manifest: Manifest
    record: Record | None = None
    #: True for a model that came with the package.
    shipped: bool = False

    @property
    def artefact(self) -> Path:
        return self.path / self.manifest.artefact

    @property
    def signature(self) -> Signature | None:
        """What it takes, from its manifest or its record, so that its code need not run.

        None if neither says it.
        """
        stated = from_manifest(self.manifest)
        if stated is None and self.record is not None and self.record.signature:
            return Signature.from_json(self.record.signature)
        return stated


#: Writes the manifest of a copy that has none.
Init = Callable[[Path], object]
#: Tries a model before it is added; returns further fields of its record.
Trial = Callable[[ModelFolder], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a listing: a usable model, or an error."""

    name: str
    path: Path
    folder: ModelFolder | None
    error: ModelError | None


@contextmanager
def open_verified(folder: ModelFolder) -> Iterator[BufferedReader]:
    """Open the artefact after checking the whole folder against its record's digest.

    The open file is the very one that was checked. Without a record, nothing is checked. Raises
    DigestMismatch; ModelError if a file cannot be read.
    """
    try:
        file = folder.artefact.open("rb")
    except OSError as exc:
        raise ModelError(f"artefact cannot be read: {exc}", folder.manifest.name) from exc
    with file:
        if folder.record is not None:
            opened = {folder.manifest.artefact: file}
            record.verify(folder.path, folder.record, opened, leave_out=_unchecked(folder))
        file.seek(0)
        yield file


def verify(folder: ModelFolder) -> str:
    """Check the folder against its record and return the digest; "" without one.

    Raises DigestMismatch, or ModelError if a file cannot be read.
    """
    if folder.record is None:
        return ""
    return record.verify(folder.path, folder.record, leave_out=_unchecked(folder))


def _unchecked(folder: ModelFolder) -> tuple[str, ...]:
    """Return the sub-folders that are not verified: package installers compile the shipped .py files."""
    return (_BYTECODE,) if folder.shipped else ()


class Repository:
    """The models in some folders, and the shipped ones. Each call reads the disk."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)

    def entries(self) -> list[Entry]:
        """List all installed models, sorted by name, including broken ones."""
        paths: dict[str, Path] = {}
        for folder in (*self.folders, SHIPPED):
            for path in _model_paths(folder):
                paths.setdefault(path.name, path)
        return [_entry(path) for _, path in sorted(paths.items())]

    def names(self) -> tuple[str, ...]:
        """Return the names of all usable models, sorted."""
        return tuple(entry.name for entry in self.entries() if entry.folder)

    def get(self, name: str) -> ModelFolder:
        """Find a model by name.

        Raises UnknownModel; ManifestError when it is there but broken; ModelNotAdded when it has no record.
        """
        path = self._find(name)
        if path is None:
            raise UnknownModel(self._unknown(name), "model")
        return _open_installed(path)

    def add(
        self,
        source: Path,
        name: str | None = None,
        force: bool = False,
        *,
        expect: str | None = None,
        trial: Trial | None = None,
        init: Init | None = None,
    ) -> ModelFolder:
        """Copy the model in ``source``, a folder or a file, into the first folder, and return it.

        If the copy has no manifest, ``init`` writes it. The copy's digest is compared with ``expect``; then
        the copy is given to ``trial``, whose answer becomes part of the record. At last the copy is renamed
        into place, so that a reader sees the whole model or none.
        Raises ManifestError; DigestMismatch; what ``trial`` raises; UsageError if the name is taken and
        ``force`` is not set.
        """
        if init is None or (source / MANIFEST_FILE).exists():
            name = name or load_manifest(source).name
        name = name or name_of(source)
        if not MODEL_NAME.fullmatch(name):
            raise UsageError(f"a model cannot be called {name!r}; use a-z 0-9 _ . -", "name")
        if not self.folders:
            raise UsageError("there is no folder to install to; set models.folders", "models.folders")
        target = self.folders[0] / name
        if _taken(target, source) and not force:
            raise UsageError(f"{target} exists already; --force replaces it", "name")
        with self._staged(source, name, init) as staged:
            _record(staged, expect, trial, opened=init is not None and not (source / MANIFEST_FILE).exists())
            _replace(staged.path, target, staged.path.with_name(".old"))
        return _open_installed(target)

    @contextmanager
    def _staged(
        self, source: Path, name: str, init: Init | None, *, fresh: bool = False
    ) -> Iterator[ModelFolder]:
        """Yield a copy of a model beside the installed ones, where the workers' user can read it."""
        try:
            self.folders[0].mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".add-", dir=self.folders[0]) as scratch:
                # The workers' user must have access, but tempfile makes folders for this user only.
                Path(scratch).chmod(0o711)
                staged = Path(scratch, name)
                try:
                    _copy_model(source, staged, name, init, fresh=fresh)
                    yield _open_folder(staged)
                except GpuinferError as exc:
                    _name_what_was_given(exc, staged, source)
                    raise
        except OSError as exc:
            if not os.access(self.folders[0], os.W_OK):
                words = f"cannot be added to {self.folders[0]}: {exc.strerror}; call it with sudo"
                raise NotPermitted(words, name) from exc
            raise ModelError(f"cannot be added to {self.folders[0]}: {exc}", name) from exc

    @contextmanager
    def copied(self, source: Path, init: Init, *, name: str | None = None) -> Iterator[Path]:
        """Yield a temporary copy of a model that is only tried. Raises as ``add`` does.

        With a ``name``, the copy gets that name, and ``init`` writes its manifest even if it has one.
        """
        if not self.folders:
            raise UsageError("there is no folder to copy to; set models.folders", "models.folders")
        fresh = name is not None
        if name is None:
            name = load_manifest(source).name if (source / MANIFEST_FILE).exists() else name_of(source)
        with self._staged(source, name, init, fresh=fresh) as staged:
            yield staged.path

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
        return []  # no model was added yet
    except OSError as exc:
        raise ModelError(f"cannot be listed: {exc}", str(folder)) from exc


def _open_folder(path: Path) -> ModelFolder:
    manifest = load_manifest(path)
    if manifest.name != path.name:
        raise ManifestError(
            f"name = {manifest.name!r}: must be {path.name!r}, the name of its folder",
            str(path / MANIFEST_FILE),
        )
    return ModelFolder(path=path, manifest=manifest, record=record.read(path), shipped=path.parent == SHIPPED)


def _open_installed(path: Path) -> ModelFolder:
    folder = _open_folder(path)
    if folder.record is None:
        raise ModelNotAdded(
            f"{path} was put there by hand, without a record; run: gpuinfer model add {path}", path.name
        )
    return folder


def name_of(path: Path) -> str:
    """Make a model's name from that of a file or folder: ``My Model.pt`` becomes ``my-model``."""
    path = path.resolve()
    stem = path.name if path.is_dir() else path.stem
    if stem == "model" and path.parent.name:
        stem = path.parent.name
    name = re.sub(r"[^a-z0-9_.-]+", "-", stem.lower()).strip("-._")[:64]
    return name if MODEL_NAME.fullmatch(name) else "model"


def _taken(target: Path, source: Path) -> bool:
    """Tell whether another model has that name. One put there by hand may be added in its own place."""
    by_hand = not os.path.lexists(target / RECORD_FILE) and target.resolve() == source.resolve()
    return target.exists() and not by_hand


def _record(staged: ModelFolder, expect: str | None, trial: Trial | None, *, opened: bool) -> None:
    """Write the record of a copy. Raises DigestMismatch if its digest is not the expected one.

    ``opened``: its code has already run, in the sandbox, to write its manifest.
    """
    made = record.of(staged.path)
    if expect is not None and made.digest != expect:
        done = "it was run to write model.toml, and not added" if opened else "it was not opened"
        raise DigestMismatch(
            f"would have the digest {made.digest}, not {expect}; {done}", staged.manifest.name
        )
    record.write(staged.path, made)
    if trial is not None:
        learned = trial(replace(staged, record=made))
        record.write(staged.path, replace(made, **learned))


def _entry(path: Path) -> Entry:
    try:
        return Entry(name=path.name, path=path, folder=_open_installed(path), error=None)
    except ModelError as exc:
        return Entry(name=path.name, path=path, folder=None, error=exc)


def _name_what_was_given(error: GpuinferError, staged: Path, source: Path) -> None:
    """Make an error about a copy, which is deleted, name the file or folder that was copied."""
    folder = source
    if source.is_file():
        folder = source.parent
        error.message = error.message.replace(f"{staged}/{source.name}", str(source))
    error.message = error.message.replace(str(staged), str(folder))
    error.field = error.field and error.field.replace(str(staged), str(folder))


def _copy_model(source: Path, staged: Path, name: str, init: Init | None, *, fresh: bool) -> None:
    """Copy a file, or a folder with its sub-folders, as the model ``name``, and check its manifest."""
    if source.is_dir():
        _copy_folder(source, source.resolve(), staged)
    else:
        staged.mkdir()
        staged.chmod(0o755)
        _copy_file(source, source.resolve().parent, staged / record.checked_name(Path(source.name)))
    (staged / RECORD_FILE).unlink(missing_ok=True)
    if init is not None and (fresh or not (staged / MANIFEST_FILE).exists()):
        init(staged)
    if load_manifest(staged).name != name:
        _rename_in(staged / MANIFEST_FILE, name)
    folder = _open_folder(staged)
    if not folder.artefact.is_file():
        raise ManifestError(
            f"artefact = {folder.manifest.artefact!r}: there is no such file", str(source / MANIFEST_FILE)
        )


def _copy_folder(source: Path, root: Path, target: Path) -> None:
    target.mkdir()
    target.chmod(0o755)  # regardless of the umask, as workers run as another user
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == _BYTECODE:
            continue
        record.checked_name(Path(path.name))
        if path.is_dir() and not path.is_symlink():
            _copy_folder(path, root, target / path.name)
        else:
            _copy_file(path, root, target / path.name)


def _rename_in(manifest: Path, name: str) -> None:
    """Set the first top-level ``name`` of a manifest; leave the rest, including comments, unchanged."""
    text = manifest.read_text(encoding="utf-8")
    head = re.split(r"(?m)^(?=[ \t]*\[)", text, maxsplit=1)[0]
    tables = text[len(head) :]
    head = re.sub(r"(?m)^[ \t]*name[ \t]*=.*$", f'name = "{name}"', head, count=1)
    manifest.write_text(head + tables, encoding="utf-8")


def _copy_file(path: Path, root: Path, target: Path) -> None:
    """Copy one regular file; a link may only point to another file in ``root``."""
    real = path.resolve()
    if not real.is_relative_to(root):
        raise ManifestError(
            f"links to {real}, outside of its folder; a model must be self-contained", str(path)
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise ManifestError(
            "is not a regular file; a model may contain only folders and regular files", str(path)
        )
    # If it was replaced by a link or a pipe meanwhile, do not follow it or wait for it.
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o644)


def _replace(staged: Path, target: Path, old: Path) -> None:
    """Rename ``staged`` to ``target``. An earlier model moves to ``old``, and back if the rename fails."""
    if not os.path.lexists(target):
        staged.rename(target)
        return
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
