# SPDX-License-Identifier: Apache-2.0
"""Keys: one file each, read and written, and the folder of them as it changes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpuinfer.errors import BadKey
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.keys.key import Key, digest, make_token, parse, rate_of, rate_text, serialise

pytestmark = pytest.mark.unit

HASH = "ab" * 32


def put(folder: Path, name: str, token: str, **fields: object) -> Key:
    """Write a key's file as the command does it: in its place at once."""
    key = Key(name=name, sha256=digest(token), **fields)  # type: ignore[arg-type]
    fresh = folder / f".{name}.new"
    fresh.write_text(serialise(key))
    fresh.rename(folder / f"{name}.toml")
    return key


# -- one key --------------------------------------------------------------------------------


def test_a_token_is_256_random_bits_with_a_prefix() -> None:
    """43 characters of base64url, none alike."""
    tokens = {make_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(
        len(one) == 47 and one.startswith("gpi_") and one[4:].replace("-", "").replace("_", "").isalnum()
        for one in tokens
    )


def test_what_is_written_is_read_again() -> None:
    """Every field, and none."""
    bare = Key(name="bare", sha256=HASH)
    full = Key(
        name="a_b-9",
        role="admin",
        sha256=HASH,
        models=("resnet", "a.b"),
        queues=("realtime",),
        rate=100 / 60,
        burst=7,
        max_waiting=5,
        max_waiting_bytes=2**30,
        weight=3,
        expires=1.8e9,
        created=1.7e9,
        prefix="gpi_AbC-_1",
        old_sha256="cd" * 32,
        old_expires=1.75e9,
    )
    for key in (bare, full):
        assert parse(key.name, serialise(key)) == key
    assert 'rate = "100/min"' in serialise(full)
    assert serialise(bare).count(" = ") == 2


@pytest.mark.parametrize("text", ["50/s", "100/min", "7/min", "1000/h", "1/h"])
def test_rates_are_written_as_they_were_given(text: str) -> None:
    """A person finds the number again."""
    assert rate_text(rate_of(text)) == (text if text != "1000/h" else "1000/h")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('role = "root"', "role = 'root': must be one of predict, read, admin"),
        ("role = 5", "role = 5: must be one of"),
        ('sha256 = "AB"', "sha256: must be the token's SHA-256: 64 hex digits in lower case"),
        ('models = "resnet"', "models = 'resnet': must be a list of strings"),
        ('models = ["a b"]', "'a b' is not a model name"),
        ('queues = ["fast"]', "'fast' is not a queue: must be one or more of realtime, default, batch"),
        ("rate = 50", "rate = 50: must be a number above 0 per unit, such as 50/s"),
        ('rate = "0/s"', "must be a number above 0"),
        ('rate = "5/day"', "must be a number above 0"),
        ("burst = -1", "burst = -1: must be a whole number from 0"),
        ("weight = 0", "weight = 0: must be a whole number from 1 to 1000"),
        ("weight = true", "weight = True: must be a whole number"),
        ("max_waiting = 1.5", "max_waiting = 1.5: must be a whole number"),
        (
            'expires = "2027-01-01"',
            "must be a time with a zone and without quotes, such as 2027-01-31T00:00:00Z",
        ),
        ("expires = 2027-01-01T00:00:00", "must be a time with a zone"),
        ("max_wating = 5", "max_wating is not a field of a key; the fields are role, sha256,"),
        ('old_sha256 = "' + HASH + '"', "old_sha256 and old_expires must be set together"),
        ("nonsense", "is not valid TOML"),
    ],
)
def test_a_wrong_field_is_named(line: str, words: str) -> None:
    """With its value, except for hashes, and what would be right."""
    good = {"role": 'role = "read"', "sha256": f'sha256 = "{HASH}"'}
    rest = [text for field, text in good.items() if not line.startswith(field)]
    with pytest.raises(BadKey) as caught:
        parse("shop", "\n".join([*rest, line]))
    assert words in str(caught.value)
    assert str(caught.value).startswith("shop.toml: ")


