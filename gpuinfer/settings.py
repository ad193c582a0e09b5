# SPDX-License-Identifier: Apache-2.0
"""Settings: read once at start, validated, frozen, passed down.

Sources, the strongest first: arguments of the command, ``GPUINFER_SECTION_KEY`` variables,
credentials (files in ``$CREDENTIALS_DIRECTORY``, for secrets only), ``/etc/gpuinfer/gpuinfer.toml``
(another file with ``GPUINFER_CONFIG``), defaults. An empty variable counts as not set.

Where no user and password are set, root on an installed host logs in to Redis as ``admin``, with the
password that the package made. A host that uses the Redis of another host has all of its passwords
except that of ``admin``: there, root logs in as the program whose command it runs. Members of the groups
gpuinfer-operator and gpuinfer-viewer log in as ``operator`` and ``viewer``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from gpuinfer.errors import ConfigError
from gpuinfer.names import QUEUES, QueueName
from gpuinfer.redis_url import masked
from gpuinfer.sections import (
    ApiSettings,
    BrokerSettings,
    LogSettings,
    MetricsSettings,
    ModelsSettings,
    QueueSettings,
    RedisSettings,
    Section,
    WatcherSettings,
    WorkerSettings,
)
from gpuinfer.sources import (
    CREDENTIALS,
    ENV_PREFIX,
    Credentials,
    SettingsFile,
    Variables,
    exists,
    read_text,
    settled,
    variable,
)

__all__ = [
    "QUEUES",
    "ApiSettings",
    "BrokerSettings",
    "Loaded",
    "LogSettings",
    "MetricsSettings",
    "ModelsSettings",
    "QueueName",
    "QueueSettings",
    "RedisSettings",
    "Section",
    "Settings",
    "WatcherSettings",
    "WorkerSettings",
    "load",
    "load_settings",
    "settings_file",
    "variable",
]

DEFAULT_FILE = Path("/etc/gpuinfer/gpuinfer.toml")
#: The passwords of the programs' Redis users, readable by root only.
PASSWORDS = Path("/etc/gpuinfer/credentials")
ADMIN_PASSWORD = PASSWORDS / "admin"
#: The passwords of people's Redis users, each readable by a group: gpuinfer-operator, gpuinfer-viewer.
PEOPLES = Path("/etc/gpuinfer/logins")
PEOPLE = ("operator", "viewer")


class Settings(BaseSettings):
    """All settings. Build it with ``load_settings()``, pass it down, never read it again."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        # A list in a variable is `a,b`: sections.py splits it.
        enable_decoding=False,
    )

    broker: BrokerSettings = BrokerSettings()
    redis: RedisSettings = RedisSettings()
    queue: QueueSettings = QueueSettings()
    models: ModelsSettings = ModelsSettings()
    worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()
    metrics: MetricsSettings = MetricsSettings()
    watcher: WatcherSettings = WatcherSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources that ``load`` has made; without them, the arguments alone."""
        given = getattr(init_settings, "init_kwargs", {}).pop(_SOURCES, None)
        return given or (init_settings,)


#: The argument that passes the sources of ``load`` to pydantic-settings.
_SOURCES = "_sources"


@dataclass(frozen=True)
class Loaded:
    """Settings, and the origin of each value that is not a default (``"section.key" -> origin``)."""

    settings: Settings
    origins: Mapping[str, str]

    def only(self, *sections: str) -> Settings:
        """Return settings of which only these sections are read; the file's other sections may be wrong."""
        return self.settings

    def when_written(self) -> Loaded:
        """Return what a service starts with: these, as they are read already. See ``load(patient=True)``."""
        return self

    @property
    def changed(self) -> Mapping[str, str]:
        """Return the origins of what was set by somebody; logins that ``load`` found are left out."""
        logins = (PASSWORDS, PEOPLES)
        return {name: origin for name, origin in self.origins.items() if Path(origin).parent not in logins}


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    only: Collection[str] = frozenset(Settings.model_fields),
    user: str = "api",
    patient: bool = False,
) -> Loaded:
    """Read all sources once; with ``only``, these sections only, and defaults for the others.

    ``user``: the Redis user that root logs in as where there is no password of ``admin``; ``worker`` is used
    even where there is one. ``patient``: while the file is being written, wait, as a service must.

    Raises ConfigError naming the source, the key, the value and what would be right.
    """
    environ = os.environ if environ is None else environ
    path = settings_file(file, environ)
    if patient:
        return settled(path, lambda: _load(path, environ, only, user))
    return _load(path, environ, only, user)


