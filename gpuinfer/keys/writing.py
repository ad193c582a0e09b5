# SPDX-License-Identifier: Apache-2.0
"""Key files as the command writes them: atomically, and readable by root and the API only."""

from __future__ import annotations

import errno
import grp
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpuinfer.errors import BadKey, ConfigError, KeyExists, NotPermitted, UnknownKey
from gpuinfer.keys.key import SUFFIX, Key, checked_name, parse, serialise

#: The API's group, which may read the files; only root may write them.
GROUP = "gpuinfer-api"


def names(folder: Path) -> list[str]:
    """Return the names of all keys in the folder, valid or not. Raises NotPermitted."""
    with _explained(folder):
        try:
            files = [file.name for file in folder.iterdir()]
        except FileNotFoundError:
            return []
    return sorted(
        file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX) and not file.startswith(".")
    )


def load(folder: Path, name: str) -> Key:
    """Return a key. Raises UnknownKey, BadKey, NotPermitted."""
    path = _path(folder, name)
    with _explained(folder):
        try:
            return parse(name, path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise unknown(folder, name) from None
        except UnicodeDecodeError:
            raise BadKey("must be UTF-8 text", path.name) from None


def unknown(folder: Path, name: str) -> UnknownKey:
    """Return the error for a key that does not exist."""
    there = ", ".join(names(folder)[:20]) or "none"
    return UnknownKey(f"there is no key {name} in {folder}; the keys are: {there}", "name")


def add(folder: Path, key: Key) -> None:
    """Write a new key. Raises KeyExists, NotPermitted, ConfigError."""
    path = _path(folder, key.name)
    with _explained(folder):
        if not folder.is_dir():
            folder.mkdir(parents=True, mode=0o750)
            _readable_by_api(folder, 0o750)
        with _written(folder, key) as fresh:
            try:
                os.link(fresh, path)  # unlike a rename, never replaces a file
            except FileExistsError:
                raise KeyExists(
                    f"key {key.name} exists already; `gpuinfer key rotate {key.name}` gives it a new token",
                    "name",
                ) from None


def replace(folder: Path, key: Key) -> None:
    """Replace the key of the same name. Raises NotPermitted, ConfigError."""
    with _explained(folder), _written(folder, key) as fresh:
        fresh.replace(_path(folder, key.name))


def remove(folder: Path, name: str) -> None:
    """Remove a key file, valid or not. Raises UnknownKey, NotPermitted."""
    with _explained(folder):
        try:
            _path(folder, name).unlink()
        except FileNotFoundError:
            raise unknown(folder, name) from None
        _sync(folder)


def _path(folder: Path, name: str) -> Path:
    """Return the path of a key file. Raises BadKey for an invalid name, such as one with a slash."""
    return folder / (checked_name(name) + SUFFIX)


@contextmanager
def _written(folder: Path, key: Key) -> Iterator[Path]:
    """Write and sync a key to a temporary file, for the caller to link or rename within the block."""
    descriptor, name = tempfile.mkstemp(prefix=f".{key.name}.", dir=folder)
    fresh = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(serialise(key))
            file.flush()
            os.fsync(file.fileno())
        _readable_by_api(fresh, 0o640)
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)
    _sync(folder)


def _readable_by_api(path: Path, mode: int) -> None:
    """Let the API's group read it, if root writes and that group exists."""
    if os.geteuid() != 0:
        return
    with suppress(KeyError):
        os.chown(path, 0, grp.getgrnam(GROUP).gr_gid)
        path.chmod(mode)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn OSError into NotPermitted or ConfigError."""
    try:
        yield
    except OSError as exc:
        text = f"{folder}: {exc.strerror or exc}"
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(f"{text}; only root may manage keys: use sudo", "api.keys_dir") from None
        raise ConfigError(text, "api.keys_dir") from None


__all__ = ["GROUP", "add", "load", "names", "remove", "replace", "unknown"]
