# SPDX-License-Identifier: Apache-2.0
"""Who may connect to the API, and what the secrets' files let others do: passwords of Redis's users, keys."""

from __future__ import annotations

import grp
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path

from gpuinfer.addresses import address as address_of
from gpuinfer.certificate import not_after
from gpuinfer.doctor.host import EDIT, Finding, Findings, Host, Skipped, error, ok, warning
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.doctor.units import listeners, show
from gpuinfer.errors import BadKey
from gpuinfer.keys.key import SUFFIX, parse
from gpuinfer.settings import ApiSettings

FLOWER = "gpuinfer-flower.service"
#: Who may use it, as its unit is shipped.
FLOWER_WORDS = "Flower http://127.0.0.1:5555: this host, as admin with its password"
CREDENTIALS, LOGINS = "/etc/gpuinfer/credentials", "/etc/gpuinfer/logins"
#: Redis's users, of whom the administrator may be another host's; and who logs in to Flower.
USERS, PEOPLE = ("admin", "api", "worker", "watcher", "flower"), ("operator", "viewer")
#: Who reads the keys: their files and folder belong to root and this group.
GROUP = "gpuinfer-api"
_MIN_PASSWORD_BYTES = 16
#: What expires is reported this long before.
SOON_S = 7 * 86400.0
#: A network with fewer bits than these is open to everybody; 10.0.0.0/8 and fc00::/7 are somebody's own.
_LEAST_BITS = {4: 8, 6: 7}


def connect(host: Host) -> Findings:
    """The API is open only to those who may use it; the report says who may connect, and where."""
    api, metrics = host.settings.api, host.settings.metrics.listen
    (tcp, unix), keys = listeners(host), _keys(host)
    opened = [f"{name}:{port}" for name, port in tcp if not _is_loopback(name)]
    bad = [*_too_open(api, opened, keys), *_certificate(host, api)]
    scheme = "https" if api.tls_cert else "http"
    places = [f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}" for name, port in tcp]
    free = ["the Unix socket"] * bool(unix) + ["loopback"] * (keys == 0)
    free += [f"{', '.join(api.anonymous)} (may predict)"] if api.anonymous else []
    said = f"listens at {', '.join([*places, *unix])}; without a key: {', '.join(free) or 'nobody'}"
    if keys is None:
        said += "; with a key: only root can tell"
    elif keys:
        said += f"; with a key: {keys} key{'s' * (keys > 1)}"
    elif opened and not api.anonymous:
        said += "; from the network nobody, until there is a key (gpuinfer key add NAME)"
    said += f"; metrics for everybody at {metrics}" if metrics else ""
    flower = show(host, [FLOWER], "Id,ActiveState") if host.booted else []
    return bad or ok(said + f"; {FLOWER_WORDS}" * any(unit["ActiveState"] == "active" for unit in flower))


def _is_loopback(name: str) -> bool:
    found = address_of(name)
    return name == "localhost" if found is None else found.is_loopback


def _keys(host: Host) -> int | None:
    """Return how many keys there are; None where this user may not see."""
    try:
        return sum(entry.suffix == SUFFIX for entry in host.path(host.settings.api.keys_dir).iterdir())
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def _too_open(api: ApiSettings, opened: list[str], keys: int | None) -> Iterator[Finding]:
    if opened and not api.tls_cert and (keys != 0 or api.anonymous):
        text = f"{opened[0]} is open to a network without TLS: keys and inputs can be read on their way"
        yield warning(text, f"{EDIT}  # [api] tls_cert and tls_key, or a proxy with TLS")
    for network in map(ip_network, api.anonymous):
        if network.prefixlen < _LEAST_BITS[network.version]:
            text = f"api.anonymous has {network}: everybody who reaches this host may predict without a key"
            yield error(text, f"{EDIT}  # [api] anonymous; gpuinfer key add NAME makes a key")
    if "*" in api.cors_origins and (keys == 0 or api.anonymous):
        text = "api.cors_origins is *: any web page may use this host through a visitor who needs no key"
        yield warning(text, f"{EDIT}  # [api] cors_origins")


