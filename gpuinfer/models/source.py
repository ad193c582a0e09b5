# SPDX-License-Identifier: Apache-2.0
"""A model to try without adding it: a folder, a file, or an installed model's name. Linked, not copied."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuinfer.errors import GpuinferError, ModelError, UnknownModel
from gpuinfer.models import examples, record, sandbox, scaffold
from gpuinfer.models.as_json import as_json
from gpuinfer.models.manifest import FORMATS, MANIFEST_FILE, load_manifest
from gpuinfer.models.record import RECORD_FILE, Record
from gpuinfer.models.repository import ModelFolder, Repository, name_of

#: Maximum number of files that are watched: a folder with more is not a model.
MOST_FILES = 20_000
_NO_PART = ("__pycache__", RECORD_FILE)
_STATES = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder or a file."""

    path: Path
    wanted: scaffold.Wanted
    #: The installed model; None if it is not installed.
    installed: ModelFolder | None = None

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    def state(self) -> _STATES:
        """Return path -> (time of change in ns, size) of its files. Raises ModelError for too many."""
        found: _STATES = {}
        for path in _files(self.path) if self.path.is_dir() else [self.path]:
            try:
                status = path.stat()
            except OSError:  # it was just deleted
                continue
            found[str(path)] = status.st_mtime_ns, status.st_size
            if len(found) > MOST_FILES:
                raise ModelError(
                    f"contains more than {MOST_FILES:,} files: it is not a model", str(self.path)
                )
        return found

    def link(self, models: Path) -> ModelFolder:
        """Make a model folder of links to its files, in ``models``; replaces an earlier one.

        Writes the manifest if it has none. Raises ManifestError, UsageError, ModelError.
        """
        text = self._manifest()
        scratch = models / ".new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / MANIFEST_FILE).write_text(text, encoding="utf-8")
        own = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        for path in own:
            if not path.name.startswith(".") and path.name not in (*_NO_PART, MANIFEST_FILE):
                (scratch / path.name).symlink_to(path)
        record.write(scratch, Record(digest=""))
        manifest = load_manifest(self.path if (self.path / MANIFEST_FILE).exists() else scratch)
        target = models / manifest.name
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        return ModelFolder(path=target, manifest=manifest)

    def write_manifest(self, copy: Path) -> None:
        """Write the manifest of a copy that has none. Raises UsageError, ModelError."""
        text = self._described(copy, replace(self.wanted, name=copy.name))
        (copy / MANIFEST_FILE).write_text(text, encoding="utf-8")
        (copy / MANIFEST_FILE).chmod(0o644)

    def _manifest(self) -> str:
        written = self.path / MANIFEST_FILE
        if self.path.is_dir() and written.exists():
            return written.read_text(encoding="utf-8")
        name = self.wanted.name or name_of(self.path)
        return self._described(self.folder, replace(self.wanted, name=name))

    def _described(self, folder: Path, wanted: scaffold.Wanted) -> str:
        artefact = scaffold.artefact_in(folder) if self.path.is_dir() else folder / self.path.name
        found = sandbox.ask("describe", path=str(artefact), class_name=wanted.class_name)
        return scaffold.manifest_text(artefact, found, wanted)


def find(name: str, repository: Callable[[], Repository], wanted: scaffold.Wanted) -> Source:
    """Find a model by name or path. A plain word means an installed model first; a folder is ``./word``.

    Raises UnknownModel, UsageError; ManifestError for an installed model that is broken.
    """
    path = Path(name)
    plain = os.sep not in name and path.suffix not in FORMATS and name not in (".", "..")
    if plain:
        try:
            folder = repository().get(name)
        except UnknownModel:
            if not path.exists():
                raise
        else:
            return Source(path=folder.path.resolve(), wanted=wanted, installed=folder)
    if path.is_dir():
        return Source(path=path.resolve(), wanted=wanted)
    if path.is_file():
        beside = path.resolve().parent
        if path.name == MANIFEST_FILE or _is_artefact(path, beside):
            return Source(path=beside, wanted=wanted)
        return Source(path=scaffold.checked_artefact(path.resolve()), wanted=wanted)
    raise UnknownModel("no such folder or file", name)


def _is_artefact(path: Path, folder: Path) -> bool:
    """Tell whether a file is the artefact of the manifest beside it."""
    try:
        return (folder / MANIFEST_FILE).exists() and load_manifest(folder).artefact == path.name
    except ModelError:
        return False


def _files(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in _NO_PART:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield Path(entry.path)


def check_readable(source: Source) -> None:
    """Raise ModelError if this process, which may have dropped root, cannot read all of the files."""
    try:
        paths = (str(source.path), *source.state())
        hidden = next((path for path in paths if not os.access(path, os.R_OK)), None)
    except PermissionError as exc:  # a parent folder, such as root's home
        hidden = str(exc.filename)
    if hidden is not None:
        who = pwd.getpwuid(os.geteuid()).pw_name
        raise ModelError(
            f"cannot be read by {who}, the user that would run it; copy it to a readable folder such as "
            "/srv (gpuinfer model add takes it from here)",
            hidden,
        )


def example_of(folder: ModelFolder) -> Any | None:
    """Return an ``inputs`` value as JSON that the model accepts; None if none is known.

    Raises the error of the model's file if that cannot be imported.
    """
    if folder.manifest.format == "python":
        cls = folder.manifest.class_name
        found = sandbox.ask("describe", path=str(folder.artefact), class_name=cls)
        if found["example"]:
            return found["example_value"]
    try:
        return as_json(examples.sample(folder))
    except GpuinferError:
        return None


def changed(before: _STATES, after: _STATES) -> Sequence[str]:
    """Return the names of files that differ."""
    return sorted(
        Path(name).name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
