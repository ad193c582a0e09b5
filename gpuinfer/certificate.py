# SPDX-License-Identifier: Apache-2.0
"""When an X.509 certificate expires, which Python's ssl does not tell of a file; and TLS that checks none."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime

BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_UTC_TIME = 0x17
_VERSION = 0xA0


def unverified() -> ssl.SSLContext:
    """Return a client's context that takes any certificate, for a look at a server by another name."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def not_after(pem: bytes) -> datetime:
    """Return when the first certificate of a PEM file expires (RFC 5280 4.1.2.5). Raises ValueError."""
    text = pem.decode("latin-1")
    begin = text.find(BEGIN)
    end = text.find(END, begin)
    try:
        der = ssl.PEM_cert_to_DER_cert(text[begin:end] + END)
        fields = _elements(der, *_body(der, _body(der, 0)[0]))
        # version (may be missing), serial number, algorithm, issuer, validity
        validity = fields[4] if fields[0][0] == _VERSION else fields[3]
        tag, start, stop = _elements(der, *validity[1:])[1]
        written = der[start:stop].decode("ascii").removesuffix("Z")
        if tag == _UTC_TIME:  # two digits of the year, of 1950 to 2049
            written = ("19" if written >= "50" else "20") + written
        return datetime.strptime(written, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    except (ValueError, IndexError):
        raise ValueError("the certificate cannot be read: it is damaged") from None


def _body(der: bytes, at: int) -> tuple[int, int]:
    """Return where the contents of the DER element at a place begin and end."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[start : start + size])
        start += size
    return start, start + length


def _elements(der: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """Return tag, begin and end of each DER element between two places."""
    found = []
    while at < end:
        start, stop = _body(der, at)
        found.append((der[at], start, stop))
        at = stop
    return found
