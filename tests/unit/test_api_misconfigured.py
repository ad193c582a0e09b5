# SPDX-License-Identifier: Apache-2.0
"""The front with wrong settings: when it takes them for right."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer.api import misconfigured
from gpuinfer.errors import ConfigError

pytestmark = pytest.mark.unit

WRONG = "[api\n"


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misconfigured, "LOOK_S", 0.001)


def read(file: Path) -> str:
    text = file.read_text()
    if text == WRONG:
        raise ConfigError("is not valid TOML", str(file))
    return text


def test_a_half_written_file_is_not_taken(tmp_path: Path) -> None:
    """What was written between two looks, or while it was read, is read again, though it was right."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(WRONG)
    coming = ["[api]\n", "[api]\ntls_cert =", "[api]\ntls_cert = 'a'\n"]
    seen: list[str] = []

    def prepare() -> str:
        if seen and coming:  # it is written on while it is read
            file.write_text(coming.pop(0))
        seen.append(file.read_text())
        return read(file)

    assert misconfigured.wait_for(prepare, [], file) == "[api]\ntls_cert = 'a'\n"
    assert seen[1:4] == ["[api]\n", "[api]\ntls_cert =", "[api]\ntls_cert = 'a'\n"]


def test_an_emptied_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor empties a file, then writes it; nobody knows how long that takes."""
    file = tmp_path / "gpuinfer.toml"
    file.write_text(WRONG)
    told: list[str] = []

    def edit(text: str) -> None:
        told.append(text)
        file.write_text("" if len(told) == 1 else "[api]\nport = 1\n")

    monkeypatch.setattr(misconfigured.log, "error", lambda _event, *, error, hint: edit(error))
    assert misconfigured.wait_for(lambda: read(file), [], file) == "[api]\nport = 1\n"
    assert ["is empty" in text for text in told] == [False, True]
