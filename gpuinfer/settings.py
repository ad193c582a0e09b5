# SPDX-License-Identifier: Apache-2.0
"""Settings: read once at start, validated, frozen, passed down.

Order, the strongest first: arguments of the command, ``GPUINFER_SECTION_KEY`` variables,
credentials (files in ``$CREDENTIALS_DIRECTORY``, for secrets only), ``/etc/gpuinfer/gpuinfer.toml``
(another file with ``GPUINFER_CONFIG``), defaults. An empty variable counts as not set.

Root on an installed host needs to log in nowhere: where no user or password is set, the password
the package made for Redis's ``admin`` is taken; on a host that works for another one's Redis, which
has that one's passwords but the administrator's, the password of the program whose command it is.
Members of the groups gpuinfer-operator and gpuinfer-viewer find a login of their own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gpuinfer.errors import ConfigError
from gpuinfer.redis_url import masked
from gpuinfer.sections import (
    QUEUES,
    ApiSettings,
    BrokerSettings,
    LogSettings,
    MetricsSettings,
    ModelsSettings,
    QueueName,
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
#: The passwords of the ACL users, readable by root alone.
PASSWORDS = Path("/etc/gpuinfer/credentials")
ADMIN_PASSWORD = PASSWORDS / "admin"
#: Those of people who are not root, each for the members of a group: gpuinfer-operator, gpuinfer-viewer.
PEOPLES = Path("/etc/gpuinfer/logins")
PEOPLE = ("operator", "viewer")


class Settings(BaseSettings):
    """All settings. Build it with ``load_settings()``, pass it down, never read it again."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        # A list in a variable is `a,b`: sections.py takes it apart.
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
        """Take the sources that ``load`` has made, of the file and variables it was told; else arguments."""
        given = getattr(init_settings, "init_kwargs", {}).pop(_SOURCES, None)
        return given or (init_settings,)


#: The argument by which ``load`` gives its sources to pydantic-settings.
_SOURCES = "_sources"


@dataclass(frozen=True)
class Loaded:
    """Settings, with where each value came from (``"section.key" -> origin``)."""

    settings: Settings
    origins: Mapping[str, str]

    def only(self, *sections: str) -> Settings:
        """Return settings of which these sections are read, whatever is wrong in the file's others."""
        return self.settings

    @property
    def changed(self) -> Mapping[str, str]:
        """Return the origins of what somebody has set: a login that was found is none of it."""
        logins = (PASSWORDS, PEOPLES)
        return {name: origin for name, origin in self.origins.items() if Path(origin).parent not in logins}


def load(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    only: Collection[str] = frozenset(Settings.model_fields),
    user: str = "api",
) -> Loaded:
    """Read all sources once; with ``only``, these sections alone, the others have their defaults.

    ``user`` is whom root logs in as where there is no administrator's password; the worker even where
    there is.

    Raises ConfigError naming the source, the key, the value and what would be right.
    """
    environ = os.environ if environ is None else environ
    path = settings_file(file, environ)
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
    """Return the settings file: the one that is named, else $GPUINFER_CONFIG, else the host's own."""
    path = file or Path(environ.get("GPUINFER_CONFIG") or DEFAULT_FILE)
    try:
        return DEFAULT_FILE if path.samefile(DEFAULT_FILE) else path
    except OSError:
        return path


def _origins(sources: Mapping[str, PydanticBaseSettingsSource]) -> dict[str, str]:
    """Return where each value comes from: the first source that has it."""
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
    """Return the first password this process may read, unless another login, or another Redis, is named."""
    broker: dict[str, Any] = {}
    for read in reversed(list(sources.values())):
        broker |= read().get("broker", {})
    url = str(broker.get("url", ""))
    named_elsewhere = origins.get("broker.url", "").startswith(ENV_PREFIX) or "@" in url or "password=" in url
    in_clear = url.startswith("redis://")  # a password must not cross a network that way unasked
    if broker.get("username") or broker.get("password") or named_elsewhere or in_clear:
        return None
    # A worker runs model code, which may read what is in its memory.
    names = (user,) if user == "worker" else ("admin", user)
    paths = (*(PASSWORDS / name for name in names), *(PEOPLES / name for name in PEOPLE))
    return next((path for path in paths if os.access(path, os.R_OK)), None)


def load_settings(file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources and return the settings alone. See ``load``."""
    return load(file, environ).settings


def is_secret(name: str) -> bool:
    """Tell whether ``section.key`` must never be shown."""
    return tuple(name.split(".")) in CREDENTIALS.values()


def shown(name: str, value: object) -> str:
    """Return a setting's value for people: secrets hidden, as are passwords inside URLs; kept short."""
    if is_secret(name):
        return "(hidden)" if value else "(not set)"
    if isinstance(value, list | tuple):
        text = ",".join(str(item) for item in value)
    else:
        text = "" if value is None else str(value)
    text = masked(text)
    return text if len(text) <= 200 else text[:200] + "..."


#: pydantic's words that say nothing to who wrote the file, in ours.
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
