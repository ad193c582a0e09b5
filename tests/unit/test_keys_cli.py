# SPDX-License-Identifier: Apache-2.0
"""``gpuinfer key``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gpuinfer.errors import BadKey, GpuinferError, KeyExists, UnknownKey, UsageError
from gpuinfer.keys import cli, writing
from gpuinfer.keys.folder import KeyFolder
from gpuinfer.keys.key import Key, digest
from gpuinfer.settings import Loaded, Settings

pytestmark = pytest.mark.unit


class Command:
    """The command with its folder; an error of ours is raised as the root command would meet it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Nobody listens there.
        settings = Settings(broker={"url": "redis://127.0.0.1:1/0"}, api={"keys_dir": folder})  # type: ignore[arg-type]
        self._loaded = Loaded(settings, {})

    def run(self, *arguments: str) -> Result:
        """Return what came of it."""
        done = CliRunner().invoke(cli.key, list(arguments), obj=self._loaded)
        if isinstance(done.exception, GpuinferError):
            raise done.exception
        return done

    def json(self, *arguments: str) -> Any:
        """Return what it prints for programs."""
        return json.loads(self.run(*arguments, "--json").stdout)

    def find(self, token: str) -> Key | None:
        """Return the key that the front finds for a token."""
        folder = KeyFolder(self.folder)
        folder.refresh()
        return folder.find(token.encode())


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on a folder that is not there yet; this machine's journal hears nothing."""
    monkeypatch.setattr(cli, "_JOURNAL", tmp_path / "no journal")
    return Command(tmp_path / "etc" / "keys.d")


def test_a_key_from_its_making_to_its_end(key: Command) -> None:
    """The token is alone on stdout, once; the file has its hash; loopback's need of a key is told."""
    done = key.run("add", "shop")
    token = done.stdout.strip()
    assert token.startswith("gpi_")
    assert "requests over loopback now need a key, too" in done.stderr
    file = key.folder / "shop.toml"
    assert token not in file.read_text()
    assert digest(token) in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) & 0o137 == 0
    assert stat.S_IMODE(key.folder.stat().st_mode) & 0o027 == 0
    found = key.find(token)
    assert found is not None
    assert found.role == "predict"
    assert "loopback" not in key.run("add", "lab").stderr
    assert token[:10] in key.run("list").stdout
    assert token not in key.run("list").stdout + key.run("show", "shop").stdout + str(key.json("list"))
    assert "revoked: shop, lab" in (said := key.run("revoke", "shop", "lab").stdout)
    assert "no keys left" in said
    assert key.find(token) is None
    assert list(key.folder.iterdir()) == []


def test_all_options_reach_the_file(key: Command) -> None:
    """Lists by commas or by repetition; sizes with units; spans and dates."""
    made = key.json(
        *(
            "add",
            "lab",
            "--role",
            "admin",
            "--models",
            "resnet, digits",
            "--models",
            "vqa",
            "--queues",
            "batch",
        ),
        *("--rate", "100/min", "--burst", "20", "--max-waiting", "50", "--max-waiting-bytes", "64M"),
        *("--weight", "3", "--expires", "90d"),
    )
    found = key.find(made["token"])
    assert found is not None
    assert found.expires is not None
    assert 90 * 86400 - 60 < found.expires - time.time() <= 90 * 86400
    assert (found.role, found.models, found.queues) == ("admin", ("resnet", "digits", "vqa"), ("batch",))
    assert (found.burst, found.max_waiting, found.max_waiting_bytes, found.weight) == (20, 50, 64 * 2**20, 3)
    shown = key.json("show", "lab")
    assert (shown["rate"], shown["weight"], shown["models"]) == ("100/min", 3, ["resnet", "digits", "vqa"])
    assert shown["last_used"] is None
    assert not any("sha256" in field for field in shown)
    made = key.json("add", "other", "--expires", "2099-01-31")
    assert made["expires"] == "2099-01-31T00:00:00Z"
    assert (
        key.json("add", "third", "--expires", "2099-01-31T12:00:00+02:00")["expires"]
        == "2099-01-31T10:00:00Z"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--role", "root"), "'root' is not one of 'predict', 'read', 'admin'"),
        (("--models", "a b"), "'a b' is not a model name"),
        (("--queues", "fast"), "'fast' is not a queue"),
        (("--rate", "50"), "'50': must be a number above 0 per unit, such as 50/s"),
        (("--burst", "0"), "'--burst'"),
        (("--weight", "0"), "'--weight'"),
        (("--max-waiting-bytes", "64 apples"), "must be a number of bytes such as 1000000, 64M or 2G"),
        (("--expires", "soon"), "must be a time span or a time, such as 30d"),
        (("--expires", "2001-01-01"), "must be in the future, got 2001-01-01"),
    ],
)
def test_a_wrong_option_is_named(key: Command, arguments: tuple[str, ...], words: str) -> None:
    """Nothing is written."""
    done = key.run("add", "shop", *arguments)
    assert done.exit_code == 2  # the root command makes it 64
    assert words in done.stderr
    assert not key.folder.exists()


