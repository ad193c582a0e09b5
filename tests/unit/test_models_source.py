# SPDX-License-Identifier: Apache-2.0
"""What ``NAME|PATH`` stands for where a command tries a model."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from gpuinfer.errors import ModelError, UnknownModel
from gpuinfer.models.repository import Repository
from gpuinfer.models.scaffold import Wanted
from gpuinfer.models.source import Source, check_readable, find
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["model.py", "folder"])
def test_what_the_workers_user_cannot_reach(name: str, tmp_path: Path) -> None:
    """A file or folder in root's home: said with what helps, as which user, and without a traceback."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.py").write_text("")
    tmp_path.chmod(0o700)
    source = Source(path=tmp_path / name, wanted=Wanted())
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        with pytest.raises(
            ModelError, match="cannot be read by nobody, the user that would run it; copy it to"
        ):
            check_readable(source)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["nosuch", "nosuch.pt", "./nosuch", "no/such"])
def test_what_is_neither(
    name: str, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is told the names that are known, a path that there is no such folder or file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModel, match="known: .*mlp" if name == "nosuch" else "no such folder or file"):
        found(name, repository)