def test_all_that_is_wrong_is_told_at_once() -> None:
    """Also what is missing."""
    with pytest.raises(BadKey, match=r"weight = 0.*rate = 1.*role is missing; sha256 is missing"):
        parse("shop", "weight = 0\nrate = 1")


@pytest.mark.parametrize("name", ["", "Shop", "a.b", "a@b", "-a", "a" * 33, "a\n"])
def test_a_name_is_a_part_of_names_in_redis(name: str) -> None:
    """No dot, no @, nothing that a list's name separates by."""
    with pytest.raises(BadKey, match="must be 1 to 32 of a-z 0-9 _ -"):
        parse(name, f'role = "read"\nsha256 = "{HASH}"')


# -- the folder -----------------------------------------------------------------------------


def test_no_folder_means_no_keys(tmp_path: Path) -> None:
    """And none is made."""
    folder = KeyFolder(tmp_path / "none")
    assert not folder.refresh()
    assert not folder
    assert folder.find(b"gpi_x") is None


def test_a_token_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked up is its hash, which nobody can steer, and what decides is compare_digest."""
    put(tmp_path, "shop", "gpi_x")
    folder = KeyFolder(tmp_path)
    folder.refresh()
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return False

    monkeypatch.setattr("gpuinfer.keys.folder.compare_digest", compare)
    assert folder.find(b"gpi_x") is None
    assert compared == [(bytes.fromhex(digest("gpi_x")),) * 2]
    assert not any(b"gpi_x" in one for one in folder._by_digest)


def test_keys_come_change_and_go(tmp_path: Path) -> None:
    """Each at the next look; other files are nothing."""
    folder, token, other = KeyFolder(tmp_path), make_token(), make_token()
    (tmp_path / "README").write_text("x")
    assert not folder.refresh()
    key = put(tmp_path, "shop", token)
    assert folder.refresh()
    assert folder
    assert folder.find(token.encode()) == key
    assert folder.find(other.encode()) is None
    put(tmp_path, "shop", other, role="admin")
    assert folder.refresh()
    assert folder.find(token.encode()) is None
    found = folder.find(other.encode())
    assert found is not None
    assert found.role == "admin"
    assert not folder.refresh()
    (tmp_path / "shop.toml").unlink()
    assert folder.refresh()
    assert not folder
    assert folder.find(other.encode()) is None


def test_a_change_within_the_clock_s_step_is_seen(tmp_path: Path) -> None:
    """Written twice in place with the same length: times of files have steps of milliseconds."""
    folder, file, token, other = KeyFolder(tmp_path), tmp_path / "shop.toml", make_token(), make_token()
    for one in (token, other):
        file.write_text(f'role = "read"\nsha256 = "{digest(one)}"\n')
        folder.refresh()
        assert folder.find(one.encode()) is not None


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its time is past the clock's step."""
    put(tmp_path, "shop", "gpi_x")
    folder = KeyFolder(tmp_path, lambda: time.time() + 60)
    assert folder.refresh()
    monkeypatch.setattr("gpuinfer.keys.folder.parse", None)
    assert not folder.refresh()


def test_an_expired_key_is_told_from_an_unknown_one(tmp_path: Path) -> None:
    """It counts to its second, and is a key: loopback needs one still."""
    now = [1000.0]
    folder = KeyFolder(tmp_path, lambda: now[0])
    put(tmp_path, "shop", "gpi_x", expires=1100.0)
    folder.refresh()
    now[0] = 1099.9
    assert folder.find(b"gpi_x") is not None
    now[0] = 1100.0
    assert folder.find(b"gpi_x") is None
    assert folder.has_expired(b"gpi_x")
    assert not folder.has_expired(b"gpi_y")
    assert folder


