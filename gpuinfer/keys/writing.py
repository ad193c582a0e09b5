# SPDX-License-Identifier: Apache-2.0
"""Keys as the command writes them: each file appears, changes and goes at once, and for the front alone."""

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

#: The group of the front, which may read the files; only root may write them.
GROUP = "gpuinfer-api"


def names(folder: Path) -> list[str]:
    """Return the names of the folder's files of keys, whatever is in them. Raises NotPermitted."""
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
    """Return the error for a key that is not there."""
    there = ", ".join(names(folder)[:20]) or "none"
    return UnknownKey(f"there is no key {name} in {folder}; there are: {there}", "name")


def add(folder: Path, key: Key) -> None:
    """Write a new key. Raises KeyExists, NotPermitted, ConfigError."""
    path = _path(folder, key.name)
    with _explained(folder):
        if not folder.is_dir():
            folder.mkdir(parents=True, mode=0o750)
            _for_the_front(folder, 0o750)
        with _written(folder, key) as fresh:
            try:
                os.link(fresh, path)  # unlike a rename, it replaces nothing
            except FileExistsError:
                raise KeyExists(
                    f"there is a key {key.name} already; `gpuinfer key rotate {key.name}` gives it another "
                    "token",
                    "name",
                ) from None


def replace(folder: Path, key: Key) -> None:
    """Write a key in the place of the one of its name. Raises NotPermitted, ConfigError."""
    with _explained(folder), _written(folder, key) as fresh:
        fresh.replace(_path(folder, key.name))


def remove(folder: Path, name: str) -> None:
    """Remove a key's file, whatever is in it. Raises UnknownKey, NotPermitted."""
    with _explained(folder):
        try:
            _path(folder, name).unlink()
        except FileNotFoundError:
            raise unknown(folder, name) from None
        _sync(folder)


def _path(folder: Path, name: str) -> Path:
    """Return a key's file. Raises BadKey: a name is no path."""
    return folder / (checked_name(name) + SUFFIX)


@contextmanager
def _written(folder: Path, key: Key) -> Iterator[Path]:
    """Write a key's file under another name, which is to be given its own within; it is on the disk then."""
    descriptor, name = tempfile.mkstemp(prefix=f".{key.name}.", dir=folder)
    fresh = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(serialise(key))
            file.flush()
            os.fsync(file.fileno())
        _for_the_front(fresh, 0o640)
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)
    _sync(folder)


def _for_the_front(path: Path, mode: int) -> None:
    """Let the front read it, where root writes and the package is installed; else its writer alone."""
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
    """Raise what the system refuses as NotPermitted or ConfigError."""
    try:
        yield
    except OSError as exc:
        text = f"{folder}: {exc.strerror or exc}"
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(f"{text}; keys are root's: call it with sudo", "api.keys_dir") from None
        raise ConfigError(text, "api.keys_dir") from None


__all__ = ["GROUP", "add", "load", "names", "remove", "replace", "unknown"]
