# SPDX-License-Identifier: Apache-2.0
"""The sources of settings: the file, variables and credentials, as pydantic-settings reads them.

pydantic-settings ignores an unknown section, key or variable; here it is an error that names it.
"""

from __future__ import annotations

import difflib
import re
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, TomlConfigSettingsSource

from gpuinfer.errors import ConfigError

ENV_PREFIX = "GPUINFER_"
#: Variables with our prefix that are not settings.
ENV_NOT_SETTINGS = frozenset({"GPUINFER_CONFIG"})
#: Settings that are secrets, and the credential (a file in $CREDENTIALS_DIRECTORY) each is read from.
CREDENTIALS: Mapping[str, tuple[str, str]] = {"broker_password": ("broker", "password")}

#: Section -> key -> value, as a source has it.
Values = dict[str, dict[str, Any]]
#: A file that was written within this many seconds may still be being written.
SETTLED_S: Final = 1.0
#: How often such a file is read again before it is taken as it is.
_MOST_READS: Final = 10
T = TypeVar("T")


def sections_of(settings: type[BaseSettings]) -> dict[str, type[BaseModel]]:
    """Return the sections, each with its class."""
    found: dict[str, Any] = {name: info.annotation for name, info in settings.model_fields.items()}
    return found


def variable(section: str, key: str) -> str:
    """Return the name of the environment variable of a setting."""
    return f"{ENV_PREFIX}{section}_{key}".upper()


def file_state(path: Path) -> tuple[int, ...] | None:
    """Return what differs once a file is written; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def settled(
    path: Path,
    read: Callable[[], T],
    *,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Return what ``read`` makes of a file, once nobody is writing the file.

    The beginning of a TOML file is valid TOML, so a file that has changed while it was read, or within the
    last second, is read again. An old file is read once, without a wait. Raises ConfigError as ``read`` does.
    """
    fault: ConfigError | None
    for reads in range(1, _MOST_READS + 1):
        before, fault = file_state(path), None
        try:
            found = read()
        except ConfigError as exc:
            fault = exc
        left_s = _unsettled_s(path, now())
        if (left_s <= 0 and file_state(path) == before) or reads == _MOST_READS:
            break
        sleep(max(left_s, 0.01))
    if fault is not None:
        raise fault
    return found


def _unsettled_s(path: Path, now: float) -> float:
    """Return the seconds until a file counts as written; 0 or less: it does.

    Some editors move the old file away before they write the new one, so a missing file counts from the last
    change of its folder.
    """
    try:
        written = path.stat().st_mtime
    except OSError:
        try:
            written = path.parent.stat().st_mtime
        except OSError:
            return 0
    age_s = now - written
    # The server of a network file system may have another clock; a time far in the future means nothing.
    return SETTLED_S - age_s if abs(age_s) < SETTLED_S else 0


def read_text(path: Path) -> str:
    """Return a file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"must be UTF-8 text; byte {exc.start} is not", str(path)) from None
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror or exc}", str(path)) from exc


def exists(path: Path) -> bool:
    """Tell whether a file exists. Raises ConfigError where that is not known."""
    try:
        return path.exists()
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror or exc}", str(path)) from exc


class SettingsFile(TomlConfigSettingsSource):
    """Some sections of a TOML file; mistakes in its other sections are ignored, if the file is valid TOML."""

    def __init__(self, settings: type[BaseSettings], path: Path, only: Collection[str]) -> None:
        self._sections, self._only = sections_of(settings), only
        super().__init__(settings, path)

    def _read_files(self, files: Any, deep_merge: bool = False) -> Values:
        """Read the file, once. (That of pydantic-settings ignores a missing file, and a folder.)"""
        return self._read_file(Path(files))

    def _read_file(self, file_path: Any) -> Values:
        path = Path(file_path)
        try:
            data = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as exc:
            raise ConfigError(f"is not valid TOML: {exc}", str(path)) from exc
        if len(self._only) < len(self._sections):
            data = {section: values for section, values in data.items() if section in self._only}
        for section, values in data.items():
            _check_section(self._sections, section, values, str(path))
        return data


class Variables(EnvSettingsSource):
    """``GPUINFER_SECTION_KEY`` variables of these sections; an empty one is not set."""

    def __init__(
        self, settings: type[BaseSettings], environ: Mapping[str, str], only: Collection[str]
    ) -> None:
        self._environ = _checked(sections_of(settings), environ, only)
        super().__init__(settings, env_nested_delimiter="_", env_nested_max_split=1, env_ignore_empty=True)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._environ.items() if value}


class Credentials(InitSettingsSource):
    """The secrets that systemd passes as files (LoadCredential=)."""

    def __init__(self, settings: type[BaseSettings], folder: Path | None, only: Collection[str]) -> None:
        found: Values = {}
        for name, (section, key) in CREDENTIALS.items():
            if folder is not None and section in only and exists(folder / name):
                found.setdefault(section, {})[key] = read_text(folder / name).strip()
        super().__init__(settings, found)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def _check_section(
    sections: Mapping[str, type[BaseModel]], section: str, values: object, origin: str
) -> None:
    if section not in sections:
        homes = [name for name, model in sections.items() if section in model.model_fields]
        if homes and not isinstance(values, dict):
            raise ConfigError(f"key {section!r} must stand under [{homes[0]}]", origin)
        raise ConfigError(f"unknown section [{section}]; {_nearest(section, list(sections))}", origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{section} must be a section, written [{section}]", origin)
    known = list(sections[section].model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {section}.{key}; {_nearest(key, known)}", origin)


#: Variables that Kubernetes sets in all containers for a service whose name begins with gpuinfer.
_OF_KUBERNETES = re.compile(
    r"GPUINFER_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def is_setting(name: str, value: str) -> bool:
    """Tell whether a variable is a setting of gpuinfer, not another one with the same prefix."""
    if not name.startswith(ENV_PREFIX) or name in ENV_NOT_SETTINGS or _OF_KUBERNETES.fullmatch(name):
        return False
    return not (name.endswith("_PORT") and _ADDRESS.match(value))


def _checked(
    sections: Mapping[str, type[BaseModel]], environ: Mapping[str, str], only: Collection[str]
) -> dict[str, str]:
    """Return the variables that set something in ``only``.

    Raises ConfigError for one with our prefix that is no setting.
    """
    known = {
        variable(section, key): section for section, model in sections.items() for key in model.model_fields
    }
    found = {name: value for name, value in environ.items() if is_setting(name, value)}
    for name in found.keys() - known.keys():
        if len(only) < len(sections) and not any(name.startswith(variable(section, "")) for section in only):
            continue
        raise ConfigError(_unknown_variable(sections, name, list(known)), name)
    return {name: value for name, value in found.items() if known.get(name) in only}


def _unknown_variable(sections: Mapping[str, type[BaseModel]], name: str, known: list[str]) -> str:
    section = name.removeprefix(ENV_PREFIX).lower()
    if section in sections:
        names = ", ".join(variable(section, key) for key in sections[section].model_fields)
        return f"is a whole section; set its keys one by one: {names}"
    close = difflib.get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`gpuinfer config show` lists all settings"
    return f"unknown variable; {hint}"
