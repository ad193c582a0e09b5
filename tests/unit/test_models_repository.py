# SPDX-License-Identifier: Apache-2.0
"""The repository adds whole models or none, and one broken model hides no other."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from gpuinfer.errors import (
    DigestMismatch,
    ManifestError,
    ModelError,
    ModelLoadError,
    ModelNotAdded,
    UnknownModel,
    UsageError,
)
from gpuinfer.models import record
from gpuinfer.models.repository import ModelFolder, Repository, verify
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build.perceptron(tmp_path / "source" / "mlp")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository([tmp_path / "installed", tmp_path / "more"])


def test_shipped_models_are_always_there() -> None:
    """Without any folder, the shipped models are found, and their digests are right."""
    repository = Repository([])
    assert repository.names() == ("digits", "digits-photo")
    for name in repository.names():
        folder = repository.get(name)
        assert folder.shipped
        assert folder.record is not None
        assert verify(folder) == folder.record.digest


def test_add_get_remove(repository: Repository, source: Path) -> None:
    """A model is added to the first folder, found, and removed without a trace."""
    added = repository.add(source)
    assert added == repository.get("mlp")
    assert added.path == repository.folders[0] / "mlp"
    assert not added.shipped
    assert repository.names() == ("digits", "digits-photo", "mlp")
    assert added.path.stat().st_mode & 0o777 == 0o755
    assert added.artefact.stat().st_mode & 0o777 == 0o644
    assert repository.remove("mlp") == added.path
    assert list(repository.folders[0].iterdir()) == []
    with pytest.raises(UnknownModel):
        repository.get("mlp")


def test_add_under_another_name(repository: Repository, source: Path) -> None:
    """The copy's manifest takes the new name; the source keeps its own."""
    assert repository.add(source, "other").manifest.name == "other"
    assert 'name = "mlp"' in (source / "model.toml").read_text()
    assert 'name = "x"' in (repository.get("other").path / "model.toml").read_text()


def test_add_refuses_what_is_there_unless_forced(repository: Repository, source: Path) -> None:
    """A name that is taken needs --force, and then the new model is there whole."""
    repository.add(source)
    with pytest.raises(UsageError, match="--force"):
        repository.add(source)
    manifest = source / "model.toml"
    manifest.write_text(manifest.read_text().replace("max_batch_size = 256", "max_batch_size = 7"))
    assert repository.add(source, force=True).manifest.max_batch_size == 7
    assert [path.name for path in repository.folders[0].iterdir()] == ["mlp"]


def test_the_digest_is_of_the_whole_folder(repository: Repository, source: Path) -> None:
    """A shell computes the same; a file beside the artefact counts, in a sub-folder too."""
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "Ein Wörterbuch.txt").write_text("a b c")
    folder = repository.add(source)
    assert folder.record is not None
    assert set(folder.record.files) == {"model.pt", "model.toml", "tokenizer/Ein Wörterbuch.txt"}
    command = re.search(r"(?m)^    cd FOLDER(?:.|\n)*?sha256sum \| sha256sum$", record.__doc__ or "")
    assert command is not None
    shell = command[0].replace("FOLDER", shlex.quote(str(folder.path)))
    told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert folder.record.digest == f"sha256:{told.split()[0]}"
    (folder.path / "tokenizer" / "Ein Wörterbuch.txt").write_text("a b d")
    (folder.path / "new").touch()
    with pytest.raises(DigestMismatch, match=r"new is new, tokenizer/Ein Wörterbuch.txt has changed"):
        verify(repository.get("mlp"))


def test_the_same_folder_has_the_same_digest_everywhere(source: Path, tmp_path: Path) -> None:
    """Its record, hidden files and Python's caches are no part of it; its name is."""
    first = Repository([tmp_path / "first"]).add(source)
    (source / ".git").mkdir()
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "model.pyc").touch()
    second = Repository([tmp_path / "second"]).add(source)
    third = Repository([tmp_path / "third"]).add(second.path, "other")
    digests = [folder.record.digest for folder in (first, second, third) if folder.record]
    assert digests[0] == digests[1] != digests[2]


def test_an_expected_digest(repository: Repository, source: Path) -> None:
    """Whoever pins a model gets that one or none, and is told what came instead."""
    made = repository.add(source).record
    assert made is not None
    repository.add(source, force=True, expect=made.digest)
    (source / "beside").touch()
    with pytest.raises(DigestMismatch, match=f"not {made.digest}; it was not opened") as caught:
        repository.add(source, force=True, expect=made.digest)
    assert caught.value.field == "mlp"
    assert verify(repository.get("mlp")) == made.digest


def test_a_failed_trial_replaces_nothing(repository: Repository, source: Path) -> None:
    """What the trial raises ends it; what it learned is in the record; it sees the copy, record and all."""
    before = repository.add(source, trial=lambda _: {"example_ok": True}).record
    assert before is not None and before.example_ok

    def fails(folder: ModelFolder) -> Mapping[str, object]:
        assert folder.path.parent.parent == repository.folders[0]
        verify(repository_of(folder))
        raise ModelLoadError("no", "mlp")

    def names_its_file(folder: ModelFolder) -> Mapping[str, object]:
        raise ModelLoadError(f"{folder.artefact} is not loaded", str(folder.path))

    (source / "beside").touch()
    with pytest.raises(ModelLoadError):
        repository.add(source, force=True, trial=fails)
    with pytest.raises(ModelLoadError) as told:  # what was given, not the copy
        repository.add(source, force=True, trial=names_its_file)
    assert (told.value.message, told.value.field) == (f"{source}/model.pt is not loaded", str(source))
    assert repository.get("mlp").record == before
    assert [path.name for path in repository.folders[0].iterdir()] == ["mlp"]


