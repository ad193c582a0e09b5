# SPDX-License-Identifier: Apache-2.0
"""The front's certificate: read, renewed, and kept when what comes after it is broken."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog

from gpuinfer.api.tls import Certificate
from gpuinfer.certificate import not_after
from gpuinfer.errors import ConfigError
from tests.services import make_certificate

pytestmark = pytest.mark.unit

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    """Two certificates with their keys."""
    first, second = (make_certificate(tmp_path_factory.mktemp("tls")) for _ in range(2))
    return first, second


@pytest.fixture
def files(pairs: tuple[Pair, Pair], tmp_path: Path) -> Pair:
    """The first of them where a front reads it."""
    return put(pairs[0], tmp_path)


def put(pair: Pair, folder: Path) -> Pair:
    """Copy a pair to where the front reads it, by a rename."""
    for source, name in zip(pair, ("fullchain.pem", "privkey.pem"), strict=True):
        new = folder / f"{name}.new"
        shutil.copyfile(source, new)
        new.rename(folder / name)
    return folder / "fullchain.pem", folder / "privkey.pem"


def shown(certificate: Certificate) -> bytes:
    """Return the certificate that a new connection gets, in DER."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serving = threading.Thread(target=_serve, args=(certificate.context, theirs))
        serving.start()
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(ours) as connection:
            found = connection.getpeercert(binary_form=True)
        serving.join(60)
    assert found is not None
    return found


def _serve(context: ssl.SSLContext, connection: socket.socket) -> None:
    with context.wrap_socket(connection, server_side=True) as found:
        found.recv(1)


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair[0].read_text())


def test_a_renewed_certificate_is_taken(pairs: tuple[Pair, Pair], files: Pair, tmp_path: Path) -> None:
    """By connections from then on, and once: a look at files that are the same does nothing."""
    certificate = Certificate(*files)
    assert shown(certificate) == der(pairs[0])
    put(pairs[1], tmp_path)
    with structlog.testing.capture_logs() as lines:
        for _ in range(4):
            certificate.tick()
    assert shown(certificate) == der(pairs[1])
    assert [line["event"] for line in lines] == ["certificate_renewed"]


def test_certbots_links_are_followed(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    """A renewal points live/ at other files; their names stay."""
    live = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"
    for link, target in zip(live, pairs[0], strict=True):
        link.symlink_to(target)
    certificate = Certificate(*live)
    for link, target in zip(live, pairs[1], strict=True):
        new = link.with_suffix(".new")
        new.symlink_to(target)
        new.rename(link)
        certificate.tick()  # between the two: the new chain with the old key is not tried yet
    with structlog.testing.capture_logs() as lines:
        certificate.tick()
    assert shown(certificate) == der(pairs[1])
    assert [line["event"] for line in lines] == ["certificate_renewed"]


@pytest.mark.parametrize("broken", ["other key", "garbage", "damaged", "empty", "gone", "no key"])
def test_a_broken_one_keeps_the_old(
    broken: str, pairs: tuple[Pair, Pair], files: Pair, tmp_path: Path
) -> None:
    """And it is said once, with the file's name; what is right afterwards is taken."""
    certificate = Certificate(*files)
    chain, key = files
    if broken == "other key":
        key.write_bytes(pairs[1][1].read_bytes())
    elif broken == "gone":
        chain.unlink()
    elif broken == "no key":
        key.write_bytes(chain.read_bytes())
    else:
        text = chain.read_bytes()
        chain.write_bytes(
            {"garbage": b"x" * 100, "empty": b"", "damaged": text[:200] + b"A" * 80 + text[280:]}[broken]
        )
    with structlog.testing.capture_logs() as lines:
        for _ in range(5):
            certificate.tick()
    assert [line["event"] for line in lines] == ["certificate_refused"]
    assert str(tmp_path) in lines[0]["reason"] + lines[0]["file"]
    assert shown(certificate) == der(pairs[0])
    put(pairs[1], tmp_path)
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            certificate.tick()
    assert [line["event"] for line in lines] == ["certificate_renewed"]
    assert shown(certificate) == der(pairs[1])


def test_one_of_several_processes_says_so(pairs: tuple[Pair, Pair], files: Pair, tmp_path: Path) -> None:
    """The others take it without a word."""
    certificate = Certificate(*files)
    certificate.tell = False
    put(pairs[1], tmp_path)
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            certificate.tick()
        files[0].unlink()
        for _ in range(3):
            certificate.tick()
    assert lines == []
    assert shown(certificate) == der(pairs[1])


@pytest.mark.parametrize(
    ("chain", "key", "words"),
    [
        (None, "key", "cannot be read: No such file or directory"),
        (b"nothing", "key", "contains no PEM certificate"),
        ("chain", b"nothing", "contains no PEM private key"),
        ("chain", "other key", "the key does not belong to the certificate"),
        ("chain", "encrypted", "the key is encrypted; it must have no passphrase"),
        ("chain", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n", "cannot be used"),
    ],
)
def test_the_start_names_what_is_wrong(
    chain: object, key: object, words: str, pairs: tuple[Pair, Pair], tmp_path: Path
) -> None:
    """The setting, the file and the fault: plain HTTP in its place would be worse than no start."""
    (first, own), (_, other) = pairs
    texts = {"chain": first.read_bytes(), "key": own.read_bytes(), "other key": other.read_bytes()}
    if key == "encrypted":
        command = ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", str(own)]
        texts["encrypted"] = subprocess.run(command, check=True, capture_output=True).stdout
    files = tmp_path / "chain.pem", tmp_path / "key.pem"
    for path, what in zip(files, (chain, key), strict=True):
        if what is not None:
            path.write_bytes(texts[what] if isinstance(what, str) else what)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words) as caught:
        Certificate(*files)
    assert caught.value.field == "api.tls_cert"
    assert str(tmp_path) in caught.value.message


def test_one_file_for_both(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    """As HAProxy has them: the key in the certificate's file."""
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(path.read_bytes() for path in pairs[0]))
    assert shown(Certificate(both)) == der(pairs[0])


def test_when_a_certificate_expires(pairs: tuple[Pair, Pair]) -> None:
    """As openssl has it."""
    said = subprocess.run(
        ["openssl", "x509", "-enddate", "-noout", "-in", str(pairs[0][0])],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    expected = ssl.cert_time_to_seconds(said.strip().removeprefix("notAfter="))
    assert not_after(pairs[0][0].read_bytes()) == datetime.fromtimestamp(expected, UTC)
    with pytest.raises(ValueError, match="damaged"):
        not_after(b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
