# SPDX-License-Identifier: Apache-2.0
"""The keys of this host, as their folder has them now. A change counts at the next look, without a restart.

What cannot be read lets nobody in: a broken file refuses its own key, an unreadable folder refuses all.
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

#: Seconds between two looks, so that a change counts within one.
LOOK_EVERY_S = 0.5
#: The most names of keys of a kind that a line has.
_NAMED = 20
#: A larger file is no key.
_MOST_BYTES = 64 * 1024
#: The process lacks something for a moment; what is known holds meanwhile.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
#: A file that was changed this recently may change again within the clock's step: it is read once more.
_SETTLED_S = 2.0


class _Seen(NamedTuple):
    """A file as it was when it was read last."""

    inode: int
    ctime_ns: int
    size: int


class _Entry(NamedTuple):
    """A token that counts."""

    digest: bytes
    key: Key
    #: Seconds since the epoch from which it does not count.
    until: float


class KeyFolder:
    """``look`` at the folder twice a second; ``find`` a key by its token."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        #: Files to be read again, changed or not.
        self._again: set[str] = set()
        self._by_digest: dict[bytes, _Entry] = {}
        #: Name -> key, of those that hold, expired ones among them.
        self.keys: Mapping[str, Key] = {}
        #: File -> what is wrong with it.
        self.broken: Mapping[str, str] = {}
        #: Why the folder cannot be read; empty: it can, or there is none.
        self.unreadable = ""

    def __bool__(self) -> bool:
        """Tell whether keys are in use here. What cannot be read counts as a key."""
        return bool(self.keys or self.broken or self.unreadable)

    def find(self, token: bytes) -> Key | None:
        """Return the key of a token; None for one that is unknown, revoked or expired.

        The token's hash is compared in constant time; how long the search takes says nothing of the token.
        """
        digest = sha256(token).digest()
        found = self._by_digest.get(digest)
        if found is None or not compare_digest(found.digest, digest) or self._clock() >= found.until:
            return None
        return found.key

    def has_expired(self, token: bytes) -> bool:
        """Tell whether a token that is not found belongs to a key that has expired."""
        return sha256(token).digest() in self._by_digest

    def look(self) -> bool:
        """Read what has changed; return whether anything has."""
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
        """Return the files of keys as they are now. Raises OSError."""
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
        """Let nobody in by key: who was revoked cannot be told any more."""
        why = f"{self.path}: {exc.strerror or exc}"
        if why == self.unreadable:
            return False
        log.error("keys_unreadable", folder=str(self.path), reason=exc.strerror or str(exc))
        self.unreadable = why
        self.keys, self.broken, self._by_digest, self._seen = {}, {}, {}, {}
        return True

    def _read(self, seen: dict[str, _Seen]) -> bool:
        """Take over the files as they are now; return whether a key or a fault is another one."""
        keys: dict[str, Key] = {}
        broken: dict[str, str] = {}
        unsure = set()
        for file in sorted(seen):
            name = file.removesuffix(SUFFIX)
            if seen[file] == self._seen.get(file) and file not in self._again | set(self.broken):
                keys[name] = self.keys[name]
                continue
            try:
                keys[name] = parse(name, _text_of(self.path / file))
            except FileNotFoundError:  # between the look and now
                unsure.add(file)
            except OSError as exc:
                unsure.add(file)
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
        self._again = unsure | {file for file, state in seen.items() if state.ctime_ns > recent}
        self._tell(*before)
        return before != (keys, broken)

    def _tell(self, keys: Mapping[str, Key], broken: Mapping[str, str]) -> None:
        """Log what has changed since then, each once."""
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
    # A pipe of that name must not hold up the front.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise BadKey(f"has more than {_MOST_BYTES} bytes: it is no key", path.name)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise BadKey("must be UTF-8 text", path.name) from None


def _entries(keys: dict[str, Key], broken: dict[str, str]) -> dict[bytes, _Entry]:
    """Return the tokens that count. A copy of another key's file is no key: the first by name holds."""
    found: dict[bytes, _Entry] = {}
    for name, key in list(keys.items()):
        until = float("inf") if key.expires is None else key.expires
        digest = bytes.fromhex(key.sha256)
        if digest in found:
            broken[name + SUFFIX] = f"sha256: is the one of the key {found[digest].key.name}"
            del keys[name]
            continue
        found[digest] = _Entry(digest, key, until)
        if key.old_sha256 and key.old_expires is not None:
            old = bytes.fromhex(key.old_sha256)
            found.setdefault(old, _Entry(old, key, min(until, key.old_expires)))
    return found