def _load(path: Path, environ: Mapping[str, str], only: Collection[str], user: str) -> Loaded:
    named = path != DEFAULT_FILE
    folder = environ.get("CREDENTIALS_DIRECTORY")
    sources: dict[str, PydanticBaseSettingsSource] = {
        "environment": Variables(Settings, environ, only),
        "credential": Credentials(Settings, Path(folder) if folder else None, only),
    }
    if named or exists(path):
        sources[str(path)] = SettingsFile(Settings, path, only)
    origins = _origins(sources)
    if not named and "broker" in only:
        login = _login(sources, origins, user)
        if login:
            sources[str(login)] = InitSettingsSource(
                Settings, {"broker": {"username": login.name, "password": read_text(login).strip()}}
            )
            origins |= dict.fromkeys(("broker.username", "broker.password"), str(login))
    try:
        return Loaded(_build(sources), origins)
    except ValidationError as exc:
        raise _explain(exc, origins) from None


def _build(sources: Mapping[str, PydanticBaseSettingsSource]) -> Settings:
    arguments: dict[str, Any] = {_SOURCES: tuple(sources.values())}
    return Settings(**arguments)


def settings_file(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the settings file: ``file``, else $GPUINFER_CONFIG, else the host's own."""
    path = file or Path(environ.get("GPUINFER_CONFIG") or DEFAULT_FILE)
    try:
        return DEFAULT_FILE if path.samefile(DEFAULT_FILE) else path
    except OSError:
        return path


def _origins(sources: Mapping[str, PydanticBaseSettingsSource]) -> dict[str, str]:
    """Return the origin of each value: the first source that has it."""
    found: dict[str, str] = {}
    for source, read in sources.items():
        for section, keys in read().items():
            for key in keys:
                origin = variable(section, key) if source == "environment" else source
                found.setdefault(f"{section}.{key}", origin)
    return found


def _login(
    sources: Mapping[str, PydanticBaseSettingsSource], origins: Mapping[str, str], user: str
) -> Path | None:
    """Return the first password file that this process may read.

    None where a user, a password, or another Redis is named in the settings.
    """
    broker: dict[str, Any] = {}
    for read in reversed(list(sources.values())):
        broker |= read().get("broker", {})
    url = str(broker.get("url", ""))
    named_elsewhere = origins.get("broker.url", "").startswith(ENV_PREFIX) or "@" in url or "password=" in url
    in_clear = url.startswith("redis://")  # never send a password in clear text unless the settings say so
    if broker.get("username") or broker.get("password") or named_elsewhere or in_clear:
        return None
    # A worker runs model code, which can read the memory of its process.
    names = (user,) if user == "worker" else ("admin", user)
    paths = (*(PASSWORDS / name for name in names), *(PEOPLES / name for name in PEOPLE))
    return next((path for path in paths if os.access(path, os.R_OK)), None)


def load_settings(file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources and return only the settings. See ``load``."""
    return load(file, environ).settings


def is_secret(name: str) -> bool:
    """Tell whether ``section.key`` must never be shown."""
    return tuple(name.split(".")) in CREDENTIALS.values()


def shown(name: str, value: object) -> str:
    """Return a value for people: at most 200 characters, without secrets and passwords inside URLs."""
    if is_secret(name):
        return "(hidden)" if value else "(not set)"
    if isinstance(value, list | tuple):
        text = ",".join(str(item) for item in value)
    else:
        text = "" if value is None else str(value)
    text = masked(text)
    return text if len(text) <= 200 else text[:200] + "..."


#: Error type of pydantic -> plain words.
_PLAIN_WORDS: Mapping[str, str] = {
    "string_type": "must be text in quotes",
    "tuple_type": "must be a list of texts",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_too_short": "must not be empty",
    "path_type": "must be a path in quotes",
    "string_unicode": "must be UTF-8 text",
}


def _explain(exc: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    lines = []
    for error in exc.errors(include_url=False):
        name = ".".join(str(part) for part in error["loc"][:2])
        value = "" if is_secret(name) else f" = {shown(name, error['input'])!r}"
        message = _PLAIN_WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
        message = message.replace("Input should be", "must be")
        lines.append(f"{origins.get(name, 'default')}: {name}{value}: {message}")
    return ConfigError("; ".join(lines))
