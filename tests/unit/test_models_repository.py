# SPDX-License-Identifier: Apache-2.0
"""The repository adds whole models or none, and one broken model hides no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuinfer.errors import DigestMismatch, ManifestError, ModelError, UnknownModel, UsageError
from gpuinfer.models.repository import Repository, verify
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
        assert folder.manifest.sha256 in (None, verify(folder))


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


def test_add_refuses_a_bad_digest_and_leaves_nothing(repository: Repository, source: Path) -> None:
    """A model whose artefact is not the manifest's is not installed, nor is half of it."""
    with (source / "model.pt").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DigestMismatch):
        repository.add(source)
    assert list(repository.folders[0].iterdir()) == []


def test_a_failed_replacement_keeps_the_old_model(repository: Repository, source: Path) -> None:
    """--force with a broken model leaves the sound one in place."""
    repository.add(source)
    (source / "model.pt").write_bytes(b"broken")
    with pytest.raises(DigestMismatch):
        repository.add(source, force=True)
    verify(repository.get("mlp"))


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
    with pytest.raises(ManifestError, match="links out"):
        repository.add(source, "second")
    assert not (repository.folders[0] / "second").exists()


def test_add_takes_plain_files_only(repository: Repository, source: Path) -> None:
    """A pipe is refused and not waited for; so is a sub-folder."""
    os.mkfifo(source / "pipe")
    with pytest.raises(ManifestError, match="no plain file"):
        repository.add(source)
    (source / "pipe").unlink()
    (source / "folder").mkdir()
    with pytest.raises(ManifestError, match="no plain file"):
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
