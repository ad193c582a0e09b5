# SPDX-License-Identifier: Apache-2.0
"""The keys of this host, reread from their folder when files change, without a restart.

Fails closed: an invalid file disables its own key, an unreadable folder disables all keys.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import NamedTuple

from gpuinfer.errors import BadKey
from gpuinfer.keys.key import SUFFIX, Key, parse
from gpuinfer.log import get_logger

log = get_logger(__name__)

#: Seconds between two checks of the folder: a change takes effect within one second.
CHECK_EVERY_S = 0.5
#: Maximum names of added, removed or changed keys in one log line.
_NAMED = 20
#: Larger files are refused.
_MOST_BYTES = 64 * 1024
#: The process is short of descriptors or memory for a moment; keys already read stay valid.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
#: A file changed this recently is read again: a further change may get the same timestamp.
_SETTLED_S = 2.0


class _Seen(NamedTuple):
    """State of a file when it was last read."""

    inode: int
    ctime_ns: int
    size: int


class _Entry(NamedTuple):
    """A valid token."""

    digest: bytes
    key: Key
    #: When it expires, in seconds since the epoch.
    until: float


class KeyFolder:
    """Call ``refresh`` twice a second; ``find`` returns the key of a token."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        #: Files to read again even if they look unchanged.
        self._again: set[str] = set()
        self._by_digest: dict[bytes, _Entry] = {}
        #: Name -> valid key, including expired ones.
        self.keys: Mapping[str, Key] = {}
        #: Invalid file -> reason.
        self.broken: Mapping[str, str] = {}
        #: Why the folder cannot be read; empty if it can be read or does not exist.
        self.unreadable = ""

    def __bool__(self) -> bool:
        """Whether keys are required. Files and folders that cannot be read count as keys."""
        return bool(self.keys or self.broken or self.unreadable)

    def find(self, token: bytes) -> Key | None:
        """Return the key of a token; None if the token is unknown, revoked or expired.

        The token is looked up by its hash and compared in constant time, so timing does not leak it.
        """
        digest = sha256(token).digest()
        found = self._by_digest.get(digest)
        if found is None or not compare_digest(found.digest, digest) or self._clock() >= found.until:
            return None
        return found.key

    def has_expired(self, token: bytes) -> bool:
        """Whether a token that ``find`` refused belongs to an expired key."""
        return sha256(token).digest() in self._by_digest

    def refresh(self) -> bool:
        """Read changed files; return whether anything changed."""
        try:
            seen = self._scan()
        except OSError as exc:
            if exc.errno in _PASSING:
                return False
            return self._close(exc)
        if self.unreadable:
            self.unreadable, self._seen = "", {}
        if seen == self._seen and not self._again:
            return False
        return self._read(seen)

    def _scan(self) -> dict[str, _Seen]:
        """Return the state of each key file. Raises OSError."""
        found = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                        try:
                            state = entry.stat()
                        except FileNotFoundError:
                            continue
                        found[entry.name] = _Seen(state.st_ino, state.st_ctime_ns, state.st_size)
        except FileNotFoundError:
            pass
        return found

    def _close(self, exc: OSError) -> bool:
        """Disable all keys: without the folder, revoked keys cannot be recognised."""
        why = f"{self.path}: {exc.strerror or exc}"
        if why == self.unreadable:
            return False
        log.error("keys_unreadable", folder=str(self.path), reason=exc.strerror or str(exc))
        self.unreadable = why
        self.keys, self.broken, self._by_digest, self._seen = {}, {}, {}, {}
        return True

    def _read(self, seen: dict[str, _Seen]) -> bool:
        """Read new and changed files; return whether the valid or the invalid keys changed."""
        keys: dict[str, Key] = {}
        broken: dict[str, str] = {}
        uncertain = set()
        for file in sorted(seen):
            name = file.removesuffix(SUFFIX)
            if seen[file] == self._seen.get(file) and file not in self._again | set(self.broken):
                keys[name] = self.keys[name]
                continue
            try:
                keys[name] = parse(name, _text_of(self.path / file))
            except FileNotFoundError:  # deleted since the folder was listed
                uncertain.add(file)
            except OSError as exc:
                uncertain.add(file)
                if exc.errno in _PASSING and name in self.keys:
                    keys[name] = self.keys[name]
                else:
                    broken[file] = f"cannot be read: {exc.strerror or exc}"
            except BadKey as exc:
                broken[file] = exc.message
        entries = _entries(keys, broken)
        before = self.keys, self.broken
        self.keys, self.broken, self._by_digest = keys, broken, entries
        recent = (self._clock() - _SETTLED_S) * 1e9
        self._seen = seen
        self._again = uncertain | {file for file, state in seen.items() if state.ctime_ns > recent}
        self._tell(*before)
        return before != (keys, broken)

    def _tell(self, keys: Mapping[str, Key], broken: Mapping[str, str]) -> None:
        """Log each change once."""
        for file, reason in self.broken.items():
            if broken.get(file) != reason:
                log.error("key_refused", file=str(self.path / file), reason=reason)
        added = sorted(set(self.keys) - set(keys))
        gone = sorted(set(keys) - set(self.keys))
        changed = sorted(name for name in keys if name in self.keys and keys[name] != self.keys[name])
        if added or gone or changed:
            first = {"added": added, "removed": gone, "changed": changed}
            named = {what: names[:_NAMED] for what, names in first.items() if names}
            log.info("keys_changed", **named, keys=len(self.keys))


def _text_of(path: Path) -> str:
    """Return a file's text. Raises OSError, BadKey."""
    # O_NONBLOCK: opening a named pipe must not block the API.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise BadKey(f"must have at most {_MOST_BYTES} bytes", path.name)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadKey("must be UTF-8 text", path.name) from None


def _entries(keys: dict[str, Key], broken: dict[str, str]) -> dict[bytes, _Entry]:
    """Return the valid tokens. If two files have the same token, only the first by name is valid."""
    found: dict[bytes, _Entry] = {}
    for name, key in list(keys.items()):
        until = float("inf") if key.expires is None else key.expires
        digest = bytes.fromhex(key.sha256)
        if digest in found:
            broken[name + SUFFIX] = (
                f"sha256: must differ from other keys, is the same as of key {found[digest].key.name}"
            )
            del keys[name]
            continue
        found[digest] = _Entry(digest, key, until)
        if key.old_sha256 and key.old_expires is not None:
            old = bytes.fromhex(key.old_sha256)
            found.setdefault(old, _Entry(old, key, min(until, key.old_expires)))
    return found
