# SPDX-License-Identifier: Apache-2.0
"""Who may connect to the front: where it listens, who is let in there, and what is wrong with that."""

from __future__ import annotations

import grp
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

from gpuinfer.addresses import address
from gpuinfer.certificate import not_after
from gpuinfer.doctor.finding import Finding, Findings, Skipped, edit, error, ok, warning
from gpuinfer.doctor.host import Host
from gpuinfer.doctor.units import SOCKET, addresses, paths, show
from gpuinfer.errors import BadKey
from gpuinfer.keys.key import SUFFIX, Key, parse
from gpuinfer.settings import DEFAULT_FILE, ApiSettings

FLOWER = "gpuinfer-flower.service"
#: Who may use it, as its unit is shipped.
FLOWER_WORDS = "Flower http://127.0.0.1:5555: this host, as admin with its password"
#: Who reads the keys; a key's file and the folder belong to root and this group.
GROUP = "gpuinfer-api"
_FOLDER_MODE, _FILE_MODE = 0o750, 0o640
#: What is wrong soon is said this long before.
_SOON_S = 7 * 86400.0
#: A network with fewer bits than these is not somebody's own any more: 10.0.0.0/8 and fc00::/7 are.
_LEAST_BITS = {4: 8, 6: 7}


def connect(host: Host) -> Findings:
    """Who may connect to the front: where it listens, and who is let in there; nobody who should not be."""
    api = host.settings.api
    tcp, unix = _listeners(host)
    names = _names(host)
    opened = [where for where in tcp if not _is_loopback(where[0])]
    found = [
        *_in_clear(api, opened, names),
        *_anybody(api),
        *_pages(api, names),
        *_certificate(host, api),
    ]
    metrics = host.settings.metrics.listen
    said = f"{_where(api, tcp, unix)}; {_who(api, names, unix, opened)}"
    said += f"; metrics for everybody at {metrics}" if metrics else ""
    said += _flower(host)
    return found or ok(said)


def keys(host: Host) -> Findings:
    """The keys' files are whole, readable by the front alone, and none expires within a week."""
    shown = host.settings.api.keys_dir
    folder = host.path(shown)
    if not folder.is_dir():
        raise Skipped(f"{shown} is not there: no key has been made")
    try:
        files = sorted(folder.glob(f"*{SUFFIX}"))
        found = list(_modes(folder, str(shown), _FOLDER_MODE))
        for file in files:
            found += _modes(file, f"{shown}/{file.name}", _FILE_MODE)
            found += _key(file, f"{shown}/{file.name}")
    except PermissionError:
        raise Skipped(f"only root may look into {shown}") from None
    return found or ok(f"{_count(len(files), 'key')}, read by {GROUP} alone")


def _listeners(host: Host) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the TCP addresses and Unix sockets of the front: systemd's, elsewhere those of the settings."""
    try:
        (unit,) = show(host, [SOCKET], "LoadState,Listen")
        found = addresses(unit), paths(unit)
    except (Skipped, ValueError):
        found = [], []
    return found if any(found) else ([(host.settings.api.host, host.settings.api.port)], [])


def _flower(host: Host) -> str:
    """Say who may use Flower, where its unit runs."""
    try:
        found = show(host, [FLOWER], "Id,ActiveState")
    except Skipped:
        return ""
    runs = any(unit["Id"] == FLOWER and unit["ActiveState"] == "active" for unit in found)
    return f"; {FLOWER_WORDS}" if runs else ""


def _is_loopback(name: str) -> bool:
    found = address(name)
    return name == "localhost" if found is None else found.is_loopback


def _names(host: Host) -> list[str] | None:
    """Return the names of the keys; None where they are not for us to read."""
    folder = host.path(host.settings.api.keys_dir)
    try:
        return sorted(entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if entry.suffix == SUFFIX)
    except FileNotFoundError:
        return []
    except OSError:
        return None


def _where(api: ApiSettings, tcp: list[tuple[str, int]], unix: list[str]) -> str:
    scheme = "https" if api.tls_cert else "http"
    urls = [
        f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}" for name, port in tcp
    ]
    return "listens at " + ", ".join([*urls, *unix])


