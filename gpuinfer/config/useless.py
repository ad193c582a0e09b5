# SPDX-License-Identifier: Apache-2.0
"""Settings that are accepted and do nothing, each with the setting that would work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuinfer.broker.cli import FOLDER as OUR_REDIS
from gpuinfer.errors import ModelError
from gpuinfer.models.repository import Repository
from gpuinfer.redis_url import parse
from gpuinfer.settings import Loaded, Settings, shown
from gpuinfer.sources import ENV_PREFIX

_SOCKET_UNIT = Path("lib/systemd/system/gpuinfer-api.socket")
_REDIS_CONF = Path("etc/gpuinfer/redis.conf")
#: Sections that no worker reads: they do nothing in a worker's own file.
_NOT_A_WORKERS = ("api", "redis", "watcher")
_LOGIN = ("broker.username", "broker.password")


@dataclass(frozen=True)
class Given:
    """The settings to check: those of the host, or of one worker."""

    loaded: Loaded
    #: The worker with a file of its own; None for the settings of the host.
    worker: int | None = None
    #: Root of the host's own files.
    root: Path = Path("/")

    @property
    def settings(self) -> Settings:
        return self.loaded.settings

    def changed(self, *names: str) -> Iterator[str]:
        """Yield those of the settings that were set; a name that ends with a dot is a section."""
        for name in self.loaded.changed:
            if any(name == one or (one.endswith(".") and name.startswith(one)) for one in names):
                yield name

    def told(self, name: str) -> str:
        """Return a setting with its value and origin."""
        section, _, key = name.partition(".")
        value = getattr(getattr(self.settings, section), key)
        return f"{name} = {shown(name, value)} ({self.loaded.origins[name]})"

    @property
    def installed(self) -> bool:
        """Tell whether the package's units are here."""
        return (self.root / _SOCKET_UNIT).exists()


def warnings(given: Given) -> list[str]:
    """Return a line for each setting that is accepted and does nothing."""
    rules = (_a_workers, _lists, _models) if given.worker is not None else _RULES
    return [line for rule in rules for line in rule(given)]


def _sockets(given: Given) -> Iterator[str]:
    if given.installed:
        for name in given.changed("api.host", "api.port"):
            yield (
                f"{given.told(name)} does nothing for gpuinfer-api.service, as systemd listens for it; to "
                "change the address: systemctl edit gpuinfer-api.socket"
            )


def _logins(given: Given) -> Iterator[str]:
    if given.installed:
        for name in given.changed(*_LOGIN):
            yield f"{given.told(name)} applies to commands only: each unit logs in as its own user"


def _shells(given: Given) -> Iterator[str]:
    if given.installed:
        names = [origin for origin in given.loaded.changed.values() if origin.startswith(ENV_PREFIX)]
        if names:
            yield f"{', '.join(names)}: set in this shell only; for the units, set it in gpuinfer.toml"


def _redis(given: Given) -> Iterator[str]:
    redis, place = given.settings.redis, parse(given.settings.broker.url)
    elsewhere = place.scheme != "unix" or not f"/{place.path.lstrip('/')}".startswith(f"{OUR_REDIS}/")
    for name in given.changed("redis."):
        if elsewhere:
            yield f"{given.told(name)} does nothing: broker.url names another Redis than this host's own"
    if redis.maxmemory_mb and not elsewhere:
        names = (f"redis.maxmemory_{what}" for what in ("share", "floor_mb", "ceiling_mb"))
        for name in given.changed(*names):
            yield f"{given.told(name)} does nothing beside redis.maxmemory_mb = {redis.maxmemory_mb}"
    yield from () if elsewhere else _redis_conf(given)


def _redis_conf(given: Given) -> Iterator[str]:
    try:
        text = (given.root / _REDIS_CONF).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for word, section in (("maxmemory", "redis.maxmemory_"), ("appendfsync", "redis.appendfsync")):
        if re.search(rf"(?m)^\s*{word}\s", text):
            for name in given.loaded.changed:
                if name.startswith(section):
                    yield f"{given.told(name)} does nothing: {word} in /{_REDIS_CONF} wins"


def _broker(given: Given) -> Iterator[str]:
    if parse(given.settings.broker.url).scheme != "rediss":
        for name in given.changed("broker.tls_ca"):
            yield f"{given.told(name)} does nothing: broker.url does not begin with rediss://"


def _watcher(given: Given) -> Iterator[str]:
    if given.settings.watcher.mode != "threshold":
        for name in given.changed(*(f"watcher.threshold_{what}" for what in ("depth", "workers", "every_s"))):
            yield f'{given.told(name)} does nothing unless watcher.mode is "threshold"'


def _gpus(given: Given) -> Iterator[str]:
    if given.settings.worker.device == "cpu":
        for name in given.changed("worker.gpus"):
            yield f'{given.told(name)} does nothing: worker.device is "cpu"'


def _lists(given: Given) -> Iterator[str]:
    for name in given.loaded.changed:
        if _brackets(given, name):
            yield (
                f"{given.told(name)} contains brackets or quotes, which become part of the names; write "
                "a list in a variable as a,b"
            )


def _brackets(given: Given, name: str) -> bool:
    section, _, key = name.partition(".")
    value = getattr(getattr(given.settings, section), key)
    return isinstance(value, tuple) and any(re.search(r"[\[\]\"']", str(item)) for item in value)


def _models(given: Given) -> Iterator[str]:
    if "worker.models" not in given.loaded.changed or _brackets(given, "worker.models"):
        return
    try:
        there = Repository(given.settings.models.folders).names()
    except ModelError as exc:
        yield f"worker.models cannot be checked: {exc}"
        return
    for name in given.settings.worker.models:
        if name not in there:
            yield (
                f"worker.models ({given.loaded.origins['worker.models']}) names {name!r}, which is not "
                f"installed: gpuinfer model add FOLDER --name {name}"
            )


def _a_workers(given: Given) -> Iterator[str]:
    for name in given.changed(*(f"{section}." for section in _NOT_A_WORKERS)):
        origin, section = given.loaded.origins[name], name.partition(".")[0]
        if origin.startswith(ENV_PREFIX):
            yield f"{origin} does nothing in worker@{given.worker}.env: no worker reads [{section}]"


_RULES = (_sockets, _logins, _shells, _redis, _broker, _watcher, _gpus, _lists, _models)

__all__: Sequence[str] = ("Given", "warnings")
