# SPDX-License-Identifier: Apache-2.0
"""What ``NAME|PATH`` stands for where a command tries a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer.errors import UnknownModel
from gpuinfer.models.repository import Repository
from gpuinfer.models.scaffold import Wanted
from gpuinfer.models.source import Source, find
from tests import models_for_tests as build

pytestmark = pytest.mark.unit


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    build.perceptron(tmp_path / "models" / "mlp")
    return Repository([tmp_path / "models"])


def found(name: str, repository: Repository) -> Source:
    return find(name, lambda: repository, Wanted())


def test_a_name_is_an_installed_model_before_a_folder_here(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies where the command is called; ./NAME and another folder's name are the folder."""
    here = tmp_path / "here"
    for name in ("mlp", "other"):
        build.perceptron(here / name)
    monkeypatch.chdir(here)
    assert found("mlp", repository).path == tmp_path / "models" / "mlp"
    assert found("./mlp", repository).path == here / "mlp"
    assert found("other", repository).path == here / "other"
    assert found(".", repository).path == here


@pytest.mark.parametrize("name", ["nosuch", "nosuch.pt", "./nosuch", "no/such"])
def test_what_is_neither(
    name: str, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is told the names that are known, a path that there is no such folder or file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel, match="known: .*mlp" if name == "nosuch" else "no such folder or file"):
        found(name, repository)