def test_what_is_refused(key: Command) -> None:
    """A name that is none, taken, or not there; a burst without a rate; all or none is revoked."""
    for name in ("Shop", "a.b", "../x", "a" * 33):
        for command in ("add", "show", "revoke", "rotate"):
            with pytest.raises(UsageError, match="must be 1 to 32 of a-z"):
                key.run(command, name)
    with pytest.raises(UsageError, match="needs --rate"):
        key.run("add", "shop", "--burst", "5")
    token = key.run("add", "shop").stdout.strip()
    with pytest.raises(KeyExists, match="gpuinfer key rotate shop"):
        key.run("add", "shop")
    for command in ("show", "rotate", "revoke"):
        with pytest.raises(UnknownKey, match=r"there is no key lab in .*; the keys are: shop"):
            key.run(command, "lab")
    with pytest.raises(UnknownKey):
        key.run("revoke", "shop", "lab")
    assert key.find(token) is not None
    assert [file.name for file in key.folder.iterdir()] == ["shop.toml"]


def test_a_rotation_keeps_all_but_the_token(key: Command) -> None:
    """The old one is refused at once, or counts for as long as is said."""
    old = key.json("add", "shop", "--rate", "5/s", "--role", "read")["token"]
    done = key.run("rotate", "shop")
    new = done.stdout.strip()
    assert "the old token is refused" in done.stderr
    assert key.find(old) is None
    found = key.find(new)
    assert found is not None
    assert (found.role, found.rate) == ("read", 5.0)
    newest = key.json("rotate", "shop", "--keep", "1h", "--expires", "30d")
    assert "the old token is valid until" in newest["notes"][0]
    assert key.find(new) == key.find(newest["token"]) is not None
    again = key.run("rotate", "shop").stdout.strip()
    assert key.find(new) is None
    assert key.find(newest["token"]) is None
    assert key.find(again) is not None
    assert "must be a time span" in key.run("rotate", "shop", "--keep", "soon").stderr


def test_rotating_an_expired_key_says_so(key: Command) -> None:
    """A new token of it would be refused, too."""
    key.folder.mkdir(parents=True)
    writing.add(key.folder, Key(name="old", sha256="ab" * 32, expires=1e9))
    assert "the key expired on 2001-09-09T01:46:40Z: renew it with" in key.run("rotate", "old").stderr
    assert "expired" in key.run("list").stdout or key.json("list")["keys"][0]["expires"] < "2002"


def test_a_broken_file_is_told_and_can_be_revoked(key: Command) -> None:
    """The others are listed; the exit code is that of a wrong configuration."""
    key.run("add", "shop")
    (key.folder / "lab.toml").write_text("role = 5")
    with pytest.raises(BadKey, match=r"lab\.toml: role = 5: must be one of") as caught:
        key.run("list")
    assert caught.value.exit_code == 78
    with pytest.raises(BadKey, match=r"lab\.toml: role = 5"):
        key.run("show", "lab")
    key.run("revoke", "lab")
    assert [one["name"] for one in key.json("list")["keys"]] == ["shop"]


def test_what_the_system_refuses(key: Command) -> None:
    """A file in the place of the folder."""
    key.folder.parent.mkdir()
    key.folder.write_text("")
    for arguments in (("add", "shop"), ("list",), ("revoke", "shop")):
        with pytest.raises(GpuinferError, match=r"api\.keys_dir: .*(Not a directory|File exists)"):
            key.run(*arguments)


def test_without_keys(key: Command) -> None:
    """The command that makes one."""
    assert "`gpuinfer key add NAME` makes one" in key.run("list").stdout
    assert key.json("list") == {"keys": [], "broken": []}


def test_the_shell_completes_names(key: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that are there; nothing where they cannot be read."""
    monkeypatch.setenv("GPUINFER_API_KEYS_DIR", str(key.folder))
    (argument,) = (one for one in cli.key.commands["show"].params if one.name == "name")
    context = click.Context(cli.key.commands["show"])
    assert argument.shell_complete(context, "") == []
    for name in ("shop", "lab"):
        key.run("add", name)
    assert [one.value for one in argument.shell_complete(context, "s")] == ["shop"]
