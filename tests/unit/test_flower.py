# SPDX-License-Identifier: Apache-2.0
"""How Flower is started: its queues are ours, and nobody gets in without a login."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpuinfer import flower
from gpuinfer.errors import ConfigError
from gpuinfer.queue.depth import Depth, Lane

pytestmark = pytest.mark.unit


def options(**chosen: object) -> SimpleNamespace:
    """Return Flower's options, those named here chosen."""
    return SimpleNamespace(**{"address": "", "unix_socket": "", "basic_auth": [], "auth": "", **chosen})


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "PASSWORD", tmp_path / "flower")


def test_queues_are_by_model() -> None:
    """The most urgent first, of all priorities, empty ones of known models too."""
    lanes = {Lane("batch", "resnet"): {0: 3, 9: 1}, Lane("realtime", "old"): {5: 2}}
    seen = Depth(lanes=lanes, claimed={}, inflight={}, dead_letters=0, catalogue={"resnet": 1.0})
    assert [(row["name"], row["messages"]) for row in flower.rows(seen)] == [
        ("realtime.old", 2),
        ("realtime.resnet", 0),
        ("default.resnet", 0),
        ("batch.resnet", 4),
    ]


def test_a_login_from_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd hands over; the host's file for who runs it by hand and may read that."""
    (tmp_path / "flower_password").write_text("handed\n")
    chosen = options()
    flower.close(chosen, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (chosen.address, chosen.basic_auth) == ("127.0.0.1", ["admin:handed"])
    (tmp_path / "flower").write_text("of the host")
    assert flower.password_of({}) == ("of the host", tmp_path / "flower")
    (tmp_path / "flower").write_text("\n")
    with pytest.raises(ConfigError, match="dpkg-reconfigure"):
        flower.password_of({})


def test_a_login_for_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no file: told to who has started it."""
    one, other = options(), options()
    for chosen in (one, other):
        flower.close(chosen, {})
    assert one.basic_auth != other.basic_auth
    user, _, password = one.basic_auth[0].partition(":")
    assert f"log in as {user} with {password}" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", [{"basic_auth": ["a:b"]}, {"auth": ".*@example[.]org"}])
def test_what_was_chosen_stays(chosen: dict[str, object]) -> None:
    """An own login, or a company's, at an own address."""
    found = options(address="0.0.0.0", **chosen)
    flower.close(found, {})
    assert found == options(address="0.0.0.0", **chosen)
    found = options(unix_socket="/run/f.sock")
    flower.close(found, {"FLOWER_UNAUTHENTICATED_API": "1"})
    assert found == options(unix_socket="/run/f.sock")


@pytest.mark.parametrize("said", ["", "0", "false", "No", "off"])
def test_a_no_keeps_the_login(said: str) -> None:
    """Flower's own variable opens it only where it says yes, as Flower reads it."""
    found = options()
    flower.close(found, {"FLOWER_UNAUTHENTICATED_API": said})
    assert found.basic_auth
    found = options()
    flower.close(found, {"FLOWER_UNAUTHENTICATED_API": "True"})
    assert not found.basic_auth


def test_neither_yes_nor_no_is_refused() -> None:
    """Named, with what would be right; nobody is let in."""
    with pytest.raises(ConfigError, match="must be true or false, got 'maybe'") as refused:
        flower.close(options(), {"FLOWER_UNAUTHENTICATED_API": "maybe"})
    assert "FLOWER_UNAUTHENTICATED_API" in str(refused.value)
