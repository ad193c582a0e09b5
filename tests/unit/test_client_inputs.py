# SPDX-License-Identifier: Apache-2.0
"""Files that a client or the command line is given."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuinfer.client.inputs import opened, read_batch, read_field, read_input
from gpuinfer.client.signatures import Signatures
from gpuinfer.client.submissions import build
from gpuinfer.errors import InputError

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8 a cat")
    (tmp_path / "letter.txt").write_text("Guten Tag \u2026", encoding="utf-8")
    (tmp_path / "box.json").write_text("[1, 2]")
    np.save(tmp_path / "x.npy", np.arange(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


CAT = {"b64": b"\xff\xd8 a cat", "name": "cat.jpg"}


def test_what_a_path_is_sent_as(folder: Path) -> None:
    """By its suffix where the kind is not known, and by the kind where it is."""
    assert opened(folder / "cat.jpg", many=False) == CAT
    assert opened(folder / "letter.txt", many=False) == "Guten Tag \u2026"
    assert opened(folder / "box.json", many=False) == [1, 2]
    assert opened(folder / "x.npy", many=False).tolist() == [0, 1, 2]
    assert opened(folder / "box.json", many=False, kinds={"doc": "file"}) == {
        "b64": b"[1, 2]",
        "name": "box.json",
    }
    assert opened(folder / "box.json", many=False, kinds={"doc": "text"}) == "[1, 2]"
    two = {"image": folder / "cat.jpg", "question": "what?"}
    assert opened(two, many=False) == {"image": CAT, "question": "what?"}
    assert opened([folder / "cat.jpg", two], many=True) == [CAT, {"image": CAT, "question": "what?"}]


def test_submit_takes_a_path(folder: Path) -> None:
    """``client.submit(Path("cat.jpg"))``: the message carries the bytes, small ones in base64."""
    body = build(Signatures().ready(None, folder / "cat.jpg", many=False), many=False).pack()
    assert body.inputs == b'{"b64":"/9ggYSBjYXQ=","name":"cat.jpg"}'


def test_an_argument_of_submit(folder: Path) -> None:
    """JSON, or the name of a file, with @ where it could be either."""
    assert read_input("[1.5]") == [1.5]
    assert read_input("cat.jpg") == Path("cat.jpg")
    (folder / "7").write_bytes(b"seven")
    assert read_input("7") == 7
    assert read_input("@7") == Path("7")
    assert read_field("image=@cat.jpg") == ("image", Path("cat.jpg"))
    assert read_field("top=3") == ("top", 3)
    assert read_field("question=a=b?") == ("question", "a=b?")
    assert read_batch(["box.json"]) == [1, 2]


@pytest.mark.parametrize(("data", "value"), [(b"[1]", [1]), (b"\xff\xd8", {"b64": b"\xff\xd8", "name": ""})])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, value: Any) -> None:
    """JSON, or a file."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_input("-") == value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: read_input("dog.jpg"), "dog.jpg: is not JSON, and there is no such file"),
        (lambda: read_input("[1, 2"), "is not JSON"),
        (lambda: read_input("."), "is a folder"),
        (lambda: read_input("x" * 5000), "neither JSON nor a file name"),
        (lambda: read_field("cat.jpg"), "must be NAME=VALUE"),
        (lambda: read_batch(["cat.jpg"]), "must hold the list of inputs"),
        (lambda: opened(Path("gone.png"), many=False), "gone.png: cannot be read"),
        (lambda: opened(Path("cat.jpg"), many=False, kinds={"x": "text"}), "cat.jpg: is not UTF-8 text"),
    ],
)
def test_what_is_no_input(folder: Path, call: Any, words: str) -> None:
    """An InputError that names the argument or the file."""
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
