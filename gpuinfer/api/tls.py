# SPDX-License-Identifier: Apache-2.0
"""The front's certificate: read at the start, and again when its files change, as certbot renews them.

All connections share one context. A new certificate is tried in a context of its own first, and what was read
is what is taken, whatever happens to the files meanwhile. Open connections keep what they began with.
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
    """What the files held when they were read."""

    certificate: bytes
    key: bytes


class Certificate:
    """A certificate and its key, in ``context``. Call ``tick`` once a second.

    ``cert``: the chain in PEM; ``key``: the private key, None: it is in the chain's file. ``tell``: write to
    the log what is taken or refused; with several processes, one does.

    Raises ConfigError, naming the file, when they cannot be used.
    """

    def __init__(self, cert: Path, key: Path | None = None) -> None:
        self._cert, self._key = cert, key or cert
        self.tell = True
        self.context = _context()
        self._taken = self._pending = self._look()
        #: What was refused last: it is not tried, nor told of, again.
        self._refused: object = None
        try:
            self._take()
        except ConfigError as exc:
            raise ConfigError(exc.message, "api.tls_cert") from exc

    def tick(self) -> None:
        """Take new files once they have been the same for two ticks: one is written after the other."""
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
        """Raise ConfigError for what OpenSSL would only call a PEM error."""
        if BEGIN.encode() not in files.certificate:
            raise ConfigError(f"{self._cert}: holds no certificate in PEM ({BEGIN})")
        if _KEY.encode() not in files.key:
            raise ConfigError(f"{self._key}: holds no private key in PEM (-----BEGIN {_KEY})")
        if b"ENCRYPTED" in files.key:
            raise ConfigError(f"{self._key}: the key is encrypted, and nobody is there to type its password")


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")


def _reason(exc: Exception) -> str:
    reason = getattr(exc, "reason", None)
    if reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return f"cannot be used: {reason or exc}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from None


@contextmanager
def _as_paths(files: _Files) -> Iterator[list[str]]:
    """Give what was read a path each, without a file: OpenSSL takes nothing else here."""
    with ExitStack() as stack:
        paths = []
        for content in files:
            file = stack.enter_context(os.fdopen(os.memfd_create("tls"), "wb"))
            file.write(content)
            file.flush()
            paths.append(f"/proc/self/fd/{file.fileno()}")
        yield paths