def repository_of(folder: ModelFolder) -> ModelFolder:
    """Find a staged copy as a process that is given its path does."""
    return Repository([folder.path.parent]).get(folder.manifest.name)


def test_a_folder_without_a_record_is_not_served(repository: Repository, source: Path) -> None:
    """One that was put there by hand is told with the command that adds it, and that command works."""
    by_hand = repository.folders[0] / "mlp"
    shutil.copytree(source, by_hand, ignore=shutil.ignore_patterns("installed.json"))
    with pytest.raises(ModelNotAdded, match=f"gpuinfer model add {by_hand}"):
        repository.get("mlp")
    assert {entry.name: entry.error for entry in repository.entries()}["mlp"] is not None
    assert repository.add(by_hand) == repository.get("mlp")
    with pytest.raises(UsageError, match="--force"):
        repository.add(by_hand)


def test_a_broken_record_is_told(repository: Repository, source: Path) -> None:
    """It is no reason to serve the model unchecked."""
    folder = repository.add(source)
    (folder.path / "installed.json").write_text("{}")
    with pytest.raises(ModelError, match="gpuinfer model add writes it"):
        repository.get("mlp")


def test_a_missing_artefact_is_not_added(repository: Repository, source: Path) -> None:
    """The error names the key and leaves nothing behind."""
    (source / "model.pt").unlink()
    with pytest.raises(ManifestError, match=r"artefact = 'model.pt': there is no such file"):
        repository.add(source)
    assert list(repository.folders[0].iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "UP", "", "a/b", ".hidden", "x" * 65, "a\n"])
def test_names_cannot_leave_the_folder(repository: Repository, source: Path, name: str) -> None:
    """No name reaches outside of the folder, neither to add nor to find."""
    with pytest.raises(UnknownModel):
        repository.get(name)
    with pytest.raises(UnknownModel):
        repository.remove(name)
    if name:
        with pytest.raises(UsageError):
            repository.add(source, name)


def test_add_follows_no_link_out(repository: Repository, source: Path, tmp_path: Path) -> None:
    """A link to a file outside of the source is refused; one within it is copied as a file."""
    (source / "alias.pt").symlink_to("model.pt")
    repository.add(source)
    assert not (repository.get("mlp").path / "alias.pt").is_symlink()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "notes.txt").symlink_to(secret)
    with pytest.raises(ManifestError, match="outside of its folder"):
        repository.add(source, "second")
    assert not (repository.folders[0] / "second").exists()


def test_add_takes_plain_files_only(repository: Repository, source: Path) -> None:
    """A pipe is refused and not waited for, in a sub-folder too; so is a link to a folder."""
    os.mkfifo(source / "pipe")
    with pytest.raises(ManifestError, match="not a regular file"):
        repository.add(source)
    (source / "pipe").unlink()
    (source / "folder").mkdir()
    os.mkfifo(source / "folder" / "pipe")
    with pytest.raises(ManifestError, match="not a regular file"):
        repository.add(source)
    (source / "folder" / "pipe").unlink()
    (source / "link").symlink_to("folder")
    with pytest.raises(ManifestError, match="not a regular file"):
        repository.add(source)


def test_a_broken_manifest_hides_no_other(repository: Repository, source: Path) -> None:
    """A broken model is listed with its error, the others are found as ever."""
    repository.add(source)
    broken = repository.folders[1] / "bad"
    broken.mkdir(parents=True)
    (broken / "model.toml").write_text("name = ")
    assert repository.names() == ("digits", "digits-photo", "mlp")
    errors = {entry.name: entry.error for entry in repository.entries()}
    assert isinstance(errors["bad"], ManifestError)
    assert errors["mlp"] is None
    with pytest.raises(ManifestError, match="TOML"):
        repository.get("bad")
    assert repository.remove("bad") == broken


def test_the_first_folder_wins_even_when_broken(repository: Repository, source: Path) -> None:
    """A broken model is never silently replaced by another of its name."""
    broken = repository.folders[0] / "digits"
    broken.mkdir(parents=True)
    (broken / "model.toml").write_text("")
    with pytest.raises(ManifestError):
        repository.get("digits")
    repository.remove("digits")
    assert repository.get("digits").shipped


def test_a_manifest_must_bear_its_folders_name(repository: Repository, source: Path) -> None:
    """A folder that was renamed by hand says so."""
    folder = repository.add(source)
    folder.path.rename(folder.path.with_name("else"))
    with pytest.raises(ManifestError, match="'mlp': must be 'else'"):
        repository.get("else")


def test_unknown_model_helps(repository: Repository) -> None:
    """The error names the field, the nearest name and all known ones."""
    with pytest.raises(UnknownModel) as caught:
        repository.get("digit")
    assert caught.value.field == "model"
    assert "did you mean 'digits'" in caught.value.message
    assert "digits-photo" in caught.value.message


def test_shipped_models_stay(repository: Repository) -> None:
    """What came with the package is not removed."""
    with pytest.raises(UsageError, match="package"):
        repository.remove("digits")


def test_a_missing_artefact_is_told(repository: Repository, source: Path) -> None:
    """verify on a model whose artefact is gone names the model."""
    folder = repository.add(source)
    folder.artefact.unlink()
    with pytest.raises(ModelError) as caught:
        verify(folder)
    assert caught.value.field == "mlp"