def _certificate(host: Host, api: ApiSettings) -> Iterator[Finding]:
    """The certificate can be read, and lasts for a week at least."""
    if api.tls_cert is None:
        return
    try:
        expires = not_after(host.path(api.tls_cert).read_bytes())
    except (OSError, ValueError) as exc:
        fix = f"{EDIT}  # [api] tls_cert and tls_key; then: journalctl -u gpuinfer-api -n 20"
        yield error(f"{api.tls_cert}: {exc}", fix)
        return
    left_s = (expires - datetime.now(UTC)).total_seconds()
    if left_s < SOON_S:
        when = "has expired" if left_s < 0 else f"expires in {left_s / 86400:.1f} days"
        renew = "certbot renew  # or as it was made; the API reads the new files by itself"
        yield (error if left_s < 0 else warning)(f"the certificate {api.tls_cert} {when}", renew)


def credentials(host: Host) -> Findings:
    """The passwords of Redis's users and of Flower are there, and only root can read them."""
    folder = host.path(CREDENTIALS)
    if not folder.exists():
        raise Skipped(f"{CREDENTIALS} is not there: the package is not installed")
    ours = True
    with suppress(Skipped):
        ours = place_of(host.settings.broker).ours
    try:
        users = USERS if ours or (folder / "admin").exists() else USERS[1:]
        found = [*host.secret(CREDENTIALS, 0o700), *(bad for user in users for bad in _password(host, user))]
        logins = [f"{LOGINS}/{user}" for user in PEOPLE if host.path(f"{LOGINS}/{user}").exists()]
        found += [bad for login in logins for bad in host.secret(login, 0o640)]
    except PermissionError:
        raise Skipped(f"only root may read {CREDENTIALS}") from None
    return found or ok(f"{len(users)} passwords, readable only by root")


def _password(host: Host, user: str) -> Iterator[Finding]:
    shown = f"{CREDENTIALS}/{user}"
    if not host.path(shown).exists():
        yield error(f"{shown} is missing", "dpkg-reconfigure gpuinfer")
        return
    yield from host.secret(shown, 0o600)
    if host.path(shown).stat().st_size < _MIN_PASSWORD_BYTES:
        fix = f"rm {shown} && dpkg-reconfigure gpuinfer  # makes one, and restarts what logs in with it"
        yield error(f"{shown} holds no password", fix)


def keys(host: Host) -> Findings:
    """The keys' files are valid and readable only by the API, and none expires within a week."""
    shown = host.settings.api.keys_dir
    folder = host.path(shown)
    if not folder.is_dir():
        raise Skipped(f"{shown} is not there: no key has been made")
    try:
        files = sorted(folder.glob(f"*{SUFFIX}"))
        found = list(_rights(host, shown, 0o750))
        for file in files:
            found += [*_rights(host, shown / file.name, 0o640), *_key(file, shown / file.name)]
    except PermissionError:
        raise Skipped(f"only root may read {shown}") from None
    return found or ok(f"{len(files)} key{'s' * (len(files) != 1)}, readable only by {GROUP}")


def _rights(host: Host, shown: Path, wanted: int) -> Iterator[Finding]:
    """Root owns it, the API's group reads it, and no other user does."""
    yield from host.secret(shown, wanted)
    status = host.path(shown).stat()
    try:
        group = grp.getgrnam(GROUP).gr_gid
    except KeyError:  # the package is not installed
        return
    if status.st_gid != group or not status.st_mode & stat.S_IRGRP:
        fix = f"chgrp {GROUP} {shown} && chmod {wanted:04o} {shown}"
        yield error(f"{shown} cannot be read by the API", fix)


def _key(file: Path, shown: Path) -> Iterator[Finding]:
    try:
        key = parse(file.name.removesuffix(SUFFIX), file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # revoked meanwhile
        return
    except (BadKey, UnicodeDecodeError) as exc:
        why = exc.message if isinstance(exc, BadKey) else "must be UTF-8 text"
        yield error(f"{shown}: {why}; this key is refused", f"editor {shown}")
        return
    left_s = SOON_S if key.expires is None else key.expires - time.time()
    if left_s < 0:
        yield warning(f"the key {key.name} has expired", f"gpuinfer key revoke {key.name}")
    elif left_s < SOON_S:
        text = f"the key {key.name} expires in {left_s / 86400:.1f} days"
        yield warning(text, f"gpuinfer key show {key.name}")