def test_a_rotated_token_counts_as_long_as_was_said(tmp_path: Path) -> None:
    """Both are the same key meanwhile."""
    now = [1000.0]
    folder = KeyFolder(tmp_path, lambda: now[0])
    put(tmp_path, "shop", "gpi_new", old_sha256=digest("gpi_old"), old_expires=1060.0)
    folder.refresh()
    assert folder.find(b"gpi_old") == folder.find(b"gpi_new")
    now[0] = 1060.0
    assert folder.find(b"gpi_old") is None
    assert folder.find(b"gpi_new") is not None


def test_a_broken_file_refuses_its_own_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others hold; keys are in use, even if it is the only one."""
    folder = KeyFolder(tmp_path)
    put(tmp_path, "shop", "gpi_x")
    put(tmp_path, "lab", "gpi_y")
    folder.refresh()
    file = tmp_path / "shop.toml"
    file.write_text(file.read_text() + "weight = 0\n")
    assert folder.refresh()
    assert folder.find(b"gpi_x") is None
    assert folder.find(b"gpi_y") is not None
    assert "weight = 0: must be a whole number" in folder.broken["shop.toml"]
    (tmp_path / "lab.toml").unlink()
    folder.refresh()
    assert folder
    put(tmp_path, "shop", "gpi_x")
    folder.refresh()
    assert folder.find(b"gpi_x") is not None
    assert folder.broken == {}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * 70_000, b""])
def test_what_is_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    """No text, too long, empty."""
    (tmp_path / "shop.toml").write_bytes(content)
    folder = KeyFolder(tmp_path)
    assert folder.refresh()
    assert list(folder.broken) == ["shop.toml"]


def test_a_copy_of_a_key_under_another_name_is_no_key(tmp_path: Path) -> None:
    """Else whose tasks its requests are would be left to chance."""
    put(tmp_path, "shop", "gpi_x")
    put(tmp_path, "shop2", "gpi_x", role="admin")
    folder = KeyFolder(tmp_path)
    folder.refresh()
    found = folder.find(b"gpi_x")
    assert found is not None
    assert found.name == "shop"
    assert folder.broken["shop2.toml"] == "sha256: must differ from other keys, is the same as of key shop"
    (tmp_path / "shop.toml").unlink()
    folder.refresh()
    found = folder.find(b"gpi_x")
    assert found is not None
    assert found.name == "shop2"


def test_a_folder_that_cannot_be_read_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was revoked cannot be told then; once it can be read, its keys hold again."""
    put(tmp_path, "shop", "gpi_x")
    folder = KeyFolder(tmp_path)
    folder.refresh()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", _raise(PermissionError(13, "Permission denied")))
        assert folder.refresh()
        assert not folder.refresh()
        assert folder
        assert folder.find(b"gpi_x") is None
        assert folder.unreadable.endswith("Permission denied")
    assert folder.refresh()
    assert folder.find(b"gpi_x") is not None


def test_a_process_without_descriptors_keeps_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is let in does not depend on a burst of connections."""
    put(tmp_path, "shop", "gpi_x")
    folder = KeyFolder(tmp_path)
    folder.refresh()
    monkeypatch.setattr(os, "scandir", _raise(OSError(24, "Too many open files")))
    assert not folder.refresh()
    assert folder.find(b"gpi_x") is not None


def test_a_file_that_is_no_file_refuses_its_key(tmp_path: Path) -> None:
    """A folder of that name, say."""
    (tmp_path / "shop.toml").mkdir()
    folder = KeyFolder(tmp_path)
    folder.refresh()
    assert folder.broken == {"shop.toml": "cannot be read: Is a directory"}


def test_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    """To open it for reading waits for a writer."""
    os.mkfifo(tmp_path / "shop.toml")
    folder = KeyFolder(tmp_path)
    folder.refresh()
    assert list(folder.broken) == ["shop.toml"]


def test_a_key_is_never_changed() -> None:
    """Requests hold it while it is replaced."""
    key = Key(name="shop", sha256=HASH)
    assert replace(key, weight=2) != key
    with pytest.raises(AttributeError):
        key.weight = 2  # type: ignore[misc]


def _raise(error: OSError):  # type: ignore[no-untyped-def]
    def fails(*_: object) -> None:
        raise error

    return fails
