# SPDX-License-Identifier: Apache-2.0
"""The API's TLS certificate: read at the start, and again when its files change (certbot renews them).

All connections share one context. A new certificate is first tried in a separate context; exactly the bytes
tried are used, even if the files change meanwhile. Open connections keep the old certificate.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from gpuinfer.certificate import BEGIN, not_after
from gpuinfer.errors import ConfigError
from gpuinfer.log import get_logger
from gpuinfer.sources import file_state

log = get_logger(__name__)

_KEY = "PRIVATE KEY-----"


class _Files(NamedTuple):
    """Contents of the files."""

    certificate: bytes
    key: bytes


class Certificate:
    """A certificate and its key, in ``context``. Call ``tick`` once a second.

    ``cert``: the chain in PEM; ``key``: the private key, None: in the file of the chain. ``tell``: log new
    and refused certificates; of several processes, one does.

    Raises ConfigError, naming the file, if they cannot be used.
    """

    def __init__(self, cert: Path, key: Path | None = None) -> None:
        self._cert, self._key = cert, key or cert
        self.tell = True
        self.context = _context()
        self._taken = self._pending = self._look()
        #: State of the files last refused, which are not tried or logged again.
        self._refused: object = None
        try:
            self._take()
        except ConfigError as exc:
            raise ConfigError(exc.message, "api.tls_cert") from exc

    def tick(self) -> None:
        """Use new files after two ticks without a change, as the two files are written one after the
        other."""
        seen = self._look()
        if seen == self._taken:
            self._refused = None
        elif seen == self._pending and seen != self._refused:
            try:
                expires = self._take()
            except ConfigError as exc:
                self._refused = seen
                if self.tell:
                    log.error("certificate_refused", reason=exc.message, file=str(self._cert))
            else:
                self._taken, self._refused = seen, None
                if self.tell:
                    log.info("certificate_renewed", file=str(self._cert), expires=expires.isoformat())
        self._pending = seen

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(file_state(path) for path in dict.fromkeys((self._cert, self._key)))

    def _take(self) -> datetime:
        """Read the files into the context; return when the certificate expires. Raises ConfigError."""
        files = _Files(_read(self._cert), _read(self._key))
        self._check(files)
        try:
            expires = not_after(files.certificate)
        except ValueError as exc:
            raise ConfigError(f"{self._cert}: {exc}") from None
        with _as_paths(files) as (cert, key):
            for context in (_context(), self.context):
                try:
                    context.load_cert_chain(cert, key, password=_no_password)
                except (ssl.SSLError, ValueError) as exc:
                    raise ConfigError(f"{self._cert}, {self._key}: {_reason(exc)}") from exc
        return expires

    def _check(self, files: _Files) -> None:
        """Raise ConfigError for errors that OpenSSL would only call a PEM error."""
        if BEGIN.encode() not in files.certificate:
            raise ConfigError(f"{self._cert}: contains no PEM certificate ({BEGIN})")
        if _KEY.encode() not in files.key:
            raise ConfigError(f"{self._key}: contains no PEM private key (-----BEGIN {_KEY})")
        if b"ENCRYPTED" in files.key:
            raise ConfigError(f"{self._key}: the key is encrypted; it must have no passphrase")


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; it must have no passphrase")


def _reason(exc: Exception) -> str:
    reason = getattr(exc, "reason", None)
    if reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    return f"cannot be used: {reason or exc}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from None


@contextmanager
def _as_paths(files: _Files) -> Iterator[list[str]]:
    """Yield paths for the contents, without files on disk, because OpenSSL only accepts paths."""
    with ExitStack() as stack:
        paths = []
        for content in files:
            file = stack.enter_context(os.fdopen(os.memfd_create("tls"), "wb"))
            file.write(content)
            file.flush()
            paths.append(f"/proc/self/fd/{file.fileno()}")
        yield paths