def _who(api: ApiSettings, names: list[str] | None, unix: list[str], opened: list[tuple[str, int]]) -> str:
    """Say who is let in, and by what."""
    free = ["the Unix socket"] if unix else []
    if names == []:
        free.append("loopback")
    if api.anonymous:
        free.append(f"{', '.join(api.anonymous)} (may predict)")
    words = f"without a key: {', '.join(free) or 'nobody'}"
    if names is None:
        return f"{words}; with a key: only root can tell"
    if names:
        return f"{words}; with a key: {_count(len(names), 'key')}"
    none_yet = "; from the network nobody, until there is a key (gpuinfer key add NAME)"
    return words + (none_yet if opened and not api.anonymous else "")


def _in_clear(api: ApiSettings, opened: list[tuple[str, int]], names: list[str] | None) -> Iterator[Finding]:
    """Open to a network without TLS: keys and inputs can be read on their way."""
    if opened and not api.tls_cert and (names or names is None or api.anonymous):
        name, port = opened[0]
        text = f"{name}:{port} is open to a network without TLS: keys and inputs can be read on their way"
        yield warning(text, f"{edit(DEFAULT_FILE)}  # [api] tls_cert and tls_key, or a proxy with TLS")


def _anybody(api: ApiSettings) -> Iterator[Finding]:
    for text in api.anonymous:
        found = ip_network(text)
        if found.prefixlen < _LEAST_BITS[found.version]:
            yield error(
                f"api.anonymous has {text}: anybody who reaches this host may predict, without a key",
                f"{edit(DEFAULT_FILE)}  # [api] anonymous; gpuinfer key add NAME makes a key",
            )


def _pages(api: ApiSettings, names: list[str] | None) -> Iterator[Finding]:
    if "*" in api.cors_origins and (names == [] or api.anonymous):
        text = "api.cors_origins is *: any web page may use this host through a visitor who needs no key"
        yield warning(text, f"{edit(DEFAULT_FILE)}  # [api] cors_origins")


def _certificate(host: Host, api: ApiSettings) -> Iterator[Finding]:
    """The certificate can be read, and lasts."""
    if api.tls_cert is None:
        return
    fix = f"{edit(DEFAULT_FILE)}  # [api] tls_cert and tls_key; then: journalctl -u gpuinfer-api -n 20"
    try:
        expires = not_after(host.path(api.tls_cert).read_bytes())
    except OSError as exc:
        yield error(f"the certificate {api.tls_cert} cannot be read: {exc.strerror or exc}", fix)
        return
    except ValueError as exc:
        yield error(f"{api.tls_cert}: {exc}", fix)
        return
    left_s = (expires - datetime.now(UTC)).total_seconds()
    if left_s < _SOON_S:
        when = "has expired" if left_s < 0 else f"expires in {left_s / 86400:.1f} days"
        renew = "certbot renew  # or as it was made; the front takes the new files by itself"
        yield (error if left_s < 0 else warning)(f"the certificate {api.tls_cert} {when}", renew)


def _key(file: Path, shown: str) -> Iterator[Finding]:
    try:
        key = parse(file.name.removesuffix(SUFFIX), file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # revoked meanwhile
        return
    except (BadKey, UnicodeDecodeError) as exc:
        why = exc.message if isinstance(exc, BadKey) else "must be UTF-8 text"
        yield error(f"{shown}: {why}; this key is refused", edit(shown))
        return
    yield from _expiry(key)


def _expiry(key: Key) -> Iterator[Finding]:
    if key.expires is None:
        return
    left_s = key.expires - time.time()
    if left_s < 0:
        yield warning(f"the key {key.name} has expired", f"gpuinfer key revoke {key.name}")
    elif left_s < _SOON_S:
        text = f"the key {key.name} expires in {left_s / 86400:.1f} days"
        yield warning(text, f"gpuinfer key show {key.name}")


def _modes(path: Path, shown: str, wanted: int) -> Iterator[Finding]:
    """Root owns it, the front's group reads it, nobody else does."""
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~wanted:
        yield error(
            f"{shown} has mode {mode:04o}: others may read or change keys", f"chmod {wanted:04o} {shown}"
        )
    if status.st_uid != 0:
        yield error(f"{shown} belongs to user {status.st_uid}, who may change keys", f"chown root {shown}")
    try:
        group = grp.getgrnam(GROUP).gr_gid
    except KeyError:  # no installed host
        return
    if status.st_gid != group or not mode & stat.S_IRGRP:
        fix = f"chgrp {GROUP} {shown} && chmod {wanted:04o} {shown}"
        yield error(f"{shown} cannot be read by the front", fix)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
