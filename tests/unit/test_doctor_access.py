# SPDX-License-Identifier: Apache-2.0
"""The doctor on who may connect, and on the keys' files."""

from __future__ import annotations

import grp
import os
import time
from pathlib import Path

import pytest

from gpuinfer.doctor import access, units
from gpuinfer.doctor.host import Finding, Host, Skipped
from gpuinfer.keys.key import Key, digest, make_token, serialise
from tests.services import make_certificate
from tests.unit.test_doctor_host import flat, host, one
from tests.unit.test_doctor_units import systemd, unit

pytestmark = pytest.mark.unit

KEYS = "/etc/gpuinfer/keys.d"
SHIPPED = "127.0.0.1:8080 (Stream)\nListen=/run/gpuinfer/api.sock (Stream)"
OPEN = f"{SHIPPED}\nListen=0.0.0.0:8443 (Stream)\nListen=[::]:8444 (Stream)"


def add_key(root: Path, name: str = "shop", *, expires: float | None = None) -> Path:
    folder = root / KEYS.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o750)
    file = folder / f"{name}.toml"
    file.write_text(serialise(Key(name=name, sha256=digest(make_token()), expires=expires)))
    file.chmod(0o640)
    return file


def listening(root: Path, listen: str = SHIPPED, **api: object) -> Host:
    return systemd(root, unit(units.SOCKET, Listen=listen), api=api)


def troubles(here: Host) -> list[Finding]:
    return [finding for finding in flat(access.connect(here)) if finding.status != "ok"]


def test_who_may_connect_as_shipped(tmp_path: Path) -> None:
    """What is local, and nobody else."""
    found = one(access.connect(listening(tmp_path)))
    assert (found.status, found.message) == (
        "ok",
        "listens at http://127.0.0.1:8080, /run/gpuinfer/api.sock; without a key: the Unix socket, loopback",
    )


def test_flower_is_named_while_it_runs(tmp_path: Path) -> None:
    """Where it listens, and as whom one logs in."""
    socket = unit(units.SOCKET, Listen=SHIPPED)
    for state, said in (("active", True), ("inactive", False)):
        found = one(access.connect(systemd(tmp_path, socket, unit(access.FLOWER, ActiveState=state))))
        assert found.message.endswith(f"; {access.FLOWER_WORDS}") is said


def test_who_may_connect_with_keys(tmp_path: Path) -> None:
    """Loopback needs one, too."""
    add_key(tmp_path)
    add_key(tmp_path, "app")
    found = one(access.connect(listening(tmp_path)))
    assert found.message.endswith("; without a key: the Unix socket; with a key: 2 keys")


def test_who_may_connect_without_systemd(tmp_path: Path) -> None:
    """What the settings say; without keys a network gets nothing, which is no trouble."""
    here = host(tmp_path, api={"host": "::", "port": 9000}, metrics={"listen": "[::]:9108"})
    found = one(access.connect(here))
    assert found.message == (
        "listens at http://[::]:9000; without a key: loopback; "
        "from the network nobody, until there is a key (gpuinfer key add NAME); "
        "metrics for everybody at [::]:9108"
    )


def test_open_without_tls(tmp_path: Path) -> None:
    """Trouble once somebody may come; none with a certificate."""
    assert troubles(listening(tmp_path, OPEN)) == []
    (anonymous,) = troubles(listening(tmp_path, OPEN, anonymous=["10.0.0.0/8"]))
    add_key(tmp_path)
    (found,) = troubles(listening(tmp_path, OPEN))
    assert found.status == anonymous.status == "warning"
    assert found.message.startswith("0.0.0.0:8443 is open to a network without TLS")
    certificate, key = make_certificate(tmp_path)
    inside = {"tls_cert": f"/{certificate.name}", "tls_key": f"/{key.name}"}
    (soon,) = troubles(listening(tmp_path, OPEN, **inside))  # it is made for two days
    assert soon.status == "warning"
    assert "expires in " in soon.message
    certificate.write_text("nothing")
    (broken,) = troubles(listening(tmp_path, OPEN, **inside))
    assert broken.message == "/tls.crt: the certificate cannot be read: it is damaged"


@pytest.mark.parametrize("network", ["0.0.0.0/0", "::/0", "128.0.0.0/1"])
def test_anybody_may_predict(network: str, tmp_path: Path) -> None:
    """An error, also where only loopback listens: a proxy may stand before it."""
    (found,) = troubles(listening(tmp_path, anonymous=[network, "10.0.0.0/8", "fc00::/7"]))
    assert found.status == "error"
    assert found.message.startswith(
        f"api.anonymous has {network}: everybody who reaches this host may predict"
    )


def test_any_page_may_ask(tmp_path: Path) -> None:
    """Only where its visitor needs no key."""
    (found,) = troubles(listening(tmp_path, cors_origins=["*"]))
    assert found.message.startswith("api.cors_origins is *: any web page")
    add_key(tmp_path)
    assert troubles(listening(tmp_path, cors_origins=["*"])) == []


def test_the_keys_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is named, with the command that fixes it; sound ones are counted."""
    monkeypatch.setattr(grp, "getgrnam", lambda _: _Group)
    with pytest.raises(Skipped, match="no key has been made"):
        access.keys(host(tmp_path))
    file = add_key(tmp_path)
    assert one(access.keys(host(tmp_path))).message == "1 key, readable only by gpuinfer-api"
    file.chmod(0o644)
    found = one(access.keys(host(tmp_path)))
    assert (found.status, found.remedy) == ("error", f"chmod 0640 {KEYS}/shop.toml")
    file.chmod(0o600)
    assert one(access.keys(host(tmp_path))).message == f"{KEYS}/shop.toml cannot be read by the API"
    file.chmod(0o640)
    os.chown(file, 12345, 0)
    assert "belongs to user 12345, who may change it" in one(access.keys(host(tmp_path))).message
    os.chown(file, 0, 12345)
    assert one(access.keys(host(tmp_path))).remedy.startswith(f"chgrp gpuinfer-api {KEYS}/shop.toml")
    os.chown(file, 0, 0)
    file.write_text('role = "king"\n')
    found = one(access.keys(host(tmp_path)))
    assert found.status == "error"
    assert "role = 'king': must be one of predict, read, admin" in found.message
    file.write_bytes(b"\xff")
    assert "must be UTF-8 text; this key is refused" in one(access.keys(host(tmp_path))).message


class _Group:
    gr_gid = 0


@pytest.mark.parametrize(
    ("days", "words"), [(-1, "the key shop has expired"), (3, "the key shop expires in 3.0 days"), (30, "")]
)
def test_keys_that_expire(days: float, words: str, tmp_path: Path) -> None:
    """A week before, and afterwards."""
    add_key(tmp_path, expires=time.time() + days * 86400 + 60)
    found = one(access.keys(host(tmp_path)))
    assert (found.status, found.message) == (("warning", words) if words else (found.status, found.message))
    assert (found.status == "ok") == (not words)


def test_units_listen_in_several_places(tmp_path: Path) -> None:
    """systemctl gives each a line."""
    tcp, unix = units.listeners(listening(tmp_path, OPEN))
    assert tcp == [("127.0.0.1", 8080), ("0.0.0.0", 8443), ("::", 8444)]
    assert unix == ["/run/gpuinfer/api.sock"]
