# SPDX-License-Identifier: Apache-2.0
"""Settings: read once at start, validated, frozen, passed down.

Order, the strongest first: arguments of the command, ``GPUINFER_SECTION_KEY`` variables,
credentials (files in ``$CREDENTIALS_DIRECTORY``, for secrets only), ``/etc/gpuinfer/gpuinfer.toml``
(another file with ``GPUINFER_CONFIG``), defaults. An empty variable counts as not set.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gpuinfer.errors import ConfigError

DEFAULT_FILE = Path("/etc/gpuinfer/gpuinfer.toml")
ENV_PREFIX = "GPUINFER_"
#: Variables with our prefix that are not settings.
ENV_NOT_SETTINGS = frozenset({"GPUINFER_CONFIG"})

QueueName = Literal["realtime", "default", "batch"]
#: The queues, the most urgent first.
QUEUES: tuple[QueueName, ...] = ("realtime", "default", "batch")


def _split(value: object) -> object:
    """Let a list be given as ``a,b,c`` (a variable has no lists), and a GPU's index as a number."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(_number_as_text(item) for item in value)
    return value


def _number_as_text(item: object) -> object:
    return str(item) if isinstance(item, int) and not isinstance(item, bool) else item


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split)]


class Section(BaseModel):
    # A ValidationError shown as it is must not carry a password; ours name the value themselves.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        """Refuse true and false, which would count as the numbers 1 and 0: no setting is a switch."""
        if isinstance(value, bool):
            raise ValueError("must not be true or false")  # noqa: TRY004  pydantic reports ValueError
        return value


class BrokerSettings(Section):
    """Where Redis is."""

    #: redis://host:port/db, rediss://host:port/db (TLS), or unix:///path/to.sock?db=0
    url: str = "unix:///run/gpuinfer/redis.sock?db=0"
    username: str | None = None
    password: SecretStr | None = None
    #: CA bundle that signed the server's certificate, for rediss://
    tls_ca: Path | None = None
    connect_timeout_s: float = Field(default=5.0, gt=0, le=300)

    @field_validator("username", "password", "tls_ca", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("url")
    @classmethod
    def _usable(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if scheme not in ("redis", "rediss", "unix", "redis+socket"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if scheme in ("unix", "redis+socket") and not urlsplit(f"redis://{rest}").path.strip("/"):
            raise ValueError("must name a socket, as unix:///run/gpuinfer/redis.sock does")
        _ = urlsplit(value).port  # raises ValueError for what is no port
        return value


class QueueSettings(Section):
    """What is kept in Redis, how much and for how long."""

    #: Results are dropped this long after the task ended.
    result_ttl_s: int = Field(default=3600, ge=1, le=30 * 86400)
    #: The same idempotency key gives the same task for this long.
    idempotency_ttl_s: int = Field(default=86400, ge=1, le=365 * 86400)
    #: A request larger than this is refused, before it reaches Redis.
    max_payload_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: Retries of a transient failure, and the first pause; each later pause is twice as long.
    max_retries: int = Field(default=3, ge=0, le=20)
    retry_backoff_s: float = Field(default=0.5, gt=0, le=600)
    #: A task whose worker died under it this often goes to the dead-letter list.
    max_deaths: int = Field(default=2, ge=2, le=10)
    #: A queue that has waited this long unserved is served once before its betters; 0 turns it off.
    ageing_s: float = Field(default=10.0, ge=0, le=86400)
    #: How often an idle worker looks for tasks whose producer does not ring the bell.
    poll_ms: int = Field(default=30, ge=5, le=1000)


class ModelsSettings(Section):
    """Which models there are."""

    #: Folders with one sub-folder a model; searched in this order, then the shipped models.
    folders: Paths = (Path("/var/lib/gpuinfer/models"),)
    #: The model of a request that names none.
    default: str = Field(default="digits", min_length=1)


class WorkerSettings(Section):
    """How a worker runs."""

    #: auto: the GPU of the worker's number; the CPU only where there is no GPU at all.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    #: GPUs by index or UUID where NVML cannot list them; worker N takes the Nth.
    gpus: Names = ()
    #: Models to load; empty means the default model alone.
    models: Names = ()
    queues: Annotated[tuple[QueueName, ...], BeforeValidator(_split)] = QUEUES
    #: torch's threads for one operation on the CPU; 0 leaves it to torch.
    threads: int = Field(default=0, ge=0, le=1024)
    #: An upper bound on every model's own max_batch_size; 0 means none.
    max_batch_size: int = Field(default=0, ge=0, le=65536)
    #: Folder for the lock that keeps one process to a worker number.
    run_dir: Path = Path("/run/gpuinfer")

    @field_validator("queues")
    @classmethod
    def _some_queue(cls, value: tuple[QueueName, ...]) -> tuple[QueueName, ...]:
        if not value:
            raise ValueError("must name at least one of realtime, default, batch")
        return tuple(name for name in QUEUES if name in value)


class ApiSettings(Section):
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    #: The longest ?wait= that GET /result honours.
    max_wait_s: float = Field(default=60.0, ge=0, le=600)
    #: What Retry-After says when Redis is away or full.
    retry_after_s: int = Field(default=2, ge=1, le=3600)


class LogSettings(Section):
    """What is logged and how."""

    #: auto: colours on a terminal, JSON lines elsewhere.
    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(BaseSettings):
    """All settings. Build it with ``load_settings()``, pass it down, never read it again."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
    )

    broker: BrokerSettings = BrokerSettings()
    queue: QueueSettings = QueueSettings()
    models: ModelsSettings = ModelsSettings()
    worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()
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

_SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation  # type: ignore[misc]  # every field of Settings is a Section class
    for name, info in Settings.model_fields.items()
}


@dataclass(frozen=True)
class Loaded:
    """Settings, with where each value came from (``"section.key" -> origin``)."""

    settings: Settings
    origins: Mapping[str, str]


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
    try:
        data = tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"is not valid TOML: {exc}", str(path)) from exc
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


def _read_env(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    known = {variable(s, k): (s, k) for s, model in _SECTIONS.items() for k in model.model_fields}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_NOT_SETTINGS:
            continue
        if name not in known:
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


def load(file: Path | None = None, environ: Mapping[str, str] | None = None) -> Loaded:
    """Read all sources once.

    Raises ConfigError naming the source, the key, the value and what would be right.
    """
    environ = os.environ if environ is None else environ
    named = file or (Path(environ["GPUINFER_CONFIG"]) if environ.get("GPUINFER_CONFIG") else None)
    path = named or DEFAULT_FILE
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    from_file = _read_toml(path) if named or _exists(path) else {}
    for source, values in (
        (str(path), from_file),
        ("credential", _read_credentials(environ)),
        ("environment", _read_env(environ)),
    ):
        for section, keys in values.items():
            for key, value in keys.items():
                merged.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = variable(section, key) if source == "environment" else source
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]  # pydantic turns dictionaries into sections
    except ValidationError as exc:
        raise _explain(exc, origins) from None
    return Loaded(settings, origins)


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
    # Up to the last @: a password may hold an @ or a slash of its own.
    text = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", text)
    text = re.sub(r"([?&]password=)[^&]*", r"\1***", text)
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
