# SPDX-License-Identifier: Apache-2.0
"""Settings: read once at start, validated, frozen, passed down.

Order, the strongest first: arguments of the command, ``GPUINFER_SECTION_KEY`` variables,
credentials (files in ``$CREDENTIALS_DIRECTORY``, for secrets only), ``/etc/gpuinfer/gpuinfer.toml``
(another file with ``GPUINFER_CONFIG``), defaults. An empty variable counts as not set.

Root on an installed host needs to log in nowhere: where no user or password is set, the password
the package made for Redis's ``admin`` is taken; on a host that works for another one's Redis, which
has that one's passwords but the administrator's, the password of the program whose command it is.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gpuinfer.errors import ConfigError
from gpuinfer.redis_url import masked
from gpuinfer.sections import (
    QUEUES,
    ApiSettings,
    BrokerSettings,
    LogSettings,
    ModelsSettings,
    QueueName,
    QueueSettings,
    RedisSettings,
    Section,
    WatcherSettings,
    WorkerSettings,
)

__all__ = [
    "QUEUES",
    "ApiSettings",
    "BrokerSettings",
    "Loaded",
    "LogSettings",
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
]

DEFAULT_FILE = Path("/etc/gpuinfer/gpuinfer.toml")
#: The passwords of the ACL users, readable by root alone.
PASSWORDS = Path("/etc/gpuinfer/credentials")
ADMIN_PASSWORD = PASSWORDS / "admin"
ENV_PREFIX = "GPUINFER_"
#: Variables with our prefix that are not settings.
ENV_NOT_SETTINGS = frozenset({"GPUINFER_CONFIG"})


class Settings(BaseSettings):
    """All settings. Build it with ``load_settings()``, pass it down, never read it again."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
    )

    broker: BrokerSettings = BrokerSettings()
    redis: RedisSettings = RedisSettings()
    queue: QueueSettings = QueueSettings()
    models: ModelsSettings = ModelsSettings()
    worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()
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
        """Keep the merged dictionary alone: ``load_settings`` reads the sources, to know each origin."""
        return (init_settings,)


#: Settings that are secrets, and the credential (a file in $CREDENTIALS_DIRECTORY) each is read from.
CREDENTIALS: Mapping[str, tuple[str, str]] = {"broker_password": ("broker", "password")}

#: The line that begins a section.
_HEADER = re.compile(r"(?m)^[ \t]*\[[ \t]*(\w+)[ \t]*\]")

_SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation  # type: ignore[misc]  # every field of Settings is a Section class
    for name, info in Settings.model_fields.items()
}


@dataclass(frozen=True)
class Loaded:
    """Settings, with where each value came from (``"section.key" -> origin``)."""

    settings: Settings
    origins: Mapping[str, str]

    def only(self, *sections: str) -> Settings:
        """Return settings of which these sections are read, whatever is wrong in the file's others."""
        return self.settings


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"must be UTF-8 text; byte {exc.start} is not", str(path)) from None
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror or exc}", str(path)) from exc


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    data = _parse_toml(_read_text(path), path)
    for section, values in data.items():
        _check_section(section, values, str(path))
    return data


def _parse_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"is not valid TOML: {exc}", str(path)) from exc


