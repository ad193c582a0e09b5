# SPDX-License-Identifier: Apache-2.0
"""The one reader of EnvironmentFile=; tests/host/test_install.py holds systemd to the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuinfer import env_file
from tests.env_files import TEXTS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("text", TEXTS)
def test_it_reads_as_systemd_does(text: str) -> None:
    """Quotes, backslashes, comments, continued lines, and what is dropped."""
    assert env_file.parse(text).variables == TEXTS[text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\nwhat is this\n", "line 2 is no NAME=value: systemd ignores it"),
        (
            "# c\nexport A=1",
            "line 2 has no name that a variable may have: systemd ignores it; leave out the word",
        ),
        ("A=1\nB='open\nC=1\n", "line 2 has a quote that nothing closes"),
    ],
)
def test_what_is_odd_is_named(text: str, words: str) -> None:
    """By its line, once."""
    (told,) = env_file.parse(text).remarks
    assert told.startswith(words)


def test_files(tmp_path: Path) -> None:
    """One that is not there gives nothing; one that systemd passes over gives nothing, and says so."""
    file = tmp_path / "worker@0.env"
    assert env_file.read(file) == env_file.EnvFile()
    for data in (b"A=1\nB=\xff\n", b"A=1\n\0"):
        file.write_bytes(data)
        found = env_file.read(file)
        assert found.variables == {}
        assert "systemd ignores all of it" in found.remarks[0]
