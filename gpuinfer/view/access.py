# SPDX-License-Identifier: Apache-2.0
"""Who may connect to the API, Redis and Flower, as text."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from gpuinfer.doctor.access import FLOWER_WORDS
from gpuinfer.doctor.redis_place import place_of
from gpuinfer.settings import ApiSettings, Settings

#: Exists while Flower's unit runs; any user can see it.
FLOWER = Path("/run/systemd/units/invocation:gpuinfer-flower.service")


def who(settings: Settings, address: tuple[str, int]) -> Sequence[str]:
    """Return a line for each server. ``address``: where the API listens."""
    flower = (FLOWER_WORDS,) if os.path.lexists(FLOWER) else ()
    return _api(settings.api, address), _redis(settings), *flower


def _api(api: ApiSettings, address: tuple[str, int]) -> str:
    host, port = address
    scheme = "https" if api.tls_cert else "http"
    where = f"API {scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    keys = _keys(api.keys_dir)
    if is_loopback(host):
        need = "this host without a key" if keys == 0 else f"this host, {_with(keys)}"
        return f"{where}: {need}"
    anonymous = ", ".join(map(str, api.anonymous))
    others = f"; without a key: {anonymous}" if anonymous else ""
    if keys == 0:
        return f"{where}: no access from the network until there is a key (gpuinfer key add){others}"
    return f"{where}: the network, {_with(keys)}{others}"


def _with(keys: int | None) -> str:
    return "with a key" if keys is None else f"with one of {keys} keys" if keys > 1 else "with the one key"


def _keys(folder: Path) -> int | None:
    """Return the number of keys; None where this user may not read the folder."""
    try:
        return sum(1 for _ in folder.glob("*.toml")) if folder.exists() else 0
    except OSError:
        return None


def _redis(settings: Settings) -> str:
    place = place_of(settings.broker)
    how = "this host's Unix socket" if place.socket else "TLS" if place.tls else "not encrypted"
    where = "" if place.socket else f" {place.shown}"
    return f"Redis{where}: {how}, as user {place.user}"


def is_loopback(host: str) -> bool:
    """Whether an address is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