def _read_sections(path: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read these sections of a file, whose others need not even be TOML."""
    text = _read_text(path)
    starts = [*_HEADER.finditer(text)]
    ends = [*(match.start() for match in starts), len(text)][1:]
    wanted = [text[match.start() : end] for match, end in zip(starts, ends, strict=True) if match[1] in names]
    data = _parse_toml("".join(wanted), path)
    for section, values in data.items():
        _check_section(section, values, str(path))
    return data


def _check_section(section: str, values: object, origin: str) -> None:
    if section not in _SECTIONS:
        homes = [name for name, model in _SECTIONS.items() if section in model.model_fields]
        if homes and not isinstance(values, dict):
            raise ConfigError(f"key {section!r} must stand under [{homes[0]}]", origin)
        raise ConfigError(f"unknown section [{section}]; {_nearest(section, list(_SECTIONS))}", origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{section} must be a section, written [{section}]", origin)
    for key in values:
        _check_key(section, key, origin)


def _check_key(section: str, key: str, origin: str) -> None:
    known = list(_SECTIONS[section].model_fields)
    if key not in known:
        raise ConfigError(f"unknown key {section}.{key}; {_nearest(key, known)}", origin)


def variable(section: str, key: str) -> str:
    """Return the name of the environment variable of a setting."""
    return f"{ENV_PREFIX}{section}_{key}".upper()


#: What Kubernetes sets for a service whose name begins with gpuinfer, in every container beside it.
_OF_KUBERNETES = re.compile(
    r"GPUINFER_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def _is_setting(name: str, value: str) -> bool:
    """Tell a variable that means us from others that begin as ours do."""
    if not name.startswith(ENV_PREFIX) or name in ENV_NOT_SETTINGS or _OF_KUBERNETES.fullmatch(name):
        return False
    return not (name.endswith("_PORT") and _ADDRESS.match(value))


def _read_env(environ: Mapping[str, str], only: Collection[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    known = {variable(s, k): (s, k) for s, model in _SECTIONS.items() for k in model.model_fields}
    for name, value in environ.items():
        if not _is_setting(name, value):
            continue
        if name not in known:
            if len(only) < len(_SECTIONS) and not any(name.startswith(variable(s, "")) for s in only):
                continue
            raise ConfigError(_unknown_variable(name, list(known)), name)
        if value:
            section, key = known[name]
            found.setdefault(section, {})[key] = value
    return found


def _unknown_variable(name: str, known: list[str]) -> str:
    section = name.removeprefix(ENV_PREFIX).lower()
    if section in _SECTIONS:
        names = ", ".join(variable(section, key) for key in _SECTIONS[section].model_fields)
        return f"is a whole section; set its keys one by one: {names}"
    close = difflib.get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`gpuinfer config show` lists all settings"
    return f"unknown variable; {hint}"


def _read_credentials(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    folder = environ.get("CREDENTIALS_DIRECTORY")
    found: dict[str, dict[str, Any]] = {}
    for name, (section, key) in CREDENTIALS.items() if folder else ():
        path = Path(folder or "", name)
        if _exists(path):
            found.setdefault(section, {})[key] = _read_text(path).strip()
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror or exc}", str(path)) from exc


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
    named = file or (Path(environ["GPUINFER_CONFIG"]) if environ.get("GPUINFER_CONFIG") else None)
    path = named or DEFAULT_FILE
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    whole = len(only) == len(Settings.model_fields)
    read = _read_toml if whole else partial(_read_sections, names=only)
    from_file = read(path) if named or _exists(path) else {}
    for source, values in (
        (str(path), from_file),
        ("credential", _read_credentials(environ)),
        ("environment", _read_env(environ, only)),
    ):
        for section, keys in values.items():
            for key, value in keys.items() if section in only else ():
                merged.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = variable(section, key) if source == "environment" else source
    if named is None:
        # A worker runs model code, which may read what is in its memory.
        logins = (user,) if user == "worker" else ("admin", user)
        _log_in(merged, origins, tuple(PASSWORDS / name for name in logins))
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]  # pydantic turns dictionaries into sections
    except ValidationError as exc:
        raise _explain(exc, origins) from None
    return Loaded(settings, origins)


def _log_in(merged: dict[str, dict[str, Any]], origins: dict[str, str], passwords: Sequence[Path]) -> None:
    """Give root the first of these logins, unless another one, or another Redis, is named."""
    broker = merged.get("broker", {})
    url = broker.get("url", "")
    named_elsewhere = origins.get("broker.url", "").startswith(ENV_PREFIX) or "@" in url or "password=" in url
    in_clear = url.startswith("redis://")  # a password must not cross a network that way unasked
    if broker.get("username") or broker.get("password") or named_elsewhere or in_clear:
        return
    path = next((path for path in passwords if os.access(path, os.R_OK)), None)
    if path is not None:
        merged["broker"] = broker | {"username": path.name, "password": _read_text(path).strip()}
        origins |= dict.fromkeys(("broker.username", "broker.password"), str(path))


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
